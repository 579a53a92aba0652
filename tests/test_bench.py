"""The benchmark: real processes that take turns, ratios that are refused, and the files it writes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlx_posttrain import bench, engines
from mlx_posttrain.bench import baselines, comparison, flops, harness, inputs, render, scaling, worker
from mlx_posttrain.bench.inputs import Shape, model_folder, reward_folder, rows
from mlx_posttrain.bench.kinds import training_kinds
from mlx_posttrain.cli import app
from mlx_posttrain.convert import hub
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory.plan import Size
from mlx_posttrain.models.merge import base_folder
from tests.random_models import SMALL, random_model


def timing(engine: str, seconds: list[float], losses: list[float], **more: Any) -> bench.Timing:
    return bench.Timing(
        engine, more.pop("what", "sft"), seconds=seconds, losses=losses, rows=8, tokens=100, **more
    )


# summed loss and trained tokens of three rows: 86 / 25 = 3.44 together
ROWS = [(30.0, 10), (44.0, 11), (12.0, 4)]


def ours(**more: Any) -> bench.Timing:
    return timing("torch-cpu", [1.0, 2.0], [3.4, 3.3], first={"rows": ROWS}, **more)


def baseline(
    loss: float = 74 / 21, tokens: int = 21, losses: tuple[float, float] = (3.41, 3.32)
) -> bench.Timing:
    """Another trainer, whose first batch holds the first two rows."""
    first = {"rows": [1, 0], "loss": loss, "tokens": tokens}
    return timing("trl-cpu", [3.0, 4.0], list(losses), against="torch-cpu", version="1.16.0", first=first)


def small_rollout(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Set the sizes of rollouts for every module that uses them."""
    for key, size in sizes.items():
        monkeypatch.setitem(harness.ROLLOUT, key, size)


def test_ratio_is_the_median_of_pairs() -> None:
    timings = [
        timing("mlx-cpu", [1.0, 2.0, 4.0], [3.0] * 3),
        timing("torch-cpu", [2.0, 2.0, 12.0], [3.0] * 3, against="mlx-cpu"),
    ]
    comparison.compare(timings)
    assert timings[0].ratio is None and timings[1].ratio == (2.0, 1.0, 3.0) and timings[1].disagreement == 0


def test_a_baseline_is_compared_with_our_engine_on_its_library() -> None:
    """Against another library's engine a baseline would look fast or slow for the wrong reason."""
    timings = [timing("mlx-cpu", [10.0, 10.0], [3.4, 3.3]), ours(against="mlx-cpu"), baseline()]
    comparison.compare(timings)
    assert timings[2].ratio == (2.5, 2.0, 3.0)
    text = render.table({"timings": [vars(t) for t in timings]})
    assert "2.50 [2.00, 3.00] of torch-cpu" in text and "0.15 [0.10, 0.20] of mlx-cpu" in text


def test_baselines_are_timed_on_the_chosen_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: True)
    assert baselines.installed(["mlx-cpu"], ["sft"]) == {"mlx-lm-cpu": "mlx-cpu"}
    both = baselines.installed(["mlx-gpu", "mlx-cpu", "torch-cpu"], ["sft"])
    assert both == {
        "mlx-lm-gpu": "mlx-gpu",
        "mlx-lm-cpu": "mlx-cpu",
        "transformers-cpu": "torch-cpu",
        "trl-cpu": "torch-cpu",
    }
    assert baselines.installed(["mlx-cpu"], ["grpo-twice"]) == {}  # mlx-lm-lora updates once a rollout
    of_pairs = baselines.installed(["mlx-cpu", "torch-cpu"], ["dpo", "kto"])
    assert set(of_pairs) == {"mlx-lm-lora-cpu", "trl-cpu", "trl-kept-cpu"}
    assert baselines.find_baseline("trl-kept-cpu", "dpo") and not baselines.find_baseline("torch-cpu", "dpo")
    kinds = set(training_kinds()) | {"generate"}
    assert all(kinds.issuperset(baseline.kinds) for baseline in baselines.BASELINES.values())


def test_a_missing_baseline_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    lines = baselines.missing(["mlx-cpu", "torch-cpu"], ["dpo", "sft"])
    assert lines == [
        "mlx-lm is not timed, mlx_lm missing: pip install mlx-lm",
        "mlx-lm-lora is not timed, mlx_lm_lora missing: pip install mlx-lm-lora==5.10.2",
        "transformers is not timed, torch, accelerate, peft missing: pip install torch accelerate peft",
        "trl is not timed, trl, accelerate, peft missing: pip install trl==1.16.0 accelerate peft",
    ]
    assert baselines.missing(["mlx-cpu"], ["grpo-twice"]) == []
    arguments = ["bench", "--what", "dpo,kto", "--engines", "torch-cpu", "--peers", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == (
        "--peers: no other trainer that does dpo, kto is installed and runs on torch-cpu; "
        "trl is not timed, trl, accelerate, peft missing: pip install trl==1.16.0 accelerate peft"
    )


@pytest.mark.parametrize(
    ("other", "mismatch"),
    [
        (baseline(), None),
        # it trains on prompts
        (baseline(tokens=60), "its first batch trains 60 tokens, ours 21 on the same rows"),
        (baseline(loss=74 / 21 * 1.002), "losses before training differ by 0.20%"),
        # it trains nothing
        (baseline(losses=(3.44, 3.44)), "its loss fell 0.00 times as far as ours"),
        (baseline(losses=(3.0, 2.9)), "its loss fell 3.86 times as far as ours"),
    ],
)
def test_a_baseline_must_start_and_learn_alike(other: bench.Timing, mismatch: str | None) -> None:
    comparison.compare([ours(), other])
    assert other.mismatch == mismatch and (other.ratio is None) == (mismatch is not None)
    if mismatch:
        assert mismatch in render._ratio(vars(other))


@pytest.mark.parametrize(
    ("first", "entropy", "mismatch"),
    [
        ({"kl": 0.0, "score": 0.1}, 10.7, None),
        ({"kl": 0.4, "score": 0.1}, 10.7, "trl-cpu's first KL from the reference is 0.400, not 0"),
        (
            {"kl": 0.0, "score": 3.1},
            10.7,
            "mean scores of the first rollout differ: 3.100 against 0.000 +- 0.500",
        ),
        ({"kl": 0.0, "score": 0.1}, 9.0, "entropies differ by 15.9%"),
    ],
)
def test_a_baselines_first_rollout_is_of_the_same_policy_and_scorer(
    first: dict[str, float], entropy: float, mismatch: str | None
) -> None:
    base = timing("torch-cpu", [1.0], [10.7], what="ppo", first={"kl": 0.0, "score": 0.0, "score_std": 1.0})
    other = timing(
        "trl-cpu", [2.0], [entropy], what="ppo", against="torch-cpu", version="1.12.0", first=first
    )
    comparison.compare([base, other])
    assert other.mismatch == mismatch


@pytest.mark.parametrize(
    ("first", "entropy", "mismatch"),
    [
        ({}, 4.47, None),  # after the first update each engine samples from its own policy
        ({"entropy": 4.46}, 4.42, "entropies of the first rollout differ by 0.68%"),
        ({"score": 3.1}, 4.42, "mean scores of the first rollout differ: 3.100 against 0.000 +- 0.500"),
        ({}, 4.0, "entropies differ by 9.5%"),
    ],
)
def test_our_engines_sample_the_same_first_answers(
    first: dict[str, float], entropy: float, mismatch: str | None
) -> None:
    same = {"kl": 0.0, "score": 0.0, "score_std": 1.0, "entropy": 4.43}
    base = timing("mlx-cpu", [1.0], [4.42], what="ppo", first=same)
    other = timing("torch-cpu", [2.0], [entropy], what="ppo", against="mlx-cpu", first={**same, **first})
    comparison.compare([base, other])
    assert other.mismatch == mismatch


def test_no_ratio_where_losses_disagree() -> None:
    timings = [timing("mlx-cpu", [1.0], [3.0]), timing("torch-cpu", [2.0], [3.006], against="mlx-cpu")]
    comparison.compare(timings)
    assert timings[1].ratio is None and timings[1].disagreement == pytest.approx(0.002)
    assert "no ratio: losses differ by 0.20%" in render._ratio(vars(timings[1]))


def test_no_ratio_where_a_loss_is_not_finite() -> None:
    timings = [
        timing("mlx-cpu", [1.0, 1.0], [3.0, 3.0]),
        timing("torch-cpu", [2.0, 2.0], [3.0, float("nan")], against="mlx-cpu"),
    ]
    comparison.compare(timings)
    assert (
        timings[1].ratio is None
        and "not finite" in (timings[1].error or "")
        and not timings[1].losses
        and timings[0].error is None
    )
    failed = [timing("mlx-cpu", [1.0], [float("inf")]), timing("torch-cpu", [2.0], [3.0], against="mlx-cpu")]
    comparison.compare(failed)
    assert failed[1].ratio is None and failed[1].mismatch == "mlx-cpu failed"


def test_cost_of_one_kind_of_work_relative_to_another() -> None:
    def done(what: str, seconds: list[float], peak: float) -> bench.Timing:
        return timing("mlx-cpu", seconds, [3.0], what=what, peak_gb=peak)

    timings = [
        done("sft", [2.0, 2.0, 4.0], 2.0),
        done("kl", [2.8, 3.0, 3.0], 3.0),
        done("lora", [1.0, 1.2, 1.4], 1.0),
    ]
    kl, lora = comparison.relative_costs(
        [*timings, timing("mlx-lm-cpu", [9.0], [3.0], what="lora", version="1")]
    )
    assert (kl["what"], kl["over"], kl["time"], kl["memory"]) == ("kl", "sft", (1.5, 0.7, 1.5), 1.5)
    assert (lora["what"], lora["over"], lora["time"], lora["memory"]) == (
        "lora",
        "sft",
        (0.6, 0.25, 0.7),
        0.5,
    )
    assert (
        render._relation(kl) == "kl / sft on mlx-cpu: 1.50 [0.70, 1.50] times the time, 1.50 times the memory"
    )


def test_no_relative_cost_of_work_that_differed() -> None:
    def done(engine: str, what: str, loss: float, **more: Any) -> bench.Timing:
        return timing(engine, [2.0], [loss], what=what, peak_gb=1.0, **more)

    alone = [done("mlx-cpu", "generate", 3.0), done("mlx-cpu", "generate-single", 3.001)]
    assert [r["over"] for r in comparison.relative_costs(alone)] == ["generate"]
    assert comparison.relative_costs([alone[0], done("mlx-cpu", "generate-single", 3.1)]) == []
    timings = [
        done("mlx-cpu", "sft", 3.0),
        done("torch-cpu", "sft", 3.2, against="mlx-cpu"),
        done("torch-cpu", "lora", 3.0),
    ]
    comparison.compare(timings[:2])
    assert comparison.relative_costs(timings) == []


def test_the_table_shows_what_was_collected() -> None:
    t = vars(ours()) | {
        "steps": 4,
        "shapes": 3,
        "disagreement": 1.5e-5,
        "against": "mlx-cpu",
        "ratio": (2.0, 1.9, 2.1),
        "flops_share": 0.5,
    }
    (row,) = render.table({"timings": [t]}).splitlines()[2:]
    shown = dict(zip(render.COLUMNS, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    assert (
        shown["seconds per step"] == "0.375"
        and shown["shapes"] == "3"
        and shown["losses differ"] == "0.0015%"
    )
    assert shown["of product peak"] == "50%"
    result = {
        "shape": vars(Shape()),
        "peaks": {},
        "machine": {"chip": "x", "transformers": "5"},
        "model": "tiny",
        "units": 2,
        "relations": [],
        "scaling": {},
        "timings": [t, vars(baseline())],
    }
    assert "- trl: 1.16.0" in render.markdown(result)


class FakeWorker:
    """A worker whose first pass is slow, as one that compiles."""

    sent: list[str] = []

    def __init__(self, spec: dict[str, Any]):
        self.spec, self.number = spec, 0

    def receive(self) -> dict[str, Any]:
        return {"ready": True}

    def send(self, command: str) -> dict[str, Any]:
        if command == "end":
            return {"peak_gb": 1.0, "process_gb": 1.0, "device": "it"}
        self.sent.append(self.spec["engine"])
        self.number += 1
        if self.spec.get("fails") == self.number:
            return {"error": "out of memory"}
        seconds = 9.0 if self.number == 1 else self.spec["seconds"]
        return {"seconds": seconds, "loss": float(self.number), "rows": 8, "tokens": 100, "steps": 2}

    def kill(self) -> None:
        pass


def test_a_unit_is_two_seconds_of_the_fastest_engine_after_a_pass_that_warms_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 0.6 s a pass units have 4, those of the slow engine too: its losses would be others otherwise."""
    monkeypatch.setattr(bench, "_Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "sent", [])
    specs: list[dict[str, Any]] = [
        {"engine": "mlx-gpu", "what": "lora", "seconds": 0.6},
        {"engine": "mlx-cpu", "what": "lora", "seconds": 3.0, "dtype": "float16"},
    ]
    fast, slow = bench._take_turns(specs, 2)
    assert fast.seconds == pytest.approx([2.4, 2.4]) and slow.seconds == pytest.approx([12.0, 12.0])
    assert fast.losses == slow.losses == [7.0, 12.0]  # of the last passes: 2 + 5 and 2 + 10
    assert (fast.passes, fast.rows, fast.tokens, fast.steps) == (4, 32, 400, 8)
    assert (fast.dtype, slow.dtype) == ("float32", "float16")
    turns = [(engine, len(list(group))) for engine, group in groupby(FakeWorker.sent)]
    first = [("mlx-gpu", 1), ("mlx-cpu", 1)]
    assert turns == [*first, *first, ("mlx-gpu", 5), ("mlx-cpu", 10), ("mlx-gpu", 5)]
    specs[0]["fails"] = 6
    failed, other = bench._take_turns(specs, 1)
    assert failed.error == "out of memory" and not failed.seconds and other.seconds == [12.0]


def test_long_passes_are_warmed_up_once(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(bench, "_Worker", FakeWorker)
    monkeypatch.setattr(bench, "LONG_PASS", 9.0)  # the first pass of a FakeWorker
    monkeypatch.setattr(FakeWorker, "sent", [])
    specs: list[dict[str, Any]] = [
        {"engine": engine, "what": "grpo", "seconds": seconds}
        for engine, seconds in (("torch-cpu", 8.0), ("trl-cpu", 12.0))
    ]
    ours, theirs = bench._take_turns(specs, 2)
    assert ours.seconds == [8.0, 8.0] and theirs.seconds == [12.0, 12.0]
    assert ours.losses == theirs.losses == [2.0, 3.0] and len(FakeWorker.sent) == 6
    assert capfd.readouterr().err.splitlines()[0] == "grpo torch-cpu, warm-up: 9.00 s"


def test_no_share_of_a_peak_is_above_one() -> None:
    size = Size(1, 2, 8, 1, 10, 32, "gpt2", {"wte.weight": (10, 2)})
    shape, kind = Shape(rows=1, length=8), training_kinds()["sft"]
    once = flops.training_flops(size, kind, shape)
    quick = timing("mlx-cpu", [2.0], [3.0], passes=4)
    slow = timing("mlx-cpu", [4.0], [3.0], passes=4)
    decode = timing("mlx-cpu", [2.0], [3.0], what="generate", passes=3, dtype="float16")
    failed = timing("mlx-cpu", [], [], error="no")
    peaks = {"mlx-cpu": {"gflops": 1e-9, "gb_per_s": 1.0}}
    bench._add_peak_shares([quick, slow, decode, failed], size, shape, peaks)
    assert quick.flops_share == 1 and slow.flops_share == pytest.approx(0.5)
    assert peaks["mlx-cpu"]["gflops"] == pytest.approx(4 * once / 2 / 1e9)
    # 3 passes of 64 tokens read 20 numbers of 2 bytes in 2 s
    assert decode.bandwidth_share == pytest.approx(3 * 64 * 20 * 2 / 2 / 1e9)


def test_a_mac_times_its_cpu_beside_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr("mlx_posttrain.engines.available", lambda: ["mlx", "torch"])
    assert bench.available_engines() == ["mlx-gpu", "mlx-cpu", "torch-cpu"]


@pytest.mark.parametrize(
    ("what", "off", "differs"),
    [("lora", 9e-3, False), ("lora", 2e-2, True), ("generate", 4e-2, False), ("generate", 6e-2, True)],
)
def test_half_precision_may_round_losses(what: str, off: float, differs: bool) -> None:
    more: dict[str, Any] = {"what": what, "dtype": "bfloat16"}
    ours = timing("mlx-cpu", [1.0], [3.0], **more)
    other = timing("torch-cpu", [2.0], [3 * (1 + off)], against="mlx-cpu", **more)
    comparison.compare([ours, other])
    assert (other.mismatch is not None) == differs


def test_a_block_to_publish_has_command_machine_and_numbers_and_no_path() -> None:
    result = {
        "shape": vars(Shape()),
        "peaks": {"mlx-gpu": {"gflops": 1.0, "gb_per_s": 2.0}},
        "machine": {"system": "macOS 26", "chip": "Apple M9", "memory": "16 GiB", "mlx": "0.32"},
        "model": "/data/models/mine",
        "units": 2,
        "dtype": "float16",
        "relations": [],
        "scaling": {},
        "timings": [vars(ours())],
    }
    command = ["mlx-posttrain", "bench", "--model", "/data/models/mine", "--publish"]
    text = render.publication(result, command)
    assert text.startswith("### Apple M9, 16 GiB, macOS 26\n\n```sh\nmlx-posttrain bench --model mine")
    assert "/data" not in text and "number format of frozen weights: float16" in text and "| sft |" in text
    numbers = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert numbers["timings"][0]["seconds"] == [1.0, 2.0] and numbers["machine"]["mlx"] == "0.32"


def test_rows_are_reproducible_and_of_the_stated_length() -> None:
    shape = Shape(rows=64)
    assert rows(shape, 4096) == rows(shape, 4096)
    prompts, answers = zip(
        *((sum(not t for t in e.trained), sum(e.trained)) for e in rows(shape, 4096)), strict=True
    )
    assert min(prompts) >= 20 and max(prompts) <= 60 and min(answers) >= 10 and max(answers) <= 200
    assert {len(e.tokens) for e in rows(Shape(rows=4, length=40), 4096)} == {40}


def test_paired_rows_share_their_prompts() -> None:
    found = rows(Shape(rows=64, paired=True), 4096)
    for chosen, rejected in zip(found[::2], found[1::2], strict=True):
        start = chosen.answer_start
        assert 20 <= start == rejected.answer_start <= 60
        assert chosen.tokens[:start] == rejected.tokens[:start] and chosen.tokens != rejected.tokens
        assert all(10 <= sum(e.trained) <= 100 for e in (chosen, rejected))
    assert {len(e.tokens) for e in rows(Shape(rows=4, length=40, paired=True), 4096)} == {40}


def test_a_mismatched_answer_is_the_one_before_it_in_the_batch() -> None:
    examples = rows(Shape(rows=8, paired=True), 4096)
    first, second, third, fourth = items = inputs.labelled(examples, 2)
    assert [item.answer for item in items] == examples[::2] and [item.good for item in items] == [1, 0, 1, 0]
    for item, other in ((first, second), (second, first), (third, fourth), (fourth, third)):
        start, begins = item.answer.answer_start, other.answer.answer_start
        assert item.mismatched.tokens == item.answer.tokens[:start] + other.answer.tokens[begins:]


def test_the_clock_can_stop_before_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, float]] = []
    clock = iter([10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(harness.Gate, "_send", lambda self, **record: sent.append(record))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a gate takes it
    gate = harness.Gate()
    monkeypatch.setattr(sys, "stdin", type("Lines", (), {"readline": staticmethod(lambda: "go\n")}))
    gate.open()
    gate.stop()
    gate.report(loss=1.0)
    gate.open()
    gate.report(loss=2.0)
    assert [record["seconds"] for record in sent if "seconds" in record] == [2.0, 3.0]


def test_training_flops_by_hand() -> None:
    tiny = Size(
        1,
        2,
        8,
        1,
        10,
        32,
        "gpt2",
        {"h.0.attn.c_attn.weight": (2, 6), "h.0.mlp.c_fc.weight": (2, 18), "wte.weight": (10, 2)},
    )
    shape, kinds = Shape(rows=1, length=8), training_kinds()  # 1 prompt token, 7 trained
    attention = 2 * 2 * 2 * 64 / 2
    assert flops.training_flops(tiny, kinds["sft"], shape) == 6 * (12 * 4 * 8 + 2 * 10 * 7) + 3 * attention
    assert (
        flops.training_flops(tiny, kinds["kl-lora"], shape) == 6 * (12 * 4 * 8 + 2 * 10 * 7) + 4 * attention
    )
    # one answer and one mismatched answer, which no gradient flows into
    assert flops.training_flops(tiny, kinds["kto"], Shape(rows=2, length=8, batch_size=2)) == (
        (6 + 2) * (12 * 4 * 8 + 2 * 10 * 7) + (3 + 1) * attention
    )
    # a reward model's head is one number per row
    assert flops.training_flops(tiny, kinds["reward"], shape) == 6 * 12 * 4 * 8 + 3 * attention


def test_rollout_flops_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Size(
        1,
        2,
        8,
        1,
        10,
        32,
        "gpt2",
        {"h.0.attn.c_attn.weight": (2, 6), "h.0.mlp.c_fc.weight": (2, 18), "wte.weight": (10, 2)},
    )
    small_rollout(monkeypatch, prompts=1, samples=2, max_tokens=4)
    monkeypatch.setattr(flops, "prompts", lambda vocabulary, length: [[1, 2, 3]])
    # a forward pass of one answer: 3 + 4 tokens, 4 of them with logits
    body, attention, head = 2 * 48 * 7, 2 * 2 * 2 * 49 / 2, 2 * 2 * 10 * 4
    decoding = 2 * (2 * 48 * 4 + attention + head) + 2 * 48 * 3  # both samples share one pass over the prompt
    kinds, shape = training_kinds(), Shape()
    # reference, critic and reward model read the answers; of the policy's pass the sampler knows the outcome
    assert flops.rollout_flops(tiny, kinds["ppo"], shape) == decoding + 2 * (
        3 * (body + attention) + head
    ) + 2 * 2 * (6 * (body + attention) + 3 * head)
    # without a critic: one update needs no pass before it, two updates do
    update = 2 * 3 * (body + attention + head)
    assert flops.rollout_flops(tiny, kinds["grpo"], shape) == decoding + update
    assert flops.rollout_flops(tiny, kinds["grpo-twice"], shape) == decoding + 2 * update + 2 * (
        body + attention + head
    )
    frozen = 2 * (2 * (body + head) + 3 * attention)
    assert flops.rollout_flops(tiny, kinds["grpo-lora"], shape) == decoding + frozen


def test_decoding_row_by_row_reads_the_weights_for_every_row() -> None:
    tiny = Size(1, 2, 8, 1, 10, 32, "gpt2", {"a": (10, 20), "b": (50,)}, file_bytes=500)
    assert flops.decode_bytes(tiny) == 64_000 and flops.decode_bytes(tiny, 32) == 32 * 64_000
    assert flops.decode_bytes(tiny, dtype="float16") == 32_000
    assert flops.decode_bytes(dataclasses.replace(tiny, packed_bytes=400)) == 500 * 64


def test_scaling_in_markdown() -> None:
    seconds = {
        case: 0.1 * case.rows * case.length / 1024 + 1e-4 * case.rows * case.trained
        for case in scaling.cases(256)
    }
    result = {
        "cases": [{**case._asdict(), "seconds": [s]} for case, s in seconds.items()],
        "loss": [{"positions": 1024, "vocabulary": 8192, "mb": 50.0, "logits_mb": 32.0}],
    }
    text = "\n".join(scaling.markdown_lines("mlx-cpu", result))
    assert "4 times the rows: 4.00 times the time" in text
    assert (
        "0.12, 0.50 and 0.88 of the tokens trained: 0.59, 0.80 and 1 of the time (on a straight line 0.80 "
        "in the middle)" in text
    )
    assert "the same tokens in rows 4 times as long: 1.00 times the time" in text  # 512 tokens do not fit
    assert "| 1024 | 8192 | 50 | 32 |" in text


@pytest.mark.parametrize("engine", engines.available())
def test_memory_of_the_loss_depends_on_neither_positions_nor_vocabulary(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_posttrain.engines import fused

    if engine == "torch" and sys.platform != "linux":
        pytest.skip("other systems cannot reset a process's peak")
    monkeypatch.setattr(fused, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(fused, "CACHED_BYTES", 2**22)
    monkeypatch.setattr(fused, "PANEL", 1)  # a panel may take twice the budget
    scaling.loss_peak(engine, 256, 4096)  # warm-up: a library allocates when it is first used
    # Three times: torch's peak is the process's, and the heap's fragmentation differs between calls.
    small, large = (
        max(scaling.loss_peak(engine, *sizes) for _ in range(3)) for sizes in ((512, 4096), (2048, 16384))
    )
    assert large < small + 12 and large < 2048 * 16384 * 4 / 2**20 / 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["sft", "sft,generate"])
def test_engines_take_turns_on_the_embedded_model(what: str, tmp_path: Path) -> None:
    have = bench.available_engines()
    done = CliRunner().invoke(
        app,
        [
            "bench",
            "--model",
            "tiny",
            "--what",
            what,
            "--units",
            "2",
            "--rows",
            "16",
            "--output",
            str(tmp_path / "out"),
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    timings = {(t["what"], t["engine"]): t for t in result["timings"]}
    assert set(timings) == {(w, e) for w in what.split(",") for e in have}
    for t in timings.values():
        assert t["error"] is None and len(t["seconds"]) == 2 and min(t["seconds"]) > 0 and t["peak_gb"] > 0
    if len(have) > 1:
        assert timings["sft", have[1]]["ratio"] is not None, timings["sft", have[1]]["disagreement"]
        if "generate" in what:  # the same answers, sampled with the same random numbers
            assert timings["generate", have[1]]["disagreement"] < 5e-3
    again = CliRunner().invoke(app, ["bench", "--model", "tiny", "--output", str(tmp_path / "out")])
    assert "holds a benchmark already" in str(again.exception)  # before anything is measured
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "- chip: " in text and "| sft | " in text
    assert timings["sft", have[0]]["steps"] == 2 and timings["sft", have[0]]["shapes"] >= 1
    assert all((tmp_path / "out" / f"bench.{ending}").stat().st_size > 1000 for ending in ("svg", "png"))


@pytest.mark.exhaustive
def test_other_kinds_of_work_on_the_embedded_model() -> None:
    result = bench.bench(
        "tiny",
        ["kl", "kl-lora", "reward", "ppo", "grpo", "grpo-twice", "dpo", "kto"],
        units=1,
        shape=Shape(rows=8, batch_size=4),
    )
    assert len(result["timings"]) == 8 * len(bench.available_engines())
    for t in result["timings"]:
        assert t["error"] is None and t["mismatch"] is None, (
            t["what"],
            t["engine"],
            t["error"],
            t["mismatch"],
        )


@pytest.mark.parametrize("engine", bench.available_engines())
def test_answers_sampled_one_at_a_time_equal_those_of_a_batch(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gate:
        def __init__(self) -> None:
            self.units = iter([True, False])
            self.stats: dict[str, float] = {}

        def open(self) -> bool:
            return next(self.units)

        def report(self, **stats: float) -> None:
            self.stats = stats

        def close(self, **stats: float) -> None:
            pass

    small_rollout(monkeypatch, prompts=2, samples=3, max_tokens=5)
    reported = []
    for what in ("generate", "generate-single"):
        gate = Gate()
        worker.generate({"engine": engine, "what": what, "folder": str(base_folder("tiny"))}, gate)  # type: ignore[arg-type]
        reported.append(gate.stats)
    assert reported[0]["rows"] == 6 and reported[0]["tokens"] == 30
    assert reported[1] == pytest.approx(reported[0], rel=1e-5)


@pytest.mark.parametrize("what", ["sft", "ppo", "scaling"])
def test_a_unit_ends_when_its_update_has_finished(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX returns from a step while its update still runs."""
    mlx = pytest.importorskip("mlx_posttrain.engines.mlx.engine")
    events = []

    class OneUnit:
        peak = None

        def open(self) -> bool:
            return "unit" not in events

        def report(self, **stats: Any) -> None:
            events.append("unit")

        def close(self, **stats: Any) -> None:
            pass

    step, synchronize = mlx.MLXTrainer.step, mlx.MLXEngine.synchronize
    monkeypatch.setattr(mlx.MLXTrainer, "step", lambda *a: (events.append("step"), step(*a))[1])
    monkeypatch.setattr(
        mlx.MLXEngine, "synchronize", lambda self: (events.append("wait"), synchronize(self))[1]
    )
    small_rollout(monkeypatch, prompts=1, samples=2, max_tokens=4)
    monkeypatch.setattr(scaling, "cases", lambda context: [scaling.Case(1, 8, 4)])
    monkeypatch.setattr(scaling, "loss_peak", lambda *a: 0.0)
    folder = str(base_folder("tiny"))
    spec = {
        "engine": "mlx-cpu",
        "what": what,
        "folder": folder,
        "shape": {"rows": 2, "batch_size": 2, "length": 16},
    }
    if what == "ppo":
        spec["reward"] = str(reward_folder(Path(folder), tmp_path))
    worker.find_work(what)(spec, OneUnit())
    assert events.count("step") >= 1 and events[-2:] == ["wait", "unit"]


@pytest.mark.parametrize(
    ("other", "mismatch"),
    [
        ((8, 100, 10.6), None),
        ((8, 90, 10.6), "it decoded 90 tokens of 8 answers, ours 100 of 8"),
        ((8, 100, 4.0), "log-likelihoods of the answers differ by 62.3%"),  # a cut distribution
    ],
)
def test_a_baseline_must_decode_as_many_answers_as_likely(
    other: tuple[int, int, float], mismatch: str | None
) -> None:
    base = timing("mlx-cpu", [1.0], [10.6], what="generate")
    theirs = timing("it-cpu", [2.0], [other[2]], what="generate", against="mlx-cpu", version="1")
    theirs.rows, theirs.tokens = other[0], other[1]
    comparison.compare([base, theirs])
    assert theirs.mismatch == mismatch


def test_the_loss_of_pairs_falls_from_its_own_start() -> None:
    """From ln 2, and not from the negative log-likelihood that the first batch is compared by."""
    base = timing("torch-cpu", [1.0], [0.5], what="dpo", first={"rows": ROWS, "start": 0.69})
    other = baseline(losses=(0.6, 0.595))
    other.what, other.seconds = "dpo", [3.0]
    other.losses = [0.595]
    comparison.compare([base, other])
    assert other.mismatch is None and other.fall == pytest.approx(0.5) and other.ratio == (3.0, 3.0, 3.0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["grpo", "generate", "dpo,kto"])
def test_installed_baselines_of_preferences_and_rollouts_do_the_same_work(what: str) -> None:
    kinds, engine_names = what.split(","), bench.available_engines()
    names = baselines.installed(engine_names, kinds)
    if not names:
        pytest.skip("; ".join(baselines.missing(engine_names, kinds)))
    result = bench.bench("tiny", kinds, baselines=True, units=1, shape=Shape(rows=8))
    others = [t for t in result["timings"] if t["engine"] not in bench.ENGINES]
    assert {t["engine"] for t in others} == set(names)
    for t in others:
        assert t["error"] is None and t["mismatch"] is None, (t["engine"], t["error"], t["mismatch"])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model", "what"), [("tiny", "sft"), ("tiny", "lora"), ("llama", "lora"), ("llama", "sft")]
)
def test_installed_baselines_do_the_same_work(model: str, what: str, tmp_path: Path) -> None:
    """Real trainers on small models: their losses before training equal ours, and fall as ours do.

    One batch holds all rows, so that the order of rows plays no part.
    """
    if model == "llama":
        sizes = {**SMALL, "model_type": "llama", "vocab_size": 4096}
        model = str(random_model(tmp_path / "llama", sizes, tokenizer=base_folder("tiny")))
    result = bench.bench(model, [what], baselines=True, units=2, shape=Shape(rows=8))
    others = [t for t in result["timings"] if t["engine"] not in bench.ENGINES]
    assert (
        {baselines.baseline_name(t["engine"]) for t in others}
        == {baselines.baseline_name(name) for name in baselines.installed(bench.available_engines(), [what])}
        != set()
    )
    for t in others:
        assert t["error"] is None and t["mismatch"] is None and t["ratio"], (
            t["engine"],
            t["error"],
            t["mismatch"],
        )
        assert (
            t["disagreement"] < 1e-4
            and t["against"].partition("-")[0]
            == baselines.BASELINES[baselines.baseline_name(t["engine"])].engine
        )


@pytest.mark.exhaustive
def test_scaling_of_the_embedded_model(tmp_path: Path) -> None:
    result = bench.bench("tiny", ["scaling"], [bench.available_engines()[0]], units=1)
    (scaled,) = result["scaling"].values()
    assert (
        len(scaled["cases"]) == 8
        and all(len(c["seconds"]) == 2 for c in scaled["cases"])
        and len(scaled["loss"]) == 4
    )
    assert "times the rows" in render.markdown(result)
    render.write(result, tmp_path)
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.exhaustive
def test_ctrl_c_ends_all_processes_with_a_message(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mlx_posttrain",
        "bench",
        "--model",
        "tiny",
        "--what",
        "sft",
        "--units",
        "500",
        "--output",
        str(tmp_path / "out"),
    ]
    # A shell without job control makes background processes ignore Ctrl-C, and ours would inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen
    )
    assert process.stderr is not None
    assert "unit 1 of 500" in process.stderr.readline()  # both engines are open and warmed up
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 2 and rest.strip().splitlines()[-1] == "mlx-posttrain: interrupted"
    assert not (tmp_path / "out" / "bench.json").exists()


@pytest.mark.slow
def test_a_worker_that_fails_is_reported_in_its_timing() -> None:
    (failed,) = bench._take_turns(
        [
            {
                "engine": bench.available_engines()[0],
                "what": "sft",
                "folder": "/nowhere",
                "shape": vars(Shape()),
            }
        ],
        1,
    )
    assert failed.error and "nowhere" in failed.error
    assert "nowhere" in render.table({"timings": [vars(failed)]})


@pytest.mark.slow
def test_random_weights_of_a_named_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inputs.SIZES, "gpt2", (1, 2, 8))
    folder = model_folder("gpt2", tmp_path)
    hub.check_folder(folder)
    model = engines.get("auto").load(folder)
    assert model.parameter_counts()[0] == 50257 * 8 + 1024 * 8 + 12 * 64 + (4 + 9) * 8 + 2 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "sfd"], "sfd"),
        (["--engines", "cuda"], "mlx-gpu, mlx-cpu, torch-cpu"),
        (["--what", "sft,,lora"], "'sft,,lora'"),
        (["--what", "sft,sft"], "once each"),
        (["--what", ""], "give one or more of grpo, grpo-twice, grpo-lora, kto"),
        (["--engines", ""], "give one or more of mlx-gpu"),
        (["--rows", "12", "--peers"], "no multiple of --batch-size 8"),
        (
            ["--model", "tiny", "--length", "600"],
            "sft takes rows of 600 tokens, and tiny reads 512 at most: give a shorter --length",
        ),
        (["--dtype", "half"], "unknown dtype 'half'"),
        (["--dtype", "float16"], "--dtype float16: sft, kl trains all weights, in float32"),
        (["--dtype", "float16", "--what", "lora", "--peers"], "leave out --peers"),
        (["--what", "reward", "--rows", "9", "--batch-size", "3"], "give an even number"),
        (["--what", "ppo", "--rows", "10", "--batch-size", "5"], "give a number that divides 32"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--output", str(tmp_path / "new" / "bench"), *arguments])
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_prompts_and_answers_must_fit_the_model(tmp_path: Path, random_gpt2: Path) -> None:
    for what in ("generate", "ppo"):
        with pytest.raises(
            UserError, match=f"{what} takes rows of .* reads 64 at most: leave it out of --what"
        ):
            bench._check_context("it", bench.plan.size(random_gpt2), [what], Shape(rows=2, length=16))
    bench._check_context("it", bench.plan.size(random_gpt2), ["sft", "scaling"], Shape(rows=2, length=64))
    with pytest.raises(UserError, match="scaling takes rows of 64 tokens"):
        bench._check_context(
            "it",
            dataclasses.replace(bench.plan.size(random_gpt2), context=63),
            ["scaling"],
            Shape(rows=2, length=64),
        )


def test_it_is_an_error_where_no_engine_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine that fails is a line of the result; all of them are an error, which keeps an old folder."""
    monkeypatch.setattr(bench, "measure_peaks", lambda name: {"gflops": 1.0, "gb_per_s": 1.0})
    monkeypatch.setattr(
        bench,
        "_take_turns",
        lambda specs, units: [bench.Timing(s["engine"], s["what"], error="out of memory") for s in specs],
    )
    monkeypatch.setattr(bench, "_time_scaling", lambda spec, units: {"error": "no room"})
    for what, message in (("sft,lora", "out of memory"), ("scaling", "no room")):
        done = CliRunner().invoke(
            app, ["bench", "--model", "tiny", "--what", what, "--output", str(tmp_path)]
        )
        assert isinstance(done.exception, UserError) and f"no engine finished: {message}" in str(
            done.exception
        )
    assert tmp_path.exists() and not list(tmp_path.iterdir())
    cases = [{**case._asdict(), "seconds": [1.0]} for case in scaling.cases(512)]
    monkeypatch.setattr(bench, "_time_scaling", lambda spec, units: {"cases": cases, "loss": []})
    done = CliRunner().invoke(
        app, ["bench", "--model", "tiny", "--what", "sft,scaling", "--output", str(tmp_path)]
    )
    assert done.exit_code == 0 and "out of memory" in done.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "bench.json",
        "bench.md",
    } and "bench.svg" not in done.output
