"""The summary of training rows against counts by hand, and where it is printed."""

from __future__ import annotations

import math

import pytest

from mlx_posttrain.data.summary import check_labels, check_pairs, summarize
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from tests.helpers import cli, write_jsonl


def row(prompt: str, answer: str, **extra: object) -> Conversation:
    return Conversation((Turn("user", prompt), Turn("assistant", answer)), extra=extra)


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference((Turn("user", prompt),), chosen, rejected)


def labelled(prompt: str, answer: str, label: bool) -> Labelled:
    return Labelled((Turn("user", prompt),), answer, label)


def test_lengths_and_tasks_by_hand():
    rows = [row(f"q{i}", " ".join(["word"] * (i + 1)), family="abbb"[i % 4]) for i in range(21)]
    found = summarize(rows)
    assert found.rows == 21
    # 1 to 21 words: ranks 0, 1, 10, 19 and 20
    assert found.words == {"answers": (1, 2, 11, 20, 21)}
    assert found.tasks == {"b": 15, "a": 6} and found.tasks_by == "family"
    assert found.effective_tasks == pytest.approx(
        math.exp(15 / 21 * math.log(21 / 15) + 6 / 21 * math.log(21 / 6))
    )
    assert found.labels == {} and len(found.lines()) == 2
    assert "1 to 21, median 11; 90% have 2 to 20" in found.lines()[0]
    assert found.lines()[1].endswith("2 (effective number 1.8); largest 'b' 71%, 'a' 29%")


def test_tasks_by_column_or_by_the_first_words_of_the_question():
    rows = [row("Name three  animals.", "x"), row("name THREE birds", "x"), row("Why?", "x")]
    found = summarize(rows)
    assert found.tasks == {"name three": 2, "why?": 1} and found.tasks_by == "their first words"
    assert summarize([row("a b", "x", category="c"), row("a b", "x")]).tasks == {"a b": 2}  # not in every row
    assert summarize([row("a b", "x", task="t", category="c")]).tasks == {"c": 1}
    even = summarize([row(f"q{i} is", "x") for i in range(7)])
    assert even.effective_tasks == pytest.approx(7)
    text = summarize([Conversation((Turn("assistant", "Plain text here."),), templated=False)])
    assert text.tasks == {} and text.effective_tasks == 0 and text.words == {"texts": (3, 3, 3, 3, 3)}
    assert len(text.lines()) == 1


def test_doubtful_pairs_are_counted():
    rows = [
        pair("one", "good answer", "bad"),
        pair("one", "Bad", "good  answer"),  # says the opposite of the first
        pair("one", "good answer", "bad"),  # the first again
        pair("two", "Yes.", "yes."),
        pair(" ", "long answer here", "short"),
        pair("three", "good answer", "bad"),  # the answers of the first
        pair("four", "x = -1", "x = 1"),  # differ in a sign
    ]
    found = check_pairs(rows)
    assert found == {
        "pairs": 7,
        "longer chosen": 4,
        "without prompt": 1,
        "equal sides": 1,
        "contradicted": 3,
        "repeated": 1,
        "under several prompts": 4,
    }
    summary = summarize(rows)
    assert summary.labels == found and set(summary.words) == {"chosen answers", "rejected answers"}
    assert "contradicted 3, repeated 1" in summary.lines()[-1]
    sound = check_pairs([pair(str(i), f"good {i}", f"bad {i}") for i in range(5)])
    assert [n for name, n in sound.items() if name != "pairs"] == [0] * 6


def test_doubtful_labels_are_counted():
    rows = [
        labelled("q", "yes", True),
        labelled("q", "Yes ", False),  # both good and bad
        labelled("q", "yes", True),
        labelled("p", "yes", True),
        labelled("", "no", True),
    ]
    found = check_labels(rows)
    assert found == {"good": 4, "bad": 1, "without prompt": 1, "contradicted": 3, "repeated": 1}
    summary = summarize(rows)
    assert summary.labels == found and set(summary.words) == {"answers labelled good", "answers labelled bad"}


@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_a_recipe_prints_the_summary_of_its_training_rows(kind, tmp_path, capfd):
    if kind == "rows":
        recipe, rows = "demo_sft", [{"prompt": f"Say {i}.", "completion": f" {i} it is"} for i in range(12)]
    else:
        recipe = "demo_reward"
        rows = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(11)]
        rows.append({"prompt": "Say 0.", "chosen": "no 0", "rejected": "yes 0"})
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    overrides = [f"data.source={source}", "data.split=train", "data.eval_split=null", "data.holdout=0"]
    overrides += ["model=tiny", "train.steps=1", "data.families=null", f"output={tmp_path / 'run'}"]
    assert cli("run", recipe, *overrides) == 0
    told = capfd.readouterr().err
    if kind == "rows":
        assert "training rows: words of answers: 3 to 3, median 3" in told
        assert "training rows: tasks by their first words: 12 (effective number 12.0)" in told
    else:
        assert "training rows: words of chosen answers: 2 to 2" in told
        assert "training rows: labels: pairs 12, longer chosen 0, without prompt 0, equal sides 0, " in told
        assert "contradicted 2, repeated 0, under several prompts 0" in told
