"""Reward functions: the user's own file, its faults, and how several are summed."""

from __future__ import annotations

import builtins
import itertools
import sys

import numpy as np
import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import functions, stock
from mlx_posttrain.rewards.scorer import RewardEntry

FILE = """
import json, math
import numpy as np
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
def huge(prompts, completions):
    return [10**400] * len(completions)
def text(prompts, completions):
    return ["1"] * len(completions)
def letters(prompts, completions):
    return "12"
def nothing(prompts, completions):
    pass
def deep(prompts, completions):
    return [json.loads("no JSON") for _ in completions]
def one(prompts):
    return [1.0]
def trl(completions, **columns):
    return [float(len(c)) for c in completions]
def scaled(prompts, completions, factor, of="c"):
    return [factor * len({"p": p, "c": c}[of]) for p, c in zip(prompts, completions)]
def takes_all(completions, **settings):
    return [float(settings["factor"])] * len(completions)
def counted(prompts, completions):
    return (x for x in (True, np.float32(0.5)))
number = 3
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return file


def test_a_function_of_ones_own(path):
    brief = functions.load(f"{path}:brief")
    scores = functions.call(brief, ["p"] * 3, ["ab", "", "abcd"], {"answer": [1, 2, 3]}, "brief")
    assert scores[[0, 2]].tolist() == [0.5, 0.25] and np.isnan(scores[1])
    named = functions.load(f"{path}:named")
    # only the columns it takes are passed
    assert functions.call(
        named, ["p"] * 2, ["x", "y"], {"answer": ["x", "z"], "other": [0, 0]}, "named"
    ).tolist() == [1.0, 0.0]
    assert functions.load("math:sqrt")(4) == 2
    assert functions.call(
        functions.load(f"{path}:trl"), ["p"] * 2, ["x", "yy"], {"answer": [1, 2]}, "trl"
    ).tolist() == [1.0, 2.0]
    assert functions.call(
        functions.load(f"{path}:counted"), ["p"] * 2, ["x", "y"], {}, "counted"
    ).tolist() == [1.0, 0.5]
    assert functions.call(
        lambda p, c: [len(p[0]), len(c[1])], ["abc"] * 2, ["x", "yy"], {"p": [0, 0]}, "lambda"
    ).tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    "spec, said",
    [
        ("{}:breif", "no function 'breif'.*brief"),
        ("{}:number", "is no function"),
        ("{}", "module:function"),
        ("nowhere.py:f", "there is no file"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("checkr", r"one of checker, countdown, .*, similarity; did you mean 'checker'\?"),
    ],
)
def test_what_cannot_be_loaded(path, spec, said):
    with pytest.raises(UserError, match=said) as error:
        functions.load(spec.format(path))
    assert "\n" not in str(error.value)


def test_arguments_of_a_recipe(path):
    def scores(name, args, **columns):
        bound = functions.bind(functions.load(f"{path}:{name}"), args, name)
        return functions.call(bound, ["abc"] * 2, ["x", "yy"], columns, name).tolist()

    assert scores("scaled", {"factor": 2}) == [2, 4]
    assert scores("scaled", {"factor": 2, "of": "p"}) == [6, 6]
    # before a column of its name
    assert scores("scaled", {"factor": 2, "of": "c"}, factor=[7, 7], of=["p", "p"], other=[1, 1]) == [2, 4]
    assert scores("takes_all", {"factor": 3}, factor=[7, 7]) == [3, 3]
    with pytest.raises(UserError, match="scaled: it needs the column 'factor'"):
        scores("scaled", {})
    for name, args, said in (
        (
            "scaled",
            {"facto": 2},
            r"scaled: it takes no argument 'facto'; did you mean 'factor'\? \(there are factor, of\)",
        ),
        ("scaled", {"factor": 2, "prompts": 2}, "takes no argument 'prompts'"),
        ("takes_all", {"completions": 2}, r"takes no argument 'completions' \(there are none\)"),
        ("takes_all", {"completion_ids": 2}, "takes no argument 'completion_ids'"),
    ):
        with pytest.raises(UserError, match=said):
            scores(name, args)
    with pytest.raises(UserError, match=r"scaled: TypeError.*\(mine\.py, line 31\)"):
        scores("scaled", {"factor": None})


def test_a_file_is_named_before_it_is_run_once(tmp_path, monkeypatch, capfd):
    (tmp_path / "told.py").write_text(
        "import sys\nprint('running', file=sys.stderr)\ndef f(p, c): pass\ng = f\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    functions.load("told.py:f")
    assert capfd.readouterr().err.splitlines() == [f"reward: {tmp_path}/told.py:f will be run", "running"]
    functions.load(f"{tmp_path}/told.py:f")
    assert "reward" not in capfd.readouterr().err
    functions.load("told.py:g")
    functions.load("told:f")  # as a module it is the same file
    functions.load("checker")
    functions.load(functions.register(lambda completions: []))
    said = [line for line in capfd.readouterr().err.splitlines() if "reward" in line]
    assert said == [f"reward: {tmp_path}/told.py:g will be run"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("broken", r"ZeroDivisionError.*mine\.py, line 9"),
        ("short", "1 scores for 2"),
        ("wrong", "a number or None, found 'high'"),
        ("endless", "answer 1 is inf"),
        ("huge", r"answer 1 must be a number or None, found 10{50,60}$"),
        ("text", "a number or None, found '1'"),
        ("letters", "must return a list .* found str"),
        ("nothing", "must return a list .* found NoneType"),
        ("deep", r"JSONDecodeError.*\(mine\.py, line 25\)"),  # the user's line, not the library's
        ("one", r"TypeError: one\(\) takes 1 positional argument but 2 were given$"),
        (
            "named",
            r"needs the column 'answer', which the rows do not have; did you mean 'answers'\? \(there "
            r"are answers\)",
        ),
    ],
)
def test_faults_inside(path, name, said):
    with pytest.raises(UserError, match=said):
        functions.call(functions.load(f"{path}:{name}"), ["p"] * 2, ["a", "b"], {"answers": [1, 2]}, name)


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


class Weightless:
    def __float__(self):
        raise RuntimeError("no\nnumber")

    def __repr__(self):
        raise SystemExit


def raises(error):
    def reward(prompts, completions):
        raise error

    return reward


@pytest.mark.parametrize(
    "function, said",
    [
        (raises(SystemExit(0)), r"SystemExit: 0 \(test_functions\.py, line \d+\)"),
        (raises(GeneratorExit("g")), r"GeneratorExit: g \("),
        (raises(Unspeakable()), r"Unspeakable: a Unspeakable that cannot be shown \("),
        (
            lambda p, c: [Weightless()] * 2,
            "the score of answer 1 must be a number or None, found a Weightless that",
        ),
        (lambda p, c: [1.0, b"2"], "the score of answer 2 must be a number or None, found b'2'"),
        (lambda p, c: itertools.repeat(1.0), "3 scores for 2 answers"),
        (lambda p, c: [1e6, -1e308], r"the score of answer 2 is -1e\+308, beyond 1e\+06"),
    ],
)
def test_what_would_end_the_run_without_a_word(function, said):
    with pytest.raises(UserError, match=rf"^reward function mine: {said}.*$"):
        functions.call(function, ["p"] * 2, ["a", "b"], {}, "mine")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has groups of exceptions")
def test_a_group_of_interrupts_is_the_functions_own():
    with pytest.raises(UserError, match=r"^reward function mine: BaseExceptionGroup: two \("):
        functions.call(raises(builtins.BaseExceptionGroup("two", [KeyboardInterrupt()])), [], [], {}, "mine")
    with pytest.raises(KeyboardInterrupt):
        functions.call(raises(KeyboardInterrupt()), [], [], {}, "mine")


def test_a_function_that_empties_its_answers():
    def reward(prompts, completions):
        completions.clear()
        return [1.0, 2.0]

    assert functions.call(reward, ["p"] * 2, ["a", "b"], {}, "mine").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("key, value", [("timeout", 1e300), ("timeout", 86_401), ("weight", -1e300)])
def test_an_entry_is_bounded(key, value):
    with pytest.raises(ValueError, match=f"{key}\n.*(less|greater) than or equal to"):
        RewardEntry(function="format", **{key: value})
    assert RewardEntry(function="format", timeout=86_400).limit == 86_400


def test_a_function_whose_arguments_cannot_be_read():
    with pytest.raises(UserError, match="reward function max: its arguments cannot be read"):
        functions.call(max, ["p"], ["a"], {}, "max")


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1\nraise KeyError('k')\n", r"KeyError: 'k' \(bad\.py, line 2\)$"),
        ("x = 1\ny = (\n", r"SyntaxError: .*\(bad\.py, line 2\)$"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(bad\.py, line 2\)$"),
        ("import json\njson.loads('x')\n", r"JSONDecodeError.*\(bad\.py, line 2\)$"),
        ("import no_such_module\n", r"ModuleNotFoundError.*\(bad\.py, line 1\)$"),
    ],
)
def test_a_file_that_fails_on_import(tmp_path, monkeypatch, text, said):
    (tmp_path / "bad.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in ("bad.py", f"{tmp_path / 'bad.py'}"):
        with pytest.raises(UserError, match=said):
            functions.load(f"{path}:f")


@pytest.mark.parametrize(
    "text, number",
    [
        ("about 7-8", 8.0),
        ("it is -5.", -5.0),
        ("1,234.50 in all", 1234.5),
        ("one of 12,34", 34.0),
        ("none", None),
    ],
)
def test_the_last_number(text, number):
    found = functions.call(
        stock.exact_answer, ["p"], [text], {"answer": [number if number is not None else 1]}, "exact_answer"
    )
    assert found.tolist() == [float(number is not None)]


def test_built_ins():
    from mlx_posttrain.data import tasks

    row = tasks.load("train", limit=1)[0]
    scores = functions.call(
        functions.load("checker"),
        ["p"] * 3,
        [row["output"], "no", "x"],
        {"checker": [row["checker"]] * 2 + [None]},
        "checker",
    )
    assert scores[:2].tolist() == [1.0, 0.0] and np.isnan(scores[2])
    found = functions.call(
        functions.load("exact_answer"),
        ["p"] * 4,
        ["so 1,234.", "3 or 4", "none", "x"],
        {"answer": ["#### 1234", 3, "7", None]},
        "exact",
    )
    assert found[:3].tolist() == [1.0, 0.0, 0.0] and np.isnan(found[3])


@pytest.mark.parametrize(
    "text, answer, score",
    [
        ("<think>it is 18", "18", 0.0),  # a thought that is never closed has no answer
        ("<think>18</think>", "18", 0.0),
        (r"\boxed{18} since 9 * 2 is that", "18", 1.0),
        ("<answer>Paris</answer>", "Paris", 1.0),
        ("London", "Paris", 0.0),
    ],
)
def test_exact_answer_judges_the_final_answer(text, answer, score):
    assert stock.exact_answer(["p"], [text], answer=[answer]) == [score]


def test_sums_and_scales():
    parts = [np.array([1.0, np.nan, np.nan]), np.array([2.0, 3.0, np.nan])]
    total = functions.combine(parts, [1.0, 0.5])
    assert total[:2].tolist() == [2.0, 1.5] and np.isnan(total[2])
    n = functions.Normaliser()
    assert n(np.array([5.0])).tolist() == [5.0]
    n.fit(np.array([1.0, 3.0, np.nan]))
    assert n(np.array([1.0, 3.0, 4.0])).tolist() == [-1.0, 1.0, 2.0]
    again = functions.Normaliser()
    again.restore(n.state())
    assert (again.mean, again.std) == (2.0, 1.0)
    n.fit(np.array([7.0, 7.0]))
    assert n(np.array([8.0])).tolist() == [1.0]
    n.fit(np.full(3, 0.1))  # whose standard deviation is 1.4e-17, as their mean is rounded
    assert n.std == 1.0
    n.fit(np.array([-4.0]))
    assert (n.mean, n.std) == (-4.0, 1.0)
    n.fit(np.full(2, np.nan))  # nothing to learn from
    assert (n.mean, n.std) == (-4.0, 1.0)
