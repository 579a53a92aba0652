"""Preference optimisation as whole runs: both engines, invariants, resume, the reference, bad settings."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.config import parse
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.data.batches import by_row
from mlx_posttrain.data.pairs import PairCollator
from mlx_posttrain.data.types import Example, Pair, Preference
from mlx_posttrain.engines.base import DeviceBatch
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import report as pages
from mlx_posttrain.evaluation.implicit_reward import displacement, displacement_sentence
from mlx_posttrain.methods.preference import OBJECTIVES, PreferenceSection, pair_loss
from mlx_posttrain.training import setup
from tests import architectures
from tests.helpers import (
    array,
    final_weights,
    indices,
    libraries,
    read_jsonl,
    records,
    refused,
    resume_run,
    run_recipe,
    same_weights,
    write_jsonl,
)

ENGINES = engines.available()
both = pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
FIRST_CLASS = {
    "dpo": {},
    "cdpo": {"loss": "dpo", "label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "ipo": {},
    "ipo by length": {"loss": "ipo", "normalise": "length"},
    "hinge": {},
    "apo_zero": {},
    "apo_down": {},
    "rpo": {"loss": "dpo", "sft_weight": 1.0},
    "ld-dpo": {"loss": "dpo", "ld_alpha": 0.5},
    "simpo": {},
    "orpo": {},
    "cpo": {},
}


@pytest.fixture
def run(random_gpt2, tmp_path):
    """Runs a loss on 28 pairs of answers of different lengths, on a random GPT-2 of width 64."""
    pairs = [
        {
            "prompt": f"Say number {n}.",
            "chosen": "left and right " * (1 + n % 3) + str(n),
            "rejected": f"no {n}",
        }
        for n in range(28)
    ]
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)

    def one(output, name="dpo", *more, engine=ENGINES[0], steps=4):
        keys = {"loss": name, **FIRST_CLASS.get(name, {})}
        return run_recipe(
            "09_dpo",
            f"model={random_gpt2}",
            f"data.source={source}",
            "data.eval_split=null",
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
            *(f"preference.{key}={value}" for key, value in keys.items()),
            *more,
        )

    return one


def losses(folder):
    return [record["loss"] for record in records(folder) if "loss" in record]


AT_START = {
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "robust": math.log(2),
    "ipo": 25.0,
    "ipo by length": 25.0,
    "hinge": 1.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "ld-dpo": math.log(2),
}


@both
@pytest.mark.parametrize("name", FIRST_CLASS)
def test_engines_agree_over_ten_updates_from_the_closed_form(name, tmp_path, run):
    found = []
    for engine in ENGINES:
        run(tmp_path / engine, name, engine=engine, steps=10)
        found.append(losses(tmp_path / engine))
        if name in AT_START:
            assert found[-1][0] == pytest.approx(AT_START[name], rel=2e-4)
    ours, theirs = map(np.array, found)
    assert len(ours) == 10 and np.ptp(ours) > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_have_trls_names_and_begin_at_zero(engine, tmp_path, run):
    run(tmp_path / "run", engine=engine)
    start, *_ = [r for r in records(tmp_path / "run") if "eval/loss" in r]
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(start[f"eval/{name}"]) < 1e-4
    step, *_ = [r for r in records(tmp_path / "run") if "loss" in r]
    assert step["logps/chosen"] < -1 and step["logps/rejected"] < -1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"accuracy", "longer", "bag_of_words", "kl", "length", "reference_length"} <= set(report)
    written = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert any("reference_answer" in row for row in written)
    page = pages.write(tmp_path / "page.html", [str(tmp_path / "run")], ["ours"], None, []).read_text()
    assert f"{report['accuracy'][0]:.1%} [" in page  # the implicit reward beside reward models


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["dpo", "rpo", "orpo"])
def test_accumulation_changes_nothing(engine, name, tmp_path, run):
    run(tmp_path / "whole", name, engine=engine)
    run(tmp_path / "parts", name, "train.batch_size=1", "train.grad_accumulation=4", engine=engine)
    np.testing.assert_allclose(losses(tmp_path / "whole"), losses(tmp_path / "parts"), rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("more", [(), ("adapter.rank=4", "adapter.dropout=0.1")], ids=["full", "lora"])
def test_resume_reads_the_references_log_probs_and_equals_an_uninterrupted_run(engine, more, tmp_path, run):
    run(tmp_path / "whole", "dpo", *more, "train.save_every=2", engine=engine)
    run(tmp_path / "cut", "dpo", *more, "train.save_every=2", engine=engine)
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


@pytest.mark.parametrize("engine", ENGINES)
def test_another_model_as_the_reference(engine, tmp_path, capfd, run):
    run(tmp_path / "start", engine=engine, steps=6)
    run(tmp_path / "ours", "dpo", f"reference={tmp_path / 'start'}", engine=engine, steps=1)
    # The reference prefers the chosen answers already, so the policy begins behind it.
    assert losses(tmp_path / "ours")[0] > math.log(2) + 0.01
    line = refused(
        capfd,
        "run",
        "09_dpo",
        "model=tiny",
        "reference=tiny",
        "preference.loss=simpo",
        f"output={tmp_path}/x",
    )
    assert "has no reference" in line


def test_an_adapter_to_start_from_is_the_reference(tmp_path, run):
    """The policy's own start, adapter on: log-ratios of 0, although the base differs."""
    run(tmp_path / "first", "dpo", "adapter.rank=4", "train.lr=1e-2", steps=6)
    run(tmp_path / "second", "dpo", "adapter.rank=4", f"adapter.path={tmp_path / 'first'}", steps=1)
    assert losses(tmp_path / "second")[0] == pytest.approx(math.log(2), rel=1e-4)
    moved = final_weights(tmp_path / "first")
    assert max(abs(value).max() for value in moved.values()) > 1e-3


def test_a_start_that_differs_from_itself_is_not_trained(tmp_path, monkeypatch, capfd, run):
    monkeypatch.setattr(setup, "START_WITHIN", -1.0)  # as if every difference were too large
    with pytest.raises(UserError, match="differs from itself as the reference"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reference_with_another_vocabulary_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="tiny has another vocabulary than"):
        run(tmp_path / "run", "dpo", "reference=tiny")
    assert not (tmp_path / "run").exists()


def test_margins_come_from_a_column_or_are_refused(tmp_path, run):
    """ODPO: at the start every log-ratio is 0 and the loss is -log sigma(-margin)."""
    with pytest.raises(UserError, match="no row has a column 'margin'"):
        run(tmp_path / "none", "dpo", "preference.margin=true")
    rows = [{"prompt": f"Say {n}.", "chosen": f"yes {n}", "rejected": "no", "gap": 2.0} for n in range(20)]
    source = write_jsonl(tmp_path / "gaps.jsonl", rows)
    more = ["preference.margin=true", f"data.source={source}", "data.columns={margin: gap}"]
    run(tmp_path / "run", "dpo", *more, steps=1)
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(1 + math.exp(2.0)), rel=1e-4)


def test_margins_of_ranked_answers_are_differences_in_score(tmp_path, run):
    """Three answers scored 1, 2 and 4: all pairs, whose mean loss at the start is of margins 1, 2 and 3."""
    rows = [
        {"prompt": f"Say {n}.", "completions": ["no", f"yes {n}", "well"], "scores": [1, 4, 2]}
        for n in range(20)
    ]
    source = write_jsonl(tmp_path / "ranked.jsonl", rows)
    more = [f"data.source={source}", "data.ranked=all", "preference.margin=true", "train.batch_size=6"]
    run(tmp_path / "run", "dpo", *more, steps=1)
    expected = np.mean([math.log(1 + math.exp(gap)) for gap in (1.0, 2.0, 3.0)])
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-4)


@both
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_other_models_and_columns(kind, tmp_path, random_gpt2, run):
    """A random Qwen2 and a random Llama folder, LoRA on default targets, a CSV with its own column names."""
    case = next(case for case in architectures.CASES if case.kind == kind)
    sized = architectures.Case(kind, case.about, case.settings | {"vocab_size": 400})
    architectures.build(sized, tmp_path / "model")
    copy_tokenizer(random_gpt2, tmp_path / "model")
    lines = [f"Say {n}?,It is {n} and no more,no" for n in range(24)]
    (tmp_path / "mine.csv").write_text("\n".join(["ask,better,worse", *lines]) + "\n")
    found = []
    for engine in ENGINES:
        run(
            tmp_path / engine,
            "dpo",
            f"model={tmp_path / 'model'}",
            f"data.source={tmp_path / 'mine.csv'}",
            "data.columns={prompt: ask, chosen: better, rejected: worse}",
            "data.max_length=60",
            "data.holdout=4",
            "adapter.rank=4",
            "train.lr=1e-3",
            engine=engine,
        )
        found.append(losses(tmp_path / engine))
    assert found[0][0] == pytest.approx(math.log(2), rel=1e-4) and np.ptp(found[0]) > 1e-3
    np.testing.assert_allclose(*found, rtol=2e-3, atol=2e-3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_it_learns_what_is_preferred(engine, name, tmp_path):
    """From a model that answers, three seeds: held-out pairs are judged above chance."""
    families = "data.families=[quotes,first_last]"
    run_recipe(
        "demo_sft",
        "data.limit=400",
        families,
        "train.eval_every=100",
        "sample.count=0",
        f"engine={engine}",
        f"output={tmp_path / 'sft'}",
    )
    for seed in range(3):
        out = tmp_path / f"{name}_{seed}"
        result = run_recipe(
            f"09_{name}",
            f"model={tmp_path / 'sft'}",
            "data.source=embedded/preferences",
            "data.eval_split=null",
            families,
            "data.template=question",
            "data.limit=480",
            "data.eval_limit=200",
            "data.max_length=96",
            "train.grad_accumulation=1",
            "train.eval_every=60",
            f"train.lr={5e-4 if name == 'dpo' else 1e-4}",
            "sample.count=0",
            "sample.max_tokens=32",
            f"seed={seed}",
            f"engine={engine}",
            f"output={out}",
        )
        accuracy = json.loads((out / "report.json").read_text())["accuracy"]
        before = next(r for r in records(out) if "eval/rewards/accuracies" in r)["eval/rewards/accuracies"]
        assert accuracy[1] > 0.5, (seed, accuracy)  # the lower bound
        assert name == "dpo" or accuracy[0] > before  # dpo begins with ties
        assert 0 < result["kl"] < 100


# Batches


def pair(chosen, rejected, prompt=0):
    def side(answer):
        return Example((1, 2, *answer), (False, False, *(True,) * len(answer)))

    return Pair(side(chosen), side(rejected), prompt, Preference((), "a", "b"))


def test_weights_beyond_the_common_length():
    """Answers of 3 and 1 tokens: all but the longer one's first weigh alpha; a shared answer stands twice."""
    items = [pair((5, 6, 7), (8,)), pair((5, 6, 7), (8, 9))]
    batch = PairCollator(None, None, score=False, beyond=0.25)(items, {})
    weights = [batch.weight[(batch.row == r) & (batch.mask > 0)].tolist() for r in range(4)]
    assert weights == [[1, 0.25, 0.25], [1, 1, 0.25], [1], [1, 1]]
    assert batch.extra["chosen"].tolist() == [0, 1] and batch.extra["rejected"].tolist() == [2, 3]
    plain = PairCollator(None, None, score=False)(items, {})
    assert len(plain.tokens) == 3 and set(plain.weight.tolist()) == {1.0}


# The loss of a batch


class Fixed:
    """A model whose log-probabilities are given."""

    def __init__(self, logprobs):
        self._logprobs = logprobs

    def logprobs(self, batch):
        return self._logprobs


def worked_out(section, answers, reference, pairs, margins):
    """The mean loss in plain Python, from each answer's token log-probs; answers do not share weights."""
    beta, alpha, e = section.strength, section.ld_alpha, section.label_smoothing
    total = 0.0
    for (w, r), margin in zip(pairs, margins, strict=True):
        common = min(len(answers[w]), len(answers[r]))
        weights = {i: [1 if t < common else alpha for t in range(len(answers[i]))] for i in (w, r)}

        def summed(of, i, weights=weights):
            return sum(a * b for a, b in zip(weights[i], of[i], strict=True))

        logp = {i: summed(answers, i) for i in (w, r)}
        size = {i: sum(weights[i]) for i in (w, r)}
        side = {i: logp[i] - (summed(reference, i) if section.objective.reference else 0) for i in (w, r)}
        if section.normalise == "length" or section.loss in ("simpo", "orpo"):
            side = {i: side[i] / size[i] for i in side}
        h = side[w] - side[r]

        def nls(x):  # -log sigma(x)
            return math.log1p(math.exp(-x))

        odds = (
            {i: math.exp(side[i]) / (1 - math.exp(side[i])) for i in side} if section.loss == "orpo" else {}
        )
        value = {
            "dpo": lambda h=h, m=margin: (1 - e) * nls(beta * h - m) + e * nls(m - beta * h),
            "robust": lambda h=h: ((1 - e) * nls(beta * h) - e * nls(-beta * h)) / (1 - 2 * e),
            "ipo": lambda h=h: (h - 0.5 / beta) ** 2,
            "hinge": lambda h=h, m=margin: max(0.0, 1 + m - beta * h),
            "simpo": lambda h=h: nls(beta * h - section.gamma),
            "cpo": lambda h=h: (1 - e) * nls(beta * h) + e * nls(-beta * h),
            "orpo": lambda o=odds, w=w, r=r: beta * nls(math.log(o[w] / o[r])),
        }[section.loss]()
        total += value - section.imitation * logp[w] / size[w]
    return total / len(pairs)


@pytest.mark.parametrize("library", libraries())
@pytest.mark.parametrize(
    "keys",
    [
        {"loss": "dpo", "label_smoothing": 0.2},
        {"loss": "dpo", "margin": True},
        {"loss": "dpo", "normalise": "length"},
        {"loss": "dpo", "sft_weight": 0.7},
        {"loss": "dpo", "ld_alpha": 0.25},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo", "normalise": "length", "beta": 0.3},
        {"loss": "hinge", "margin": True},
        {"loss": "simpo", "gamma": 1.2},
        {"loss": "orpo"},
        {"loss": "cpo", "label_smoothing": 0.2, "sft_weight": 0.5},
    ],
    ids=str,
)
def test_the_loss_of_a_batch_equals_its_formula(keys, library):
    """Two pairs that share no answer, of 3, 1, 2 and 4 tokens, out of order and with padding."""
    section = parse(keys, PreferenceSection, "preference")
    items = [pair((5, 6, 7), (8,)), pair((9, 4), (8, 9, 3, 2), 1)]
    items = [replace(one, margin=gap) for one, gap in zip(items, (0.5, 1.5), strict=True)]
    batch = PairCollator(None, None, score=False, beyond=section.ld_alpha)(items, {})
    rng = np.random.default_rng(1)
    logprobs, reference = -rng.uniform(0.1, 3, (2, len(batch.mask)))
    chosen, rejected = batch.extra["chosen"], batch.extra["rejected"]
    gaps = (0.5, 1.5) if section.margin else (0.0, 0.0)
    ours, theirs = (by_row(batch, values) for values in (logprobs, reference))
    expected = worked_out(section, ours, theirs, list(zip(chosen, rejected, strict=True)), gaps)
    extra = {
        "chosen": indices(library, chosen),
        "rejected": indices(library, rejected),
        "pair_weight": array(library, batch.extra["pair_weight"]),
        "margin": array(library, batch.extra["margin"]),
        "ref_logprobs": array(library, reference),
    }
    device = DeviceBatch(
        array(library, batch.tokens),
        indices(library, batch.index),
        indices(library, batch.target),
        indices(library, batch.row),
        array(library, batch.mask),
        array(library, batch.weight),
        batch.units,
        extra,
    )
    value, metrics = pair_loss(section)(Fixed(array(library, logprobs)), device)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # rewards are of whole answers, also where the loss is by length; SimPO's and ORPO's are of a token
    weights = by_row(batch, batch.weight)
    whole = [
        sum(w * (x - y * section.objective.reference) for w, x, y in zip(*row, strict=True))
        / (sum(row[0]) if section.loss in ("simpo", "orpo") else 1)
        for row in zip(weights, ours, theirs, strict=True)
    ]
    margins = [
        section.strength * (whole[int(w)] - whole[int(r)]) for w, r in zip(chosen, rejected, strict=True)
    ]
    assert float(metrics["rewards/margins"]) == pytest.approx(np.mean(margins), rel=1e-5)
    assert float(metrics["logps/rejected"]) == pytest.approx(
        np.mean(
            [
                sum(w * x for w, x in zip(weights, ours[i], strict=True))
                for i, weights in ((int(r), by_row(batch, batch.weight)[int(r)]) for r in rejected)
            ]
        ),
        rel=1e-5,
    )


# Settings


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is not part of ipo; it belongs to dpo"),
        ({"loss": "dpo", "gamma": 1.0}, "gamma is not part of dpo; it belongs to simpo"),
        ({"loss": "simpo", "margin": True}, "margin is not part of simpo"),
        ({"loss": "robust"}, "robust without label_smoothing is dpo"),
        ({"beta": 0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "dop"}, "loss"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(keys, message):
    with pytest.raises(Exception, match=message):
        parse(keys, PreferenceSection, "preference")


def test_null_stands_for_the_losses_own_settings():
    assert PreferenceSection().strength == 0.1 and PreferenceSection().imitation == 0
    assert PreferenceSection(loss="simpo").strength == 2 and PreferenceSection(loss="orpo").imitation == 1
    assert set(OBJECTIVES) == set(PreferenceSection.model_fields["loss"].annotation.__args__)


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [(-9.0, -20.0, "displacement"), (2.0, -3.0, "margin by +5.0"), (-9.0, -2.0, "margin by -7.0")],
)
def test_displacement_is_said(chosen, rejected, says):
    names = ("eval/logps/chosen", "eval/logps/rejected")
    start = dict(zip(names, (-30.0, -40.0), strict=True))
    end = dict(zip(names, (-30.0 + chosen, -40.0 + rejected), strict=True))
    moved = displacement([start, {"loss": 1.0}, end])
    assert moved == {"chosen_moved": chosen, "rejected_moved": rejected, "margin_moved": chosen - rejected}
    text = displacement_sentence(moved)
    assert says in text and ("Razin" in text) == (says == "displacement")
    assert displacement([start]) == {}
