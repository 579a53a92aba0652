"""Reward functions: the user's own file, its faults, and how several are summed."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rl import rewards

FILE = """
import math
def brief(prompts, completions, limit=None, **columns):
    return [None if not c else 1.0 / len(c) for c in completions]
def named(prompts, completions, answer):
    return [float(a == c) for a, c in zip(answer, completions)]
def broken(prompts, completions):
    return [1 / 0 for _ in completions]
def short(prompts, completions):
    return [1.0]
def wrong(prompts, completions):
    return ["high"] * len(completions)
def endless(prompts, completions):
    return [math.inf] * len(completions)
number = 3
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return file


def test_a_function_of_ones_own(path):
    brief = rewards.load(f"{path}:brief")
    scores = rewards.call(brief, ["p"] * 3, ["ab", "", "abcd"], {"answer": [1, 2, 3]}, "brief")
    assert scores[[0, 2]].tolist() == [0.5, 0.25] and np.isnan(scores[1])
    named = rewards.load(f"{path}:named")
    # only the columns it takes are passed
    assert rewards.call(named, ["p"] * 2, ["x", "y"], {"answer": ["x", "z"], "other": [0, 0]}, "named").tolist() == [1.0, 0.0]
    assert rewards.load("math:sqrt")(4) == 2


@pytest.mark.parametrize(
    "spec, said",
    [
        ("{}:breif", "no function 'breif'.*brief"),
        ("{}:number", "is no function"),
        ("{}", "module:function"),
        ("nowhere.py:f", "there is no file"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("checkr", "checker, exact_answer"),
    ],
)
def test_what_cannot_be_loaded(path, spec, said):
    with pytest.raises(UserError, match=said) as error:
        rewards.load(spec.format(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, said", [("broken", "ZeroDivisionError.*line 8"), ("short", "1 scores for 2"), ("wrong", "'high'"), ("endless", "inf")]
)
def test_faults_inside(path, name, said):
    with pytest.raises(UserError, match=said):
        rewards.call(rewards.load(f"{path}:{name}"), ["p"] * 2, ["a", "b"], {}, name)


def test_a_file_that_fails_on_import(tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\nraise KeyError('k')\n")
    with pytest.raises(UserError, match=r"KeyError.*bad\.py, line 2"):
        rewards.load(f"{tmp_path / 'bad.py'}:f")


def test_built_ins():
    from mlx_posttrain.data import tasks

    row = tasks.load("train", limit=1)[0]
    scores = rewards.call(
        rewards.load("checker"), ["p"] * 3, [row["output"], "no", "x"], {"checker": [row["checker"]] * 2 + [None]}, "checker"
    )
    assert scores[:2].tolist() == [1.0, 0.0] and np.isnan(scores[2])
    found = rewards.call(
        rewards.load("exact_answer"),
        ["p"] * 4,
        ["so 1,234.", "3 or 4", "none", "x"],
        {"answer": ["#### 1234", 3, "7", "no number"]},
        "exact",
    )
    assert found[:3].tolist() == [1.0, 0.0, 0.0] and np.isnan(found[3])


def test_sums_and_scales():
    parts = [np.array([1.0, np.nan, np.nan]), np.array([2.0, 3.0, np.nan])]
    total = rewards.combine(parts, [1.0, 0.5])
    assert total[:2].tolist() == [2.0, 1.5] and np.isnan(total[2])
    n = rewards.Normaliser()
    assert n(np.array([5.0])).tolist() == [5.0]
    n.fit(np.array([1.0, 3.0, np.nan]))
    assert n(np.array([1.0, 3.0, 4.0])).tolist() == [-1.0, 1.0, 2.0]
    again = rewards.Normaliser()
    again.restore(n.state())
    assert (again.mean, again.std) == (2.0, 1.0)
    n.fit(np.array([7.0, 7.0]))
    assert n(np.array([8.0])).tolist() == [1.0]
