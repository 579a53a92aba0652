"""The learning-rate range test: what made-up losses suggest, and whole tests that leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.training import find_lr
from tests.helpers import cli, refused

RATES = np.geomspace(1e-6, 1.0, 61)  # ten steps a decade


def valley(rate: float) -> float:
    """A loss that falls from 5 around a rate of 1e-4, is lowest at 1e-2, and rises beyond."""
    return 5 - 3 / (1 + (1e-4 / rate)) + 40 * max(0.0, np.log10(rate / 1e-2)) ** 2


def test_the_rate_where_the_loss_falls_fastest():
    found = find_lr.range_test(RATES, [valley(r) for r in RATES], [5.0] * 61)
    assert found.steepest == pytest.approx(1e-4, rel=0.3) and found.suggestion == 1e-4
    assert found.start == 5.0 and found.lowest == pytest.approx(1e-2, rel=0.7)
    assert "suggested: train.lr=0.0001." in found.text()


def test_rows_that_are_harder_or_easier_change_nothing():
    """Each step has other rows, whose losses differ by more than a small rate changes anything."""
    starts = 5 + np.random.default_rng(0).normal(0, 1, 61)
    noisy = find_lr.range_test(RATES, [valley(r) + s - 5 for r, s in zip(RATES, starts, strict=True)], starts)
    plain = find_lr.range_test(RATES, [valley(r) for r in RATES], [5.0] * 61)
    assert noisy.changes == pytest.approx(plain.changes) and noisy.suggestion == plain.suggestion


def test_at_most_a_third_of_the_rate_where_the_loss_is_lowest():
    cliff = [5.0 - 0.01 * i if i < 50 else 50.0 for i in range(61)]
    cliff[40:50] = [4.0 - 0.3 * i for i in range(10)]
    found = find_lr.range_test(RATES, cliff, [5.0] * 61)
    assert found.suggestion <= found.lowest / 3 * 1.2


def test_a_loss_that_never_falls_and_a_run_that_ends_early():
    flat = find_lr.range_test(RATES, [5.0] * 61, [5.0] * 61)
    rising = find_lr.range_test(RATES, [5.0 + i for i in range(20)], [5.0] * 61)
    for found in (flat, rising, find_lr.range_test(RATES, [], [5.0] * 61)):
        assert found.suggestion is None and "no rate to suggest" in found.text()
    assert len(rising.rates) == len(rising.changes) == 20


@pytest.mark.parametrize("engine", engines.available())
@pytest.mark.parametrize("recipe", ["01_sft", "09_dpo"])
def test_a_whole_test_leaves_nothing(engine, recipe, random_gpt2, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(f'{{"prompt": "p{i}", "chosen": "a{i} b", "rejected": "c d{i}"}}\n' for i in range(30))
    )
    data = f"data.source={pairs if recipe == '09_dpo' else rows_file}"
    own = [data, "data.eval_split=null", "data.holdout=4", "data.template=question"]
    chosen = methods.load_recipe(
        recipe, [f"model={random_gpt2}", f"engine={engine}", "train.batch_size=4", "data.max_length=32", *own]
    )
    found = find_lr.find_lr(chosen, 1e-6, 1e-1, steps=20)
    assert len(found.rates) > 5 and min(found.changes) < 0
    assert abs(found.changes[0]) < 1e-2  # at the smallest rates nothing has moved
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert chosen.train.steps is None and str(chosen.output).endswith(recipe)  # the recipe is as it was


def test_at_the_terminal(monkeypatch, capfd):
    made = find_lr.range_test(RATES, [valley(r) for r in RATES], [5.0] * 61)
    asked = []
    monkeypatch.setattr(find_lr, "find_lr", lambda recipe: asked.append(recipe) or made)
    assert cli("run", "01_sft", "model=tiny", "--find-lr") == 0
    assert asked[0].model == "tiny" and "suggested: train.lr=0.0001" in capfd.readouterr().out
    assert "or --find-lr" in refused(capfd, "run", "--resume", "x", "--find-lr")


def test_methods_that_have_no_such_loss():
    for recipe, words in (("07_ppo", "learns from rollouts"), ("07_rlhf", "trains nothing")):
        with pytest.raises(UserError, match=words):
            find_lr.find_lr(methods.load_recipe(recipe))
