"""Best of n: the choice by hand, its KL against an enumeration, and a model's answers beside the runs'."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines.base import initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import best_of, report, suite
from mlx_posttrain.evaluation.best_of import BestOf, kl_bound
from mlx_posttrain.evaluation.completions import Answer
from mlx_posttrain.evaluation.prompting import PromptSettings
from mlx_posttrain.evaluation.suite import SuiteSection
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import pad_id

ENGINE = engines.available()[0]


def question(text: str) -> Conversation:
    return Conversation((Turn("user", text), Turn("assistant", "yes")), True, {"held_out": "content"})


def test_the_highest_score_is_chosen_and_what_cannot_be_scored_is_not(monkeypatch):
    """Two questions with three answers each; of the second one answer alone has a score."""
    drawn = [Answer(text, [1] * n, n < 3) for n, text in enumerate("abcdef", 1)]
    scores = np.array([0.0, -5.0, 2.0, np.nan, -np.inf, -9.0])
    asked = {}
    monkeypatch.setattr(best_of, "open_model", lambda *a, **k: None)
    monkeypatch.setattr(best_of.completions, "generate_answers", lambda *a, **k: asked.update(k) or drawn)
    monkeypatch.setattr(best_of, "score_answers", lambda model, rows, texts, template: (scores, scores))
    settings = PromptSettings("none", None, 8)
    [one] = best_of.measure(
        "best", BestOf(reward="r", samples=3, seeds=[7]), "m", None, None, [question("p"), question("q")],
        settings, ENGINE,
    )  # fmt: skip
    assert one.answers == ["c", "f"] and one.name == "best seed=7"
    assert one.values["length"].rows.tolist() == [3, 6] and one.values["ended"].rows.tolist() == [0, 0]
    assert (asked["temperature"], asked["samples"], asked["seed"]) == (1.0, 3, 7) and "top_p" not in asked


def test_its_kl_is_that_of_the_formula_where_no_answer_comes_twice():
    """n draws from m answers of equal chance with distinct scores: KL by enumeration, m^n cases."""
    m, n = 12, 3
    counts = np.bincount([max(case) for case in itertools.product(range(m), repeat=n)], minlength=m)
    best = counts / counts.sum()
    kl = float(np.sum(best * np.log(best * m)))
    assert kl < kl_bound(n) == pytest.approx(math.log(3) - 2 / 3)
    # best of n takes rank i with chance (i^n - (i - 1)^n) / m^n: finer ranks come to the bound
    i = np.arange(1, 20_001, dtype=np.float64)
    fine = (i**n - (i - 1) ** n) / 20_000.0**n
    assert float(np.sum(fine * np.log(fine * 20_000))) == pytest.approx(kl_bound(n), abs=1e-3)


@pytest.mark.parametrize("engine", engines.available())
def test_it_stands_beside_the_models_with_a_higher_score_and_its_kl(engine, tmp_path):
    """The reward that chooses is the judge too, so its choice must beat single answers of every seed."""
    reward, tokenizer, _ = open_model("tiny", engine)
    reward.add_head(initial_head(reward.config["n_embd"], 0))
    reward.save_classifier(tmp_path / "reward", pad_id(reward.config, tokenizer))
    judge = str(tmp_path / "reward")
    asked = SuiteSection(rows="embedded/tasks", limit=24, phrasings=False, max_tokens=8, template="question",
                         texts=None, samples=0, reward=judge)  # fmt: skip
    found = suite.compare(
        ["tiny"], asked, engine, ["base"],
        chosen={"one": BestOf(reward=judge, samples=2), "best": BestOf(reward=judge, seeds=[0, 1])},
    )  # fmt: skip
    assert [m.name for m in found.models] == ["base", "one seed=0", "best seed=0", "best seed=1"]
    two, eight, other = (m.values["score"].rows for m in found.models[1:])
    assert eight.mean() > two.mean() and other.mean() > two.mean() and (eight != other).any()
    assert [len(m.values["accuracy"].rows) for m in found.models] == [24] * 4
    assert found.models[3].answer_kl == pytest.approx(math.log(8) - 7 / 8)
    [figure] = report.score_at_kl([], found).values()
    assert {line.get_label() for line in figure.axes[0].lines} == {"one", "best"}


def test_its_names_count_in_gains_and_may_not_be_a_runs():
    raw = {"method": "report", "runs": {"dpo seed=0": "a", "dpo seed=1": "b"},
           "best_of": {"best": {"reward": "r", "seeds": [0, 1]}},
           "gains": {"Is DPO worth more than a choice of eight?": {"pairs": [["dpo", "best"]]}}}  # fmt: skip
    assert methods.parse_recipe(raw, "r").best_of["best"].samples == 8
    raw["gains"] = {"x": {"pairs": [["dpo", "worst"]]}}
    with pytest.raises(UserError, match=r"names 'worst'.*best seed=1"):
        methods.parse_recipe(raw, "r")
    raw["gains"], raw["best_of"] = {}, {"dpo": {"reward": "r"}}
    with pytest.raises(UserError, match="a run is already called 'dpo seed=0'"):
        methods.parse_recipe(raw, "r")
