"""A teacher's answers, chosen by rule and by reward model, their provenance, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_posttrain import config, engines, methods
from mlx_posttrain.data import sources
from mlx_posttrain.engines.base import Generated, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation import synthesize, teachers
from mlx_posttrain.generation.synthesize import Settings, read_questions
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import locate
from mlx_posttrain.models.tokenizer import load_tokenizer, pad_id
from mlx_posttrain.rewards import verify

ENGINE = engines.available()[0]
SETTINGS = Settings(samples=4, max_tokens=12, keep=2, near=None)
SEPARATORS = "\u0085\u2028\u2029"  # where str.splitlines splits and a JSON line does not end


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions with rules that some of a random model's answers follow and some do not."""
    path = tmp_path_factory.mktemp("q") / "questions.jsonl"
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    path.write_text(
        "".join(
            json.dumps({"prompt": f"Write about {w}.", **rule}) + "\n"
            for w in ("cats", "dogs", "kings", "hills", "moons")
        )
    )
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make(output: Path, questions: Path, settings: Settings = SETTINGS, **more) -> dict[str, int]:
    return synthesize.synthesize("tiny", str(questions), output, settings, engine=ENGINE, **more)


def test_only_what_the_rule_accepts_is_kept(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "stop_ids", _early_stop)
    counts = make(tmp_path / "out.jsonl", questions)
    written = rows(tmp_path / "out.jsonl")
    assert written and counts["written"] == len(written) == counts["kept"]
    assert counts["kept"] + counts["wrong"] + counts["not ended"] + counts["not needed"] == 5 * 4
    assert counts["wrong"] or counts["not ended"]
    for row in written:
        assert verify.verify(row, row["response"]) and "," not in row["response"]
        assert row["provenance"]["teacher"] == "tiny" and len(row["provenance"]["weights"]) == 16
    assert max(sum(r["provenance"]["question"] == q for r in written) for q in range(5)) <= 2
    assert sources.load_rows(str(tmp_path / "out.jsonl"))  # a data set for the next recipe


def _early_stop(tokenizer) -> tuple[int, ...]:
    return (tokenizer.encode(" the")[0],)  # the commonest token of a random text, so some answers end


def test_an_interrupted_command_continues_to_the_same_file(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "stop_ids", _early_stop)
    monkeypatch.setattr(teachers, "CHUNK", 2)
    make(tmp_path / "whole.jsonl", questions)
    calls = []
    append = synthesize._append

    def cut(output, written, state):
        if calls:
            with output.open("a") as f:  # killed in the middle of the second chunk
                f.write(
                    json.dumps(written[0] if written else {"provenance": {"question": 2}})
                    + "\n"
                    + '{"question": '
                    '"hal'
                )
            raise KeyboardInterrupt
        calls.append(1)
        append(output, written, state)

    monkeypatch.setattr(synthesize, "_append", cut)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut.jsonl", questions)
    monkeypatch.setattr(synthesize, "_append", append)
    make(tmp_path / "cut.jsonl", questions)
    assert rows(tmp_path / "cut.jsonl") == rows(tmp_path / "whole.jsonl")
    with pytest.raises(UserError, match="other settings \\(temperature\\)"):
        make(
            tmp_path / "cut.jsonl",
            questions,
            Settings(samples=4, max_tokens=12, keep=2, near=None, temperature=1.5),
        )


def test_a_deleted_output_is_written_again_and_long_questions_are_left_out(tmp_path, monkeypatch, questions):
    monkeypatch.setattr(teachers, "stop_ids", _early_stop)
    path = tmp_path / "q.jsonl"
    long = json.dumps(
        {"prompt": "word " * 600, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    )
    path.write_text(long + "\n" + questions.read_text())
    counts = make(tmp_path / "out.jsonl", path)
    first = rows(tmp_path / "out.jsonl")
    assert (
        counts["questions beyond the context"] == 1
        and first
        and all(r["provenance"]["question"] > 0 for r in first)
    )
    (tmp_path / "out.jsonl").unlink()
    make(tmp_path / "out.jsonl", path)
    assert rows(tmp_path / "out.jsonl") == first
    with pytest.raises(UserError, match="other settings"):
        make(tmp_path / "out.jsonl", questions)
    (tmp_path / "out.jsonl.state.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        make(tmp_path / "out.jsonl", path)


def test_a_reward_model_chooses_the_best(questions, tmp_path, random_gpt2, monkeypatch):
    monkeypatch.setattr(teachers, "stop_ids", _early_stop)
    judge, tokenizer, _ = open_model("tiny", ENGINE)
    judge.add_head(initial_head(judge.config["n_embd"], 0))
    judge.save_classifier(tmp_path / "judge", pad_id(judge.config, tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "judge" / name).is_file()
    make(
        tmp_path / "all.jsonl",
        questions,
        Settings(samples=6, max_tokens=12, keep=6, near=None, reward=str(tmp_path / "judge")),
    )
    make(
        tmp_path / "best.jsonl",
        questions,
        Settings(samples=6, max_tokens=12, keep=1, near=None, reward=str(tmp_path / "judge")),
    )
    everything, best = rows(tmp_path / "all.jsonl"), rows(tmp_path / "best.jsonl")
    for row in best:
        scores = [r["provenance"]["score"] for r in everything if r["question"] == row["question"]]
        assert row["provenance"]["score"] == pytest.approx(max(scores), rel=1e-5)
        assert row["provenance"]["chosen_by"] == str(tmp_path / "judge")


def test_near_duplicates_and_order(monkeypatch):
    texts = ["a b c d e f g h i", "a b c d e f g h i", "q r s t u v w x y", "z"]
    rejections = [None, None, None, "wrong"]
    chosen = synthesize._choose(texts, rejections, None, Settings(keep=5, near=0.7))
    assert chosen == [0, 2] and rejections == [None, "near duplicate", None, "wrong"]
    import numpy as np

    assert synthesize._choose(
        texts[:3], [None, None, None], np.array([0.0, 1.0, 2.0]), Settings(keep=1, near=None)
    ) == [2]


def test_a_question_asked_twice_gets_no_second_copy(tmp_path, monkeypatch):
    """Neither does it after an interruption between the two."""
    path, out = tmp_path / "twice.jsonl", tmp_path / "out.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": q, "answer": "5"}) + "\n"
            for q in ("2 + 3?", "4 + 1?", "2 + 3?", "2 + 3?")
        )
    )
    answers = iter(
        [
            ["the sum is 5", "5"],
            ["5", "the sum is 5"],
            ["the sum is 5", "we get 5"],
            ["we get 5", "The sum is 5"],
        ]
    )

    def candidates(model, prompts, **settings):
        tokenizer = load_tokenizer(locate("tiny").folder)
        return [Generated(tokenizer.encode(text), [], True) for text in next(answers)]

    monkeypatch.setattr(teachers, "CHUNK", 1)
    monkeypatch.setattr(teachers.decoding, "in_batches", candidates)
    append = synthesize._append

    def cut_off(*given):
        append(*given)
        if len(rows(out)) == 4:
            monkeypatch.setattr(synthesize, "_append", append)
            raise KeyboardInterrupt

    monkeypatch.setattr(synthesize, "_append", cut_off)
    settings = Settings(samples=2, max_tokens=12, keep=2)
    with pytest.raises(KeyboardInterrupt):
        make(out, path, settings)
    make(out, path, settings)
    assert [r["response"] for r in rows(out)] == ["the sum is 5", "5", "5", "the sum is 5", "we get 5"]


def test_questions_that_cannot_be_judged(tmp_path, questions):
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"prompt": "Tell me a story."}) + "\n")
    with pytest.raises(UserError, match="--reward"):
        make(tmp_path / "out.jsonl", path)
    path.write_text(json.dumps({"prompt": "Tell me a story.", "answer": "word " * 9}) + "\n")
    with pytest.raises(UserError, match="1 of 1 questions cannot be judged, because their answers are long"):
        make(tmp_path / "out.jsonl", path)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "Tell me a joke."}) + "\n")
    with pytest.raises(UserError, match=r"1 of 2 questions .* compares, and no rule judges the others; give"):
        make(tmp_path / "out.jsonl", path)
    (tmp_path / "used.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="exists"):
        make(tmp_path / "used.jsonl", questions)
    path.write_text(json.dumps({"text": "no question"}) + "\n")
    with pytest.raises(UserError, match="ask no question"):
        make(tmp_path / "out.jsonl", path)


def test_questions_under_other_names(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"ask": "2 + 3?", "reply": "5"}) + "\n")
    with pytest.raises(UserError, match=r"rename with --columns='\{question: ask, answer: reply\}'"):
        list(read_questions(str(path), "auto", None, 0))
    columns = config.columns("{question: ask, answer: reply}")
    (row,) = read_questions(str(path), "auto", None, 0, columns)
    assert [turn.content for turn in row.turns] == ["2 + 3?", "5"]
    with pytest.raises(UserError, match="--columns ask: write"):
        config.columns("ask")


def test_thoughts_train_a_distillation(tmp_path, monkeypatch):
    """08_distill trains on what synthesize keeps of a teacher that thinks: the right traces and answers."""
    answers = [
        "<think>\n2 + 3 = 5\n</think>\n5",
        "<think>\n2 + 3 = 6\n</think>\n6",
        "5",
        "<think>\nfive\n</think>\n5",
    ]

    def candidates(model, prompts, **settings):
        tokenizer = load_tokenizer(locate("tiny").folder)
        return [Generated(tokenizer.encode(text), [], True) for _ in prompts for text in answers]

    monkeypatch.setattr(teachers.decoding, "in_batches", candidates)
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"What is {n} + {5 - n}?", "answer": "5"}) + "\n" for n in range(6))
    )
    counts = make(
        tmp_path / "traces.jsonl",
        path,
        Settings(samples=4, max_tokens=12, keep=2, near=None, require_thought=True),
    )
    assert (counts["written"], counts["wrong"], counts["no thought"]) == (12, 6, 6)
    monkeypatch.undo()
    chosen = methods.load_recipe(
        "08_distill",
        [
            "model=tiny",
            f"engine={ENGINE}",
            f"data.source={tmp_path / 'traces.jsonl'}",
            "data.config=null",
            "data.holdout=2",
            "data.system=null",
            "data.template=question",
            "data.max_length=96",
            "train.steps=1",
            "train.batch_size=4",
            "train.grad_accumulation=1",
            "think.questions=2",
            "think.max_tokens=8",
            "think.base=false",
            "sample.count=0",
            f"output={tmp_path / 'run'}",
        ],
    )
    from mlx_posttrain.data.read import read_conversations

    read = read_conversations(chosen.data, split="train", limit=None, seed=0)
    assert {row.turns[-1].content for row in read} == {answers[0], answers[3]} and all(
        row.extra["answer"] == "5" for row in read
    )
    assert methods.run(chosen)["loss"] > 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["questions"] == 2


def test_the_result_trains(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "stop_ids", _early_stop)
    make(tmp_path / "out.jsonl", questions)
    monkeypatch.undo()

    chosen = methods.load_recipe(
        "01_sft",
        [
            "model=tiny",
            f"engine={ENGINE}",
            f"data.source={tmp_path / 'out.jsonl'}",
            f"output={tmp_path / 'run'}",
            "train.steps=1",
            "data.holdout=1",
        ],
    )
    assert methods.run(chosen)["loss"] > 0


def test_separators_of_unicode_cost_no_row(tmp_path, monkeypatch):
    """In questions and in answers; the same command again finds everything done and changes no byte."""
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    asked = [{"question": f"2 + {n},{c}what is it?", "answer": str(2 + n)} for n, c in enumerate(SEPARATORS)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked), encoding="utf-8")
    answers = iter([f"the sum{c}is {2 + n}" for n, c in enumerate(SEPARATORS)])

    def candidates(model, prompts, **settings):
        tokenizer = load_tokenizer(locate("tiny").folder)
        return [Generated(tokenizer.encode(next(answers)), [], True)]

    monkeypatch.setattr(teachers, "CHUNK", 1)
    monkeypatch.setattr(teachers.decoding, "in_batches", candidates)
    settings = Settings(samples=1, max_tokens=12)
    assert make(out, path, settings)["written"] == 3
    before = out.read_bytes()
    assert all(c.encode() in before for c in SEPARATORS)
    assert make(out, path, settings)["written"] == 3 and out.read_bytes() == before
    assert [r["question"] for r in sources.load_rows(str(out))] == [r["question"] for r in asked]


def test_a_broken_row_stops_the_command_and_loses_nothing(tmp_path, monkeypatch, questions):
    monkeypatch.setattr(teachers, "stop_ids", _early_stop)
    out = tmp_path / "out.jsonl"
    make(out, questions)
    whole = out.read_text()
    for broken in ("garbage", '{"question": 5}'):
        out.write_text(broken + "\n" + whole)
        with pytest.raises(UserError, match=r"out\.jsonl, (line|row) 1: not a"):
            make(out, questions)
        assert out.read_text() == broken + "\n" + whole
