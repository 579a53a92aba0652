"""Findings on made-up numbers with a known answer, each with both verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.evaluation import analyze, findings
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.evaluation.findings import behaviour, training
from mlx_posttrain.evaluation.findings.behaviour import loop_start
from mlx_posttrain.evaluation.findings.training import half_cosines
from mlx_posttrain.evaluation.likelihood import RowLoss
from mlx_posttrain.evaluation.metrics import sign_flip


@pytest.mark.parametrize(
    "tokens, found",
    [
        ([1, 2, 3, 4, 4, 4, 4], (3, 1)),
        ([9, 1, 2, 1, 2, 1, 2], (1, 2)),
        ([9, 1, 2, 1, 2, 1], None),  # only two and a half times
        ([1, 2, 3, 4, 5, 6], None),
        ([5, 5, 5, 1], None),  # the loop ends before the text
        ([], None),
        ([7, 7, 7], (0, 1)),
        ([1, 2, 3] * 4 + [1], (0, 3)),  # ends within a block
    ],
)
def test_where_a_loop_begins(tokens, found):
    assert loop_start(tokens) == found


def comparison(**models: dict[str, np.ndarray]) -> Comparison:
    made = [
        ModelResult(name, name, {k: Values(v, np.ones(len(v))) for k, v in values.items()})
        for name, values in models.items()
    ]
    return Comparison({}, "question", made, [])


def test_forgetting_is_told_apart_from_chance():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.5, 60)
    worse = findings.forgetting(
        comparison(base={"perplexity": base}, sft={"perplexity": base + 1 + rng.normal(0, 0.1, 60)})
    )
    same = findings.forgetting(
        comparison(base={"perplexity": base}, sft={"perplexity": base + rng.normal(0, 0.1, 60)})
    )
    assert worse.verdict == "yes" and "sft forgot most" in worse.sentence
    assert same.verdict == "no" and "beyond chance" in same.sentence
    few = findings.forgetting(comparison(base={"perplexity": base[:4]}, sft={"perplexity": base[:4] + 2}))
    assert few.verdict == "cannot say" and few.sentence.startswith("4 texts are too few to tell (20 are")
    assert findings.forgetting(comparison(base={"perplexity": base})) is None


def test_forgetting_is_measured_from_the_model_that_each_started_from():
    """The second base is worse than the first from the start, but its run has forgotten nothing."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(3, 0.5, 60), rng.normal(5, 0.5, 60)
    made = comparison(
        base={"perplexity": near},
        other={"perplexity": far},
        a={"perplexity": near + 0.5 + rng.normal(0, 0.1, 60)},
        b={"perplexity": far + rng.normal(0, 0.1, 60)},
    )
    for model, baseline in zip(made.models, (0, 1, 0, 1)):
        model.baseline_index = baseline
    found = findings.forgetting(made)
    assert (
        found.verdict == "yes"
        and found.sentence.startswith("a forgot most")
        and set(found.stats["nats_minus_base"]) == {"a", "b"}
    )
    assert "(other)" in found.sentence


def test_lower_loss_is_worse_only_where_the_rows_show_it():
    rng = np.random.default_rng(1)
    loss, right = rng.normal(2, 0.3, 80), (rng.random(80) < 0.5).astype(float)
    better = np.maximum(right, (rng.random(80) < 0.6).astype(float))
    contrary = findings.loss_and_quality(
        comparison(
            a={"response_loss": loss, "accuracy": better}, b={"response_loss": loss - 0.5, "accuracy": right}
        )
    )
    assert contrary.verdict == "yes" and contrary.stats["disagree"] == [("b", "a")]
    usual = findings.loss_and_quality(
        comparison(
            a={"response_loss": loss - 0.5, "accuracy": better}, b={"response_loss": loss, "accuracy": right}
        )
    )
    assert usual.verdict == "no" and usual.stats["agree"] == 1
    chance = findings.loss_and_quality(
        comparison(
            a={"response_loss": loss, "accuracy": right},
            b={"response_loss": loss + 1e-9 * rng.normal(size=80), "accuracy": right},
        )
    )
    assert chance.verdict == "cannot say"
    few = findings.loss_and_quality(
        comparison(
            a={"response_loss": loss[:19] - 0.5, "accuracy": np.ones(19)},
            b={"response_loss": loss[:19], "accuracy": np.zeros(19)},
        )
    )
    assert few.verdict == "cannot say"


def test_seven_equal_models_hardly_ever_show_a_difference(monkeypatch):
    """Seven models that differ in loss and not in right answers: pairs that disagree do so by chance.

    21 pairs, each at .05 without a correction, would find one in most of the comparisons.
    """
    monkeypatch.setattr(behaviour, "sign_flip", lambda a, b, **more: sign_flip(a, b, **more, flips=2000))
    monkeypatch.setattr(behaviour.charts, "scatter", lambda *_, **__: None)
    rng = np.random.default_rng(8)
    verdicts = []
    for _ in range(40):
        loss = rng.normal(2, 0.3, 60)
        made = comparison(
            **{
                f"m{i}": {"response_loss": loss + 0.1 * i, "accuracy": (rng.random(60) < 0.5).astype(float)}
                for i in range(7)
            }
        )
        verdicts.append(findings.loss_and_quality(made).verdict)
    assert verdicts.count("cannot say") >= 35


def gradients(means: np.ndarray, noise: float, parts: int = 16, seed: int = 0) -> np.ndarray:
    """Inner products [n, P, n, P] of gradients: a template's mean [n, D], a part's effect, and noise."""
    rng = np.random.default_rng(seed)
    n, width = means.shape
    drawn = means[:, None] + noise * (
        rng.normal(size=(1, parts, width)) + 0.5 * rng.normal(size=(n, parts, width))
    )
    return np.einsum("ipd,jqd->ipjq", drawn, drawn)


def directions(cosines: np.ndarray, width: int = 400) -> np.ndarray:
    """Unit vectors [n, D] with these cosines."""
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(width, len(cosines))))[0].T
    return np.linalg.cholesky(cosines) @ basis


NAMES = ["a", "b", "c", "d"]


def alike(other: float) -> np.ndarray:
    return np.full((4, 4), other) + (1 - other) * np.eye(4)


def test_one_pair_that_pulls_against_each_other_is_interference():
    """Five pairs agree and one does not: the mean does not show it."""
    cosines = alike(0.3)
    cosines[0, 2] = cosines[2, 0] = -0.4
    found = findings.interference(NAMES, gradients(directions(cosines), 0.02))
    assert (
        found.verdict == "yes"
        and found.sentence.endswith("pull against each other: a and c.")
        and "-0.3" in found.sentence
    )
    off = ~np.eye(4, dtype=bool)
    assert np.array(found.stats["mean"])[off].mean() > 0.1
    assert found.stats["cosine"]["a and c"].high < 0 < found.stats["cosine"]["a and b"].low


def test_interference_is_judged_against_its_control():
    agree = findings.interference(NAMES, gradients(directions(alike(0.5)), 0.02))
    assert agree.verdict == "no" and "less than the control" in agree.sentence
    same = findings.interference(NAMES, gradients(directions(alike(0.9999)), 0.02))
    assert same.verdict == "no" and "as well as random halves" in same.sentence
    noise = findings.interference(NAMES, gradients(directions(alike(0.5)), 2.0))
    assert noise.verdict == "cannot say" and "cannot say" in noise.sentence
    with pytest.raises(ValueError, match="3 parts"):
        findings.interference(NAMES, gradients(directions(alike(0.5)), 0.02)[:, :3, :, :3])


def test_half_cosines_by_hand():
    parts = np.array([[[1.0, 0.0], [1.0, 2.0]], [[0.0, 3.0], [1.0, 1.0]]])  # [template, part, D]
    products = np.einsum("ipd,jqd->ipjq", parts, parts)
    first = np.array([[1.0, 0.0]])
    found = half_cosines(products, first, 1 - first)
    # a on part 1 with b on part 2, b on part 1 with a on part 2
    across = [1 / np.sqrt(2), 2 / np.sqrt(5)]
    expected = [[1 / np.sqrt(5), np.mean(across)], [np.mean(across), 1 / np.sqrt(2)]]
    assert found == pytest.approx(np.array(expected))
    every_part = np.ones((1, 2))  # both parts on both sides: the cosine of the sums
    assert half_cosines(products, every_part, every_part)[0, 1] == pytest.approx(
        (2 * 1 + 2 * 4) / np.sqrt(8 * 17)
    )


def test_templates_without_conflict_are_hardly_ever_reported(monkeypatch):
    """Orthogonal gradients, six pairs: one analysis in twenty may say yes."""
    monkeypatch.setattr(training.charts, "heatmap", lambda *_, **__: None)
    means = directions(np.eye(4))
    verdicts = [
        findings.interference(NAMES, gradients(means, 0.1, seed=s), seed=s).verdict for s in range(100)
    ]
    assert verdicts.count("yes") <= 10


def looping(**texts: list[list[int]]) -> Comparison:
    return Comparison(
        {}, "question", [ModelResult(name, name, continuations=found) for name, found in texts.items()], []
    )


def test_repetition_and_overfitting():
    loops, text = [[1, 2, 3] + [4] * 9] * 20, [list(range(12))] * 20
    found = findings.repetition(looping(base=text, sft=loops))
    assert found.verdict == "yes" and "sft in 100% (more than before, beyond chance)" in found.sentence
    # none of 20 does not mean never
    assert found.stats["looping"]["base"].high == pytest.approx(0.161, abs=1e-3)
    assert findings.repetition(looping(base=text, sft=text)).verdict == "no"
    # all 5 that did not loop before: p = .06
    full = findings.repetition(looping(base=loops[:15] + text[:5], sft=loops))
    assert full.verdict == "cannot say" and full.sentence.endswith("an increase could not show.")
    sampled = looping(base=loops[:15] + text[:5], sft=loops)
    sampled.models[1].values["seq_rep_4_sampled"] = Values(np.zeros(20))
    assert "repetition of sampled text" in findings.repetition(sampled).sentence
    # all of 6: p = .03
    assert findings.repetition(looping(base=loops[:14] + text[:6], sft=loops)).verdict == "yes"
    # 3 of 20: chance
    assert findings.repetition(looping(base=text, sft=loops[:3] + text[:17])).verdict == "no"
    for number in (4, 9):  # none of them loops before tuning
        few = findings.repetition(looping(base=text[:number], sft=loops[:number]))
        assert few.verdict == "cannot say" and "Nearly all" not in few.sentence
        assert few.sentence.endswith(f"100%. {number} texts are too few to tell (20 are needed).")
    assert findings.repetition(looping(base=[])) is None
    steps = [{"step": s, "nll": 2.0 / s} for s in range(1, 30)]
    rising = [{"step": 10, "eval/nll": 1.0}, {"step": 20, "eval/nll": 0.8}, {"step": 29, "eval/nll": 1.2}]
    falling = [{"step": 10, "eval/nll": 1.0}, {"step": 20, "eval/nll": 0.8}, {"step": 29, "eval/nll": 0.81}]
    found = findings.overfitting({"a": steps + rising})
    assert found.verdict == "yes" and "in a (a threshold" in found.sentence
    assert findings.overfitting({"a": steps + falling}).verdict == "no"
    few = findings.overfitting({"a": steps + falling, "b": steps + rising[:2]})
    assert few.verdict == "cannot say" and "fewer than three times: b" in few.sentence
    assert findings.overfitting({"a": steps}).verdict == "cannot say"
    assert findings.overfitting({"a": []}) is findings.overfitting({}) is None


def test_reward_models_have_their_own_chart_and_gap():
    def run(train: float, held: float, **more: float) -> list[dict[str, float]]:
        return [{"step": s, "nll": train, **more} for s in range(9)] + [
            {"step": s, "eval/nll": held} for s in (3, 6, 9)
        ]

    found = findings.overfitting({"sft": run(1.0, 1.25), "reward": run(0.1, 0.6, margin=1.0)})
    assert "in nats per token: sft, 1.00 on training rows, 1.25" in found.sentence
    assert "in nats per pair: reward, 0.10 on training rows, 0.60" in found.sentence
    drawn = {name: chart.axes[0] for name, chart in found.charts.items()}
    assert {name: axis.get_ylabel() for name, axis in drawn.items()} == {
        "curves": "nats per token",
        "curves_pairs": "nats per pair",
    }
    assert [axis.get_legend_handles_labels()[1] for axis in drawn.values()] == [["sft"], ["reward"]]


def test_an_empty_cache_is_told_apart_from_the_model():
    loops, text, nothing = [[1, 2, 3] + [4] * 9] * 20, [list(range(12))] * 20, [[]] * 20
    found = findings.empty_cache("sft", text, loops)
    assert found.verdict == "yes" and "0% of greedy answers end in a loop, and 100% where" in found.sentence
    assert (
        found.stats["without it"]["seq-rep-4"].mean == pytest.approx(1 - 4 / 9)
        and found.stats["with the cache"]["looping"].mean == 0
    )
    assert findings.empty_cache("sft", loops, loops).verdict == "no"
    assert findings.empty_cache("sft", text[:3], loops[:3]).verdict == "cannot say"
    assert findings.empty_cache("sft", nothing, loops).verdict == "yes"


def test_drift_and_shift():
    found = findings.drift({"a": {"h.0.w": 0.1, "h.1.w": 0.3}, "b": {"h.0.w": 0.01, "h.1.w": 0.02}})
    assert (
        found.verdict == "yes"
        and found.sentence.startswith("a moved")
        and "30.00% in layer 1" in found.sentence
    )
    assert findings.drift({"a": {"h.0.w": 0.0}}).verdict == "no" and findings.drift({}) is None
    assert findings.drift({"a": {"h.0.w": 3e-8}}).verdict == "no"  # rounding
    assert findings.drift({"a": {}}).verdict == "cannot say"
    mixed = findings.drift({"a": {"h.0.w": 0.0}, "q": {}})
    assert mixed.verdict == "cannot say" and "No matrix of q" in mixed.sentence
    tokens = np.full(40, 10)
    plain = RowLoss(np.random.default_rng(0).normal(30, 3, 40), tokens)
    worse = RowLoss(plain.nll + 20, tokens)
    assert findings.data_shift({"a": worse}, {"a": plain}).verdict == "yes"
    assert (
        findings.data_shift({"a": plain}, {"a": plain}).verdict == "no"
        and findings.data_shift({}, {}) is None
    )
    few = RowLoss(worse.nll[:19], tokens[:19])
    assert findings.data_shift({"a": few}, {"a": plain}).verdict == "cannot say"
    assert (
        findings.data_shift({"a": worse}, {"a": RowLoss(plain.nll[:19], tokens[:19])}).verdict == "cannot say"
    )


def test_the_run_whose_rows_are_foreign_is_the_one_that_is_named():
    """``odd`` has the highest perplexity but within chance; ``far`` is foreign beyond chance."""
    rng = np.random.default_rng(0)
    tokens = np.full(60, 10)
    plain = RowLoss(rng.normal(30, 1, 60), tokens)
    odd = RowLoss(np.where(np.arange(60) < 2, 400.0, rng.normal(26, 1, 60)), tokens)
    found = findings.data_shift(
        {"odd": odd, "far": RowLoss(plain.nll + 5, tokens)}, {"odd": plain, "far": plain}
    )
    perplexity = found.stats["perplexity"]
    assert perplexity["odd"].mean > perplexity["far"].mean and found.verdict == "yes"
    assert "the answers that far was trained on" in found.sentence and "So are" not in found.sentence
    # Rows are compared with base text under the same model: 60 nats per row are not foreign to a model that
    # has as many for any text.
    foreign = RowLoss(plain.nll + 30, tokens)
    assert findings.data_shift({"a": foreign}, {"a": RowLoss(plain.nll + 30, tokens)}).verdict == "no"


def test_weight_changes_of_a_model(random_gpt2, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    assert set(analyze.weight_changes(str(random_gpt2), str(random_gpt2)).values()) == {0.0}
    shutil.copytree(random_gpt2, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in weights if n.endswith("h.1.mlp.c_fc.weight"))
    weights[name] = weights[name] * 1.25
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    changed = analyze.weight_changes(str(random_gpt2), str(tmp_path / "m"))
    assert changed.pop(next(n for n in changed if n.endswith("h.1.mlp.c_fc.weight"))) == pytest.approx(
        0.25, rel=1e-5
    )
    assert set(changed.values()) == {0.0}
