"""Rows of several scored answers, in the layouts of UltraFeedback and Orca DPO Pairs, to pairs."""

from __future__ import annotations

import pytest

from mlx_posttrain.config import DataSection
from mlx_posttrain.data.formats import TIES, Dropped, parse, parse_rows
from mlx_posttrain.data.ranked import score_gap
from mlx_posttrain.data.read import read_preferences
from mlx_posttrain.data.types import Turn
from mlx_posttrain.errors import UserError
from tests.helpers import write_jsonl

SCORES = (6.0, 8.5, 3.0, 6.0)


def ultrafeedback(scores=SCORES, **more):
    """A row of openbmb/UltraFeedback, with the columns that it has."""
    completions = [
        {
            "annotations": {"helpfulness": {"Rating": "4", "Rationale": "fine"}},
            "custom_system_prompt": "You are helpful.",
            "model": f"model-{i}",
            "principle": "helpfulness",
            "response": f"Answer {i}.",
            "critique": "good",
            "overall_score": score,
            "fine-grained_score": 4.0 - i,
        }
        for i, score in enumerate(scores)
    ]
    row = {
        "source": "evol_instruct",
        "instruction": "Name a bird.",
        "models": [c["model"] for c in completions],
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }
    return {**row, **more}


def sides(found):
    return [(pair.chosen, pair.rejected, score_gap(pair.extra)) for pair in found]


def test_best_against_worst():
    (pair,), dropped = parse_rows([ultrafeedback()])
    assert pair.prompt == (Turn("user", "Name a bird."),) and not dropped
    assert sides([pair]) == [("Answer 1.", "Answer 2.", 5.5)]
    assert parse(ultrafeedback(), "ranked") == pair and pair.extra["source"] == "evol_instruct"


def test_all_pairs_but_ties():
    found, dropped = parse_rows([ultrafeedback()], ranked="all")
    assert sides(found) == [
        ("Answer 1.", "Answer 0.", 2.5),
        ("Answer 1.", "Answer 3.", 2.5),
        ("Answer 1.", "Answer 2.", 5.5),
        ("Answer 0.", "Answer 2.", 3.0),
        ("Answer 3.", "Answer 2.", 3.0),
    ]
    assert dropped == {TIES: 1}


def test_best_against_a_worse_one_by_seed():
    rows = [ultrafeedback(instruction=f"Name bird {n}.") for n in range(3)]
    drawn = {
        seed: [pair.rejected for pair in parse_rows(rows, ranked="best_random", seed=seed)[0]]
        for seed in range(30)
    }
    assert {name for names in drawn.values() for name in names} == {"Answer 0.", "Answer 2.", "Answer 3."}
    again, _ = parse_rows(rows[::-1], ranked="best_random", seed=7)
    assert [pair.rejected for pair in again][::-1] == drawn[7]
    (tied,), _ = parse_rows([ultrafeedback((5, 5, 1))], ranked="best_random")
    assert sides([tied]) == [("Answer 0.", "Answer 2.", 4.0)]


def test_rows_without_a_pair_are_counted():
    rows = [ultrafeedback(), ultrafeedback((5, 5, 5)), ultrafeedback((5,)), ultrafeedback(())]
    found, dropped = parse_rows(rows)
    assert len(found) == 1
    assert dropped == {"all answers have one score": 1, "fewer than two answers with a score": 2}
    found, dropped = parse_rows(rows, ranked="all")
    assert len(found) == 5 and dropped["all answers have one score"] == 1


def test_answers_without_text_or_score_are_left_out():
    (pair,), _ = parse_rows([ultrafeedback((None, 5.0, float("nan"), 2.0))])
    assert sides([pair]) == [("Answer 1.", "Answer 3.", 3.0)]
    row = {"prompt": "Q", "responses": ["", "a", "b", "c"], "scores": [9, 1, 3, 2]}
    assert sides(parse_rows([row])[0]) == [("b", "a", 2.0)]


def test_scores_in_a_column_and_messages():
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completions": [[{"role": "assistant", "content": text}] for text in ("no", "yes")],
        "scores": [0, 1],
    }
    (pair,), _ = parse_rows([row])
    assert (pair.prompt, *sides([pair])[0]) == ((Turn("user", "Hi"),), "yes", "no", 1.0)
    renamed = {"q": "Hi", "answers": ["no", "yes"], "stars": [1, 5]}
    columns = {"prompt": "q", "completions": "answers", "scores": "stars"}
    assert sides(parse_rows([renamed], columns=columns)[0]) == [("yes", "no", 4.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1]}, r"row 1: 2 answers .* and 1 scores"),
        ({"prompt": "Q", "completions": ["a", "b"]}, r"row 1: the answers in 'completions' have no scores"),
        ({"prompt": "Q", "completions": "a", "scores": [1]}, r"row 1: column 'completions' must be a list"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, "x"]}, r"score of answer 2 must be .*'x'"),
        ({"prompt": "Q", "completions": ["a", 7], "scores": [1, 2]}, r"answer 2 .*must be text, found int"),
    ],
)
def test_values_of_the_wrong_type_name_the_row(row, message):
    with pytest.raises(UserError, match=message):
        parse_rows([row])


def test_ultrafeedback_binarised():
    """HuggingFaceH4/ultrafeedback_binarized: message lists that begin with the prompt, and two scores."""
    asked = {"role": "user", "content": "Name a bird."}
    row = {
        "prompt": "Name a bird.",
        "prompt_id": "ab",
        "chosen": [asked, {"role": "assistant", "content": "A wren."}],
        "rejected": [asked, {"role": "assistant", "content": "A cat."}],
        "messages": [asked, {"role": "assistant", "content": "A wren."}],
        "score_chosen": 8.0,
        "score_rejected": 5.5,
    }
    (pair,), _ = parse_rows([row])
    assert pair.prompt == (Turn("user", "Name a bird."),) and sides([pair]) == [("A wren.", "A cat.", 2.5)]
    assert score_gap({"score_chosen": 8.0}) == 0 and score_gap({}) == 0


def test_orca_dpo_pairs():
    """Intel/orca_dpo_pairs: a system prompt, which may be empty, before the question."""
    row = {"system": "Be brief.", "question": "2 + 2?", "chosen": "4", "rejected": "It is five."}
    (pair, plain), _ = parse_rows([row, row | {"system": ""}])
    assert pair.prompt == (Turn("system", "Be brief."), Turn("user", "2 + 2?"))
    assert plain.prompt == (Turn("user", "2 + 2?"),) and (pair.chosen, pair.rejected) == ("4", "It is five.")
    talk = row | {"question": [{"role": "system", "content": "Own."}, {"role": "user", "content": "2?"}]}
    assert parse_rows([talk])[0][0].prompt == (Turn("system", "Own."), Turn("user", "2?"))


def test_reading_tells_what_is_left_out(tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "rows.jsonl", [ultrafeedback(), ultrafeedback((5, 5))]))
    data = DataSection(source=source, ranked="all")
    assert len(read_preferences(data, split="train", limit=None, seed=0)) == 5
    told = capsys.readouterr().err
    assert "1 pairs left out: two answers have one score" in told
    assert "1 rows dropped: all answers have one score" in told and "not used" not in told
    pairs = [{"prompt": "Q", "chosen": "a", "rejected": "b"}]
    data = DataSection(source=str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), ranked="all")
    read_preferences(data, split="train", limit=None, seed=0)
    assert "data.ranked=all is not used" in capsys.readouterr().err


def test_a_row_alone_is_dropped_with_its_reason():
    with pytest.raises(Dropped, match="all answers have one score"):
        parse(ultrafeedback((2, 2)), "ranked")


def test_a_row_without_answers_among_ranked_ones_is_dropped():
    answers = [{"response": "x", "overall_score": 1}, {"response": "y", "overall_score": 2}]
    records, dropped = parse_rows([{}, {"prompt": "a", "completions": answers}])
    assert [(r.chosen, r.rejected) for r in records] == [("y", "x")]
    assert dropped["no list of answers"] == 1


def test_scores_of_a_csv_file_are_text():
    assert score_gap({"score_chosen": "9", "score_rejected": 2}) == 7.0
    assert score_gap({"score_chosen": "", "score_rejected": "2"}) == 0.0
    with pytest.raises(UserError, match="the column 'score_rejected' must be a finite number, found 'low'"):
        score_gap({"score_chosen": 9, "score_rejected": "low"})
    (pair,), _ = parse_rows([{"prompt": "q", "completions": ["a", "b"], "scores": ["1", "2"]}])
    assert sides([pair]) == [("b", "a", 1.0)]


def test_the_pairs_of_one_row_are_bounded():
    row = {"prompt": "q", "completions": [f"a{i}" for i in range(5000)], "scores": list(range(5000))}
    with pytest.raises(
        UserError, match=r"data, row 1: 5,000 answers make 12,497,500 pairs with data\.ranked=all"
    ):
        parse_rows([row], ranked="all")
    assert len(parse_rows([row])[0]) == 1
