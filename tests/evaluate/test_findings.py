"""Findings on made-up numbers whose answer is known, both ways: a finding that cannot be 'no' is no finding."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.evaluate import analyze, findings
from mlx_posttrain.evaluate.findings import loop_start
from mlx_posttrain.evaluate.suite import Comparison, Measured, Values


@pytest.mark.parametrize(
    "tokens, found",
    [
        ([1, 2, 3, 4, 4, 4, 4], (3, 1)),
        ([9, 1, 2, 1, 2, 1, 2], (1, 2)),
        ([9, 1, 2, 1, 2, 1], None),  # two and a half rounds
        ([1, 2, 3, 4, 5, 6], None),
        ([5, 5, 5, 1], None),  # left the loop
        ([], None),
        ([7, 7, 7], (0, 1)),
        ([1, 2, 3] * 4 + [1], (0, 3)),  # ends in mid-block
    ],
)
def test_where_a_loop_begins(tokens, found):
    assert loop_start(tokens) == found


def comparison(**models: dict[str, np.ndarray]) -> Comparison:
    made = [Measured(name, name, {k: Values(v, np.ones(len(v))) for k, v in values.items()}) for name, values in models.items()]
    return Comparison({}, "question", made, [])


def test_forgetting_tells_more_from_chance():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.5, 60)
    worse = findings.forgetting(comparison(base={"perplexity": base}, sft={"perplexity": base + 1 + rng.normal(0, 0.1, 60)}))
    same = findings.forgetting(comparison(base={"perplexity": base}, sft={"perplexity": base + rng.normal(0, 0.1, 60)}))
    assert worse.verdict == "yes" and "sft forgot most" in worse.sentence
    assert same.verdict == "no" and "beyond chance" in same.sentence
    assert findings.forgetting(comparison(base={"perplexity": base})) is None


def test_lower_loss_is_worse_only_where_the_rows_show_it():
    rng = np.random.default_rng(1)
    loss, right = rng.normal(2, 0.3, 80), (rng.random(80) < 0.5).astype(float)
    better = np.maximum(right, (rng.random(80) < 0.6).astype(float))
    contrary = findings.loss_and_quality(comparison(
        a={"response_loss": loss, "accuracy": better}, b={"response_loss": loss - 0.5, "accuracy": right}
    ))  # fmt: skip
    assert contrary.verdict == "yes" and contrary.figures["disagree"] == [("b", "a")]
    usual = findings.loss_and_quality(comparison(
        a={"response_loss": loss - 0.5, "accuracy": better}, b={"response_loss": loss, "accuracy": right}
    ))  # fmt: skip
    assert usual.verdict == "no" and usual.figures["agree"] == 1
    chance = findings.loss_and_quality(comparison(
        a={"response_loss": loss, "accuracy": right}, b={"response_loss": loss + 1e-9 * rng.normal(size=80), "accuracy": right}
    ))  # fmt: skip
    assert chance.verdict == "cannot say"


def test_interference_is_judged_against_its_control():
    names = ["a", "b", "c"]
    rng = np.random.default_rng(0)

    def cosines(same: float, other: float) -> np.ndarray:
        return np.stack([np.full((3, 3), other) + (same - other) * np.eye(3) + rng.normal(0, 0.01, (3, 3)) for _ in range(6)])

    assert findings.interference(names, cosines(0.5, -0.4)).verdict == "yes"
    agree = findings.interference(names, cosines(0.5, 0.2))
    assert agree.verdict == "no" and "less than the control" in agree.sentence
    assert "as well as random halves" in findings.interference(names, cosines(0.5, 0.5)).sentence
    assert findings.interference(names, cosines(0.5, -0.4)[:2]).verdict == "cannot say"


def test_repetition_and_overfitting():
    loops, text = [[1, 2, 3] + [4] * 9] * 20, [list(range(12))] * 20
    assert findings.repetition({"base": text, "sft": loops}).verdict == "yes"
    assert findings.repetition({"base": loops, "sft": loops}).verdict == "no"
    steps = [{"step": s, "nll": 2.0 / s} for s in range(1, 30)]
    rising = [{"step": 10, "eval/nll": 1.0}, {"step": 20, "eval/nll": 0.8}, {"step": 29, "eval/nll": 1.2}]
    assert findings.overfitting({"a": steps + rising}).verdict == "yes"
    assert findings.overfitting({"a": steps + rising[:2]}).verdict == "no"
    assert findings.overfitting({"a": steps}) is None


def test_an_empty_cache_is_told_apart_from_the_model():
    loops, text, nothing = [[1, 2, 3] + [4] * 9] * 20, [list(range(12))] * 20, [[]] * 20
    found = findings.empty_cache("sft", text, loops)
    assert found.verdict == "yes" and "0% of greedy answers end in a loop, and 100% where" in found.sentence
    assert (
        found.figures["without it"]["seq-rep-4"].mean == pytest.approx(1 - 4 / 9) and found.figures["with the cache"]["looping"].mean == 0
    )
    assert findings.empty_cache("sft", loops, loops).verdict == "no"
    assert findings.empty_cache("sft", text[:3], loops[:3]).verdict == "cannot say"
    assert findings.empty_cache("sft", nothing, loops).verdict == "yes"


def test_drift_and_shift():
    found = findings.drift({"a": {"h.0.w": 0.1, "h.1.w": 0.3}, "b": {"h.0.w": 0.01, "h.1.w": 0.02}})
    assert found.verdict == "yes" and found.sentence.startswith("a moved") and "layer 1 the most, 30.00%" in found.sentence
    assert findings.drift({"a": {"h.0.w": 0.0}}).verdict == "no" and findings.drift({"a": {}}) is None
    tokens = np.full(40, 10)
    plain = np.random.default_rng(0).normal(30, 3, 40)
    assert findings.shift({"a": (plain + 20, tokens)}, (plain, tokens)).verdict == "yes"
    assert findings.shift({"a": (plain, tokens)}, (plain, tokens)).verdict == "no"


def test_drift_of_a_model_is_that_of_its_weights(random_gpt2, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    assert set(analyze.drift(str(random_gpt2), str(random_gpt2)).values()) == {0.0}
    shutil.copytree(random_gpt2, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in weights if n.endswith("h.1.mlp.c_fc.weight"))
    weights[name] = weights[name] * 1.25
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    changed = analyze.drift(str(random_gpt2), str(tmp_path / "m"))
    assert changed.pop(next(n for n in changed if n.endswith("h.1.mlp.c_fc.weight"))) == pytest.approx(0.25, rel=1e-5)
    assert set(changed.values()) == {0.0}
