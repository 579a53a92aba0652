"""KTO: its loss against NumPy and TRL, whole runs on both engines, resume, class weights, bad rows."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.config import parse
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.data.labelled import LabelledCollator, encode_labelled
from mlx_posttrain.data.types import Labelled, Turn
from mlx_posttrain.engines.base import REFERENCE_LOGPROBS, DeviceBatch
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import report as pages
from mlx_posttrain.methods.kto import KTOSection, Recipe, by_label, class_weights, kto_loss
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests import architectures
from tests.helpers import (
    array,
    gradient,
    indices,
    libraries,
    read_jsonl,
    records,
    resume_run,
    run_recipe,
    same_weights,
    write_jsonl,
)

ENGINES = engines.available()
both = pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")


def rows(count=30):
    """Answers of different lengths; one in three is good."""
    return [
        {
            "prompt": f"Say number {n}.",
            "completion": ("left and right " * (1 + n % 4) if n % 3 == 0 else "no ") + str(n),
            "label": n % 3 == 0,
        }
        for n in range(count)
    ]


@pytest.fixture
def run(random_gpt2, tmp_path):
    """Runs KTO on 26 labelled answers on a random GPT-2 of width 64."""
    source = write_jsonl(tmp_path / "labelled.jsonl", rows())

    def one(output, *more, engine=ENGINES[0], steps=4):
        return run_recipe(
            "09_kto",
            f"model={random_gpt2}",
            f"data.source={source}",
            "data.eval_split=null",
            "data.shuffle=true",
            "data.template=question",
            "data.holdout=4",
            "data.max_length=64",
            "train.batch_size=4",
            "train.grad_accumulation=1",
            f"train.steps={steps}",
            f"train.eval_every={steps}",
            "train.lr=1e-3",
            "sample.count=1",
            "sample.max_tokens=8",
            f"engine={engine}",
            f"output={output}",
            *more,
        )

    return one


def losses(folder):
    return [record["loss"] for record in records(folder) if "loss" in record]


# The loss of a batch


class Given:
    """A model whose log-probabilities are given, for the answers and for the mismatched ones."""

    def __init__(self, own, other):
        self.own, self.other = own, other

    def logprobs(self, batch):
        return self.own if "label" in batch.extra else self.other


def oracle_batch(library, found):
    """TRL's rows of 5 tokens as a batch; tokens that are none have log-probs of 0."""
    of = found["inputs"]
    place = {
        "tokens": array(library, np.zeros((6, 6))),
        "index": indices(library, np.arange(30)),
        "target": indices(library, np.zeros(30)),
        "row": indices(library, np.repeat(np.arange(6), 5)),
        "mask": array(library, np.ones(30)),
        "weight": array(library, np.ones(30)),
    }
    (args,) = [case["args"] for case in found["cases"] if case["name"] == "kto"]
    label = np.array(of["label"], float)
    extra = {
        **{f"mismatched_{name}": values for name, values in place.items()},
        "label": array(library, label),
        "row_weight": array(library, np.where(label > 0, args["dw"], args["uw"])),
        REFERENCE_LOGPROBS: array(library, np.ravel(of["ref"])),
        f"mismatched_{REFERENCE_LOGPROBS}": array(library, np.ravel(of["kl_ref"])),
    }
    return DeviceBatch(**place, total=6.0, extra=extra), KTOSection(beta=args["beta"])


@pytest.mark.parametrize("library", libraries())
def test_value_and_gradient_are_trls(library, shared):
    found = json.loads((shared / "oracle" / "losses.json").read_text())
    (of,) = [case for case in found["cases"] if case["name"] == "kto"]
    batch, section = oracle_batch(library, found)
    other = array(library, np.ravel(found["inputs"]["kl_policy"]))

    def loss(own):
        return kto_loss(section)(Given(own, other), batch)[0]

    policy = np.ravel(found["inputs"]["policy"])
    assert float(loss(array(library, policy))) == pytest.approx(of["loss"], rel=1e-6)
    np.testing.assert_allclose(gradient(library, loss, policy), np.ravel(of["grad"]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("library", [name for name in libraries() if name != "numpy"])
def test_no_gradient_flows_through_the_mismatched_answers(library, shared):
    found = json.loads((shared / "oracle" / "losses.json").read_text())
    batch, section = oracle_batch(library, found)
    policy = array(library, np.ravel(found["inputs"]["policy"]))

    def loss(other):
        own = policy + 0 * other.sum()  # torch needs a path to the loss
        return kto_loss(section)(Given(own, other), batch)[0]

    # Mismatched answers that drifted far: the loss is another, its gradient is 0 all the same.
    other = np.ravel(found["inputs"]["kl_policy"])
    assert abs(float(loss(array(library, other + 3))) - float(loss(array(library, other)))) > 0.01
    assert not gradient(library, loss, other + 3).any()


@pytest.fixture(scope="module")
def items(random_gpt2):
    """Six labelled answers as items for the random GPT-2, weighted by label."""
    made = [Labelled((Turn("user", r["prompt"]),), r["completion"], r["label"]) for r in rows(6)]
    found, _ = encode_labelled(
        made, load_tokenizer(random_gpt2), template="question", max_length=64, seed=3, needed=True
    )
    return [replace(item, weight=1.5 if item.good else 0.75) for item in found]


def worked_out(parts, sums, reference, beta):
    """The loss and kl in plain float64 Python, each micro-batch with its own z."""
    total, kl, count = 0.0, 0.0, sum(map(len, parts))
    for part in parts:

        def ratio(example):
            return sums[example] - float(np.sum(reference[example], dtype=np.float64))

        z = max(0.0, float(np.mean([ratio(item.mismatched) for item in part])))
        for item in part:
            sign = 1 if item.good else -1
            total += item.weight * (1 - 1 / (1 + math.exp(-sign * beta * (ratio(item.answer) - z))))
        kl += z * len(part)
    return total / count, kl / count


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_of_a_real_model_equals_its_formula(engine, items, random_gpt2):
    """Log-probs from whole logits in float64; one batch of six, and micro-batches that each have their z."""
    model = engines.get(engine).load(random_gpt2)
    rng = np.random.default_rng(0)
    sums, reference = {}, {}
    for example in {e for item in items for e in (item.answer, item.mismatched)}:
        logits = model.full_logits(np.array([example.tokens]))[0].astype(np.float64)
        each = [
            logits[t - 1, example.tokens[t]] - np.logaddexp.reduce(logits[t - 1])
            for t in range(1, len(example.tokens))
            if example.trained[t]
        ]
        sums[example] = sum(each)
        reference[example] = (np.array(each) - rng.normal(0.2, 1.0, len(each))).astype(np.float32)
    section = KTOSection(beta=0.3)
    collate, loss = LabelledCollator(64), kto_loss(section)
    expected = []
    for parts in ([items], [items[:4], items[4:]], [items[:3], items[3:]], [items[::-1]]):
        batches = [collate(part, {REFERENCE_LOGPROBS: reference}) for part in parts]
        found = by_label(model.evaluate(loss, batches))
        expected.append(worked_out(parts, sums, reference, 0.3))
        assert (found["loss"], found["kl"]) == pytest.approx(expected[-1], rel=1e-4)
    whole, four, three, backwards = (value for value, _ in expected)
    assert abs(four - whole) > 1e-5 and abs(three - whole) > 1e-5  # each z is of its micro-batch
    assert backwards == pytest.approx(whole, rel=1e-12)
    batches = [collate(order, {REFERENCE_LOGPROBS: reference}) for order in (items, items[::-1])]
    ours, theirs = (model.gradient(loss, [batch]) for batch in batches)
    assert all(np.abs(ours[name] - theirs[name]).max() < 1e-5 for name in ours)
    good = [item for item in items if item.good]
    rewards = [0.3 * (sums[i.answer] - reference[i.answer].sum(dtype=np.float64)) for i in good]
    assert found["rewards/chosen"] == pytest.approx(np.mean(rewards), rel=1e-4)
    assert found["logps/chosen"] == pytest.approx(np.mean([sums[i.answer] for i in good]), rel=1e-5)
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])


def test_metrics_of_one_label_leave_the_other_out():
    sums = {
        "loss": 0.4,
        "share/chosen": 0.5,
        "share/rejected": 0.0,
        "rewards/chosen": 1.0,
        "rewards/rejected": 0.0,
        "logps/chosen": -3.0,
        "logps/rejected": 0.0,
    }
    assert by_label(sums) == {"loss": 0.4, "rewards/chosen": 2.0, "logps/chosen": -6.0}


@pytest.mark.parametrize(
    ("good", "bad", "given", "weights"),
    [
        (100, 100, (None, None), (1, 1)),
        (120, 100, (None, None), (1, 1)),
        (100, 400, (None, None), (4, 1)),  # up to 1 to 1
        (400, 100, (None, None), (1, 3)),  # down to 4 to 3
        (100, 400, (None, 0.5), (2, 0.5)),
        (400, 100, (2.0, None), (2, 6)),
        (100, 400, (1.0, None), (1, 0.25)),
        (100, 400, (1.0, 2.0), (1, 2)),
    ],
)
def test_class_weights(good, bad, given, weights):
    section = KTOSection(desirable_weight=given[0], undesirable_weight=given[1])
    assert class_weights(good, bad, section) == pytest.approx(weights)


# Whole runs


@both
def test_engines_agree_over_ten_updates_from_the_closed_form(tmp_path, run, capsys):
    """At the start every log-ratio is 0, and an answer's loss is half its weight."""
    found = []
    for engine in ENGINES:
        run(tmp_path / engine, engine=engine, steps=10)
        found.append(losses(tmp_path / engine))
        start, *_ = [r for r in records(tmp_path / engine) if "eval/loss" in r]
        told = re.search(
            r"kto: (\d+) good and (\d+) bad.*_weight (\S+), und\S+ (\S+):", capsys.readouterr().err
        )
        good, bad, desirable, undesirable = map(float, told.groups())
        assert good + bad == 26 and desirable == pytest.approx(bad / good, rel=1e-3) and undesirable == 1
        assert abs(start["eval/kl"]) < 1e-4 and abs(start["eval/rewards/margins"]) < 1e-4
        assert 0.5 <= start["eval/loss"] <= desirable / 2
    ours, theirs = map(np.array, found)
    assert len(ours) == 10 and np.ptp(ours) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_run_leaves(engine, tmp_path, run):
    run(tmp_path / "run", engine=engine)
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert all({"kl"} < set(r) and r["kl"] >= 0 for r in steps)
    assert any({"rewards/chosen", "rewards/rejected", "rewards/margins"} < set(r) for r in steps)
    assert not any("share" in name for r in steps for name in r)
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"accuracy", "longer", "over_longer", "auc", "kl", "length", "reference_length"} <= set(found)
    written = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert any("reference_answer" in row for row in written)
    assert pages._run("kto", tmp_path / "run")["texts"]


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_begins_as_one_batch(engine, tmp_path, run):
    """At z = 0 the parts add up to the whole; later each has its own z, and losses stay near."""
    run(tmp_path / "whole", engine=engine)
    run(tmp_path / "parts", "train.batch_size=2", "train.grad_accumulation=2", engine=engine)
    ours, theirs = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    np.testing.assert_allclose(ours, theirs, rtol=0.05)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("more", [(), ("adapter.rank=4", "adapter.dropout=0.1")], ids=["full", "lora"])
def test_resume_reads_the_references_log_probs_and_equals_an_uninterrupted_run(engine, more, tmp_path, run):
    run(tmp_path / "whole", *more, "train.save_every=2", engine=engine)
    run(tmp_path / "cut", *more, "train.save_every=2", engine=engine)
    cut = tmp_path / "cut"
    last = sorted((cut / "checkpoints").glob("step-*"))[-1]
    assert last.name == "step-000004"
    for path in (last, cut / "final"):
        shutil.rmtree(path)
    kept = (cut / "reference.safetensors").read_bytes()
    resume_run(cut)
    assert (cut / "reference.safetensors").read_bytes() == kept
    assert losses(cut)[-2:] == losses(tmp_path / "whole")[-2:]
    assert same_weights(cut, tmp_path / "whole")


def test_peft_loads_the_trained_adapter(tmp_path, random_gpt2, run):
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(tmp_path / "run", "adapter.rank=4", "train.lr=1e-2", "train.select=last")
    base = AutoModelForCausalLM.from_pretrained(random_gpt2)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "run" / "final")).eval()
    ours, bare = (open_model(name)[0] for name in (tmp_path / "run", random_gpt2))
    tokens = np.array([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(logits - ours.full_logits(tokens)).max() < 1e-4
    assert np.abs(logits - bare.full_logits(tokens)).max() > 1e-2


@both
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_other_models_and_columns(kind, tmp_path, random_gpt2, run):
    """A random Qwen2 and a random Llama folder, LoRA on default targets, a CSV with its own column names."""
    case = next(case for case in architectures.CASES if case.kind == kind)
    sized = architectures.Case(kind, case.about, case.settings | {"vocab_size": 400})
    architectures.build(sized, tmp_path / "model")
    copy_tokenizer(random_gpt2, tmp_path / "model")
    lines = [f"Say {n}?,{'It is ' * (1 + n % 3)}{n},{n % 2}" for n in range(24)]
    (tmp_path / "mine.csv").write_text("\n".join(["ask,said,thumb", *lines]) + "\n")
    found = []
    for engine in ENGINES:
        run(
            tmp_path / engine,
            f"model={tmp_path / 'model'}",
            f"data.source={tmp_path / 'mine.csv'}",
            "data.columns={prompt: ask, completion: said, label: thumb}",
            "data.max_length=60",
            "kto.desirable_weight=1",
            "kto.undesirable_weight=1",
            "adapter.rank=4",
            engine=engine,
        )
        found.append(losses(tmp_path / engine))
    assert found[0][0] == pytest.approx(0.5, rel=1e-4) and np.ptp(found[0]) > 1e-4
    np.testing.assert_allclose(*found, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_learns_what_is_good(engine, tmp_path, run):
    """From random weights, three seeds: answers to prompts never seen are told apart by their words."""
    source = write_jsonl(tmp_path / "more.jsonl", rows(90))
    for seed in range(3):
        out = tmp_path / f"kto_{seed}"
        more = [f"data.source={source}", "data.holdout=24", "train.batch_size=8", "train.lr=3e-3"]
        result = run(out, *more, f"seed={seed}", engine=engine, steps=24)
        found = json.loads((out / "report.json").read_text())
        assert found["accuracy"][1] > 0.75, (seed, found["accuracy"])  # the lower bound
        assert found["auc"] > 0.95 and result["kl"] > 0
        first, *_, last = (r for r in records(out) if "eval/loss" in r)
        assert last["eval/rewards/margins"] > first["eval/rewards/margins"] + 0.5


# Bad input


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([{**r, "label": "perhaps"} for r in rows()], "row 1: label must be true or false.*'perhaps'"),
        ([{**r, "label": 2} for r in rows()], "row 1: label must be true or false"),
        ([{**r, "label": None} for r in rows()], "rows with prompt, completion and label"),
        ([{**r, "label": True} for r in rows()], "26 answers to train on are labelled good.*method: sft"),
        ([{**r, "label": 0} for r in rows()], "26 answers to train on are labelled bad"),
        ([{**r, "completion": " "} for r in rows()], "rows with prompt, completion and label"),
        (
            [{**r, "completion": "far " * 100} for r in rows()],
            "no answer left to train on.*26 too long.*raise",
        ),
        ([{**r, "prompt": "Say it."} for r in rows()], "to one prompt.*at least two different prompts"),
        (
            [{"prompt": r["prompt"], "completion": "a"} for r in rows()],
            "rows with prompt, completion and label",
        ),
    ],
    ids=["word", "two", "none", "all good", "all bad", "empty", "long", "one prompt", "no label"],
)
def test_bad_rows_are_refused(made, message, tmp_path, run):
    source = write_jsonl(tmp_path / "bad.jsonl", made)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", f"data.source={source}")
    assert not (tmp_path / "run").exists()


def test_a_row_of_many_is_named(tmp_path, run):
    made = rows()
    made[7]["label"] = "maybe"
    with pytest.raises(UserError, match="row 8: label must be"):
        run(
            tmp_path / "run", f"data.source={write_jsonl(tmp_path / 'bad.jsonl', made)}", "data.shuffle=false"
        )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_of_one_is_refused(batch_size):
    raw = {"method": "kto", "data": {"source": "x.jsonl"}, "train": {"batch_size": batch_size}}
    if batch_size == 1:
        with pytest.raises(UserError, match=r"batch_size=1: KTO compares.*give at least 2"):
            parse(raw, Recipe, "recipe")
    else:
        assert parse(raw, Recipe, "recipe").train.batch_size == 2


def test_steps_of_one_label_are_told(tmp_path, run, capsys):
    """One bad answer in thirty: most steps have none."""
    made = [{**row, "label": n != 3} for n, row in enumerate(rows())]
    run(tmp_path / "run", f"data.source={write_jsonl(tmp_path / 'few.jsonl', made)}", "data.holdout=0.04")
    assert re.search(r"kto: \d of \d+ steps have answers of one label only", capsys.readouterr().err)
    alone = [r for r in records(tmp_path / "run") if "loss" in r and "rewards/rejected" not in r]
    assert alone and all("rewards/chosen" in r and "rewards/margins" not in r for r in alone)


@pytest.mark.parametrize("label", [[True, False], [1, 0], ["true", "False"], [1.0, 0.0], ["1", "0"]])
def test_labels_that_can_be_read(label, tmp_path, run, capsys):
    made = [{**row, "label": label[n % 2]} for n, row in enumerate(rows(8))]
    source = write_jsonl(tmp_path / "labels.jsonl", made)
    run(tmp_path / "run", f"data.source={source}", "data.holdout=0", steps=1)
    assert "labels: good 4, bad 4" in capsys.readouterr().err


def test_pairs_become_two_labelled_answers_each(tmp_path, run, capsys):
    made = [{"prompt": f"Say {n}.", "chosen": f"yes {n}", "rejected": "no"} for n in range(12)]
    run(tmp_path / "run", f"data.source={write_jsonl(tmp_path / 'pairs.jsonl', made)}", steps=1)
    told = capsys.readouterr().err
    assert "12 pairs become 24 labelled answers: chosen ones are good, rejected ones bad" in told
    assert "kto: 10 good and 10 bad answers" in told  # two prompts, both sides of each, are held out
