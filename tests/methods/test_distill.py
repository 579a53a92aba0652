"""Distillation: thoughts are read, trained, asked for and judged; what is left out is counted; the merged
model is the trained one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data import formats, tasks
from mlx_posttrain.data.dataset import Dataset, RowCollator
from mlx_posttrain.data.read import ModelFacts
from mlx_posttrain.data.types import Conversation, Example, Turn
from mlx_posttrain.evaluation import reasoning
from mlx_posttrain.methods import distill
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import locate
from mlx_posttrain.runs import Run
from mlx_posttrain.training.session import Session
from tests.helpers import read_jsonl

ENGINES = engines.available()


def test_what_is_a_thought():
    assert reasoning.split_thought("<think>\n1 + 2 = 3\n</think>\n3") == ("1 + 2 = 3", "3")
    for bad in (
        "3",
        "<think>a",
        "<think></think>3",
        "<think>a</think>",
        "b <think>a</think>3",
        "<think>a</think><think>b</think>3",
        "<think>a</think>3</think>",
    ):
        assert reasoning.split_thought(bad) is None, bad
    assert reasoning.count_steps("<think>\n1 + 2 = 3\n\n3 + 4 = 7\n</think>\n7") == 2
    assert reasoning.count_steps("7") == 0
    full = "<think>\nFirst, 1 + 2 = 3 because so.\nCheck: it is right.\nSo the answer is 3\n</think>\n3"
    assert reasoning.shape_score(full) == 1.0 and reasoning.shape_score("3") == 0.0
    # The look of a thought says nothing of its truth.
    assert reasoning.shape_score(full.replace("= 3", "= 9")) == 1.0


def test_a_trace_is_the_thought_alone():
    assert reasoning.extract_trace("<think>\n1 + 2 = 3\n</think>\n3") == "1 + 2 = 3"
    assert reasoning.extract_trace("<think>1 + 2 = ") == "1 + 2 ="  # cut off
    assert reasoning.extract_trace("3") == reasoning.extract_trace("<think>\n\n</think>\n3") == ""


@pytest.mark.parametrize(
    "row, said",
    [
        ({"question": "q", "thinking": "t", "answer": "a"}, "<think>\nt\n</think>\na"),
        (
            {"problem": "q", "deepseek_reasoning": "t", "deepseek_solution": "a", "domain": "math"},
            "<think>\nt\n</think>\na",
        ),
        (
            {"question": "q", "thinking": "t", "answer": "a", "response": "<think>x</think>y"},
            "<think>\nt\n</think>\na",
        ),
    ],
)
def test_the_trace_is_read_and_not_the_answer_alone(row, said):
    (found,), dropped = formats.parse_rows([row])
    assert (
        isinstance(found, Conversation)
        and found.turns == (Turn("user", "q"), Turn("assistant", said))
        and not dropped
    )
    assert found.extra["answer"] == "a"


def test_gsm8k_steps_become_a_thought():
    row = {"question": "q", "answer": "48/2 = <<48/2=24>>24 clips.\nIn all 72.\n#### 72"}
    (found,), _ = formats.parse_rows([row], format="gsm8k")
    assert (
        found.turns[-1].content == "<think>\n48/2 = 24 clips.\nIn all 72.\n</think>\n72"
        and found.extra["answer"] == "72"
    )
    (plain,), _ = formats.parse_rows([row])
    assert plain.turns[-1].content == row["answer"]


def test_shared_reasoning_files_are_read(shared):
    from mlx_posttrain.data.sources import load_rows
    from mlx_posttrain.rewards import verify

    for name, format, count in (
        ("gsm8k-train", "gsm8k", 7473),
        ("thinking-traces", "auto", 153),
        ("countdown-train", "auto", 2000),
    ):
        found, dropped = formats.parse_rows(
            load_rows(str(shared / "data" / "reasoning" / f"{name}.jsonl")), format=format
        )
        assert len(found) + sum(dropped.values()) == count and sum(dropped.values()) <= 2, (name, dropped)
        assert all(reasoning.split_thought(c.turns[-1].content) for c in found), name
        if name != "thinking-traces":
            assert all(verify.verify(c.extra, c.turns[-1].content) for c in found), name


def load(output, *overrides: str):
    return methods.load_recipe(
        "08_distill",
        [
            "model=tiny",
            "data.source=embedded/reasoning",
            "data.config=null",
            "data.families=[long_sum]",
            "data.limit=48",
            "data.system=null",
            "data.template=question",
            "data.max_length=128",
            "data.eval_limit=12",
            "train.epochs=1",
            "train.batch_size=8",
            "train.grad_accumulation=1",
            "train.steps=4",
            "train.lr=1e-3",
            "think.questions=6",
            "think.max_tokens=24",
            "sample.count=1",
            f"output={output}",
            *overrides,
        ],
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_ends_with_a_report_and_a_merged_model(engine, tmp_path, capsys):
    result = methods.run(load(tmp_path / "run", f"engine={engine}"))
    run = Run(tmp_path / "run")
    report = json.loads((run.folder / "report.json").read_text())
    assert (
        report["questions"] == 6 and report["accuracy"][0] == result["accuracy"] and "base_accuracy" in report
    )
    answers = read_jsonl(run.folder / "answers.jsonl")
    assert len(answers) == 6 and all(a["at_once"].startswith("<think>\n\n</think>") for a in answers)
    merged = engines.get(engine).load(run.folder / "merged")
    trained, tokenizer, _ = open_model(run.folder, engine)
    tokens = np.array([tokenizer.encode("What is 2 + 3?")])
    # The embedded base is stored in float16, and a merge keeps its base's format: logits around 10 differ in
    # the third decimal.
    np.testing.assert_allclose(merged.full_logits(tokens), trained.full_logits(tokens), atol=1e-2)
    assert "merged into" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adapter", ["{rank: 8, alpha: 64}", "{rank: 4, kind: dora}", "null"])
def test_the_base_that_is_asked_is_the_model_before_training(
    engine, adapter, random_gpt2, tmp_path, monkeypatch
):
    """With an adapter it is the same weights without it, and nothing is loaded again."""
    asked, think = [], reasoning.measure_reasoning

    def spy(*arguments, **more):
        asked.append(think(*arguments, **more))
        return asked[-1]

    monkeypatch.setattr(reasoning, "measure_reasoning", spy)
    library, loaded = engines.get(engine), []
    load_weights = type(library).load
    monkeypatch.setattr(
        type(library), "load", lambda *given, **more: loaded.append(given) or load_weights(*given, **more)
    )
    more = [
        "train.lr=1e-2",
        "train.select=last",
        "think.questions=4",
        "think.max_tokens=12",
        "sample.count=0",
    ]
    methods.run(load(tmp_path / "run", f"engine={engine}", f"adapter={adapter}", *more))
    assert len(loaded) == (2 if adapter == "null" else 1)
    start, tokenizer, _ = open_model("tiny", engine)
    rows = [
        json.loads(line)["question"] for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    ]
    alone = think(
        start,
        tokenizer,
        [Conversation((Turn("user", q), Turn("assistant", ""))) for q in rows],
        template="question",
        max_tokens=12,
    )
    assert asked[2].texts == alone.texts and asked[0].texts != alone.texts


def test_a_thought_has_the_room_that_its_question_leaves(random_gpt2, tmp_path, monkeypatch):
    """Context 64: a row is answered up to its end, not up to half of it, and no question that could be
    answered is left out.
    """
    found = {}
    think = reasoning.measure_reasoning

    def spy(*arguments, **more):
        found[more.get("prefix", "")] = think(*arguments, **more)
        return found[more.get("prefix", "")]

    monkeypatch.setattr(reasoning, "measure_reasoning", spy)
    # nothing ends by itself
    monkeypatch.setattr("mlx_posttrain.data.encode.eos_id", lambda tokenizer: 10**6)
    student, tokenizer, _ = open_model(random_gpt2, ENGINES[0])
    chosen = load(
        tmp_path, "think.base=false", "think.max_tokens=null", "data.max_length=64", "data.template=none"
    )
    rows = [
        Conversation((Turn("user", "2 + 3?" + " more" * more), Turn("assistant", "5")), extra={"answer": "5"})
        for more in (0, 5)
    ]
    asked = [len(tokenizer.encode(row.turns[0].content)) for row in rows]

    def report(chosen, train: int) -> None:
        """The report of a run in which so many of two rows were short enough to be trained on."""
        examples = [Example((1, 2), (False, True))] * train
        collator = RowCollator(student.context)
        dataset = Dataset(examples, [], collator, chosen.train, 0, train_rows=rows, held_out_rows=rows)
        facts = ModelFacts(tokenizer, student.context, student.config)
        library, method = engines.get(ENGINES[0]), methods.get("distill")
        distill.report(
            Session(method, chosen, library, Run(tmp_path), False, random_gpt2, student, facts, dataset)
        )

    report(chosen, 1)
    begun = len(tokenizer.encode(" " + reasoning.EMPTY_THOUGHT))
    assert found[""].output_tokens.tolist() == [64 - n for n in asked] and not found[""].stopped.any()
    assert found[reasoning.EMPTY_THOUGHT].output_tokens.tolist() == [64 - n - begun for n in asked]
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["questions"] == 2 and figures["kept"] == 0.5 and figures["ended"][0] == 0
    report(load(tmp_path, "think.base=false", "think.max_tokens=7", "data.template=none"), 2)
    assert found[""].output_tokens.tolist() == [7, 7]


def test_long_traces_are_left_out_and_counted(tmp_path, capsys):
    methods.run(
        load(
            tmp_path / "run", "data.max_length=96", "data.families=null", "think.questions=0", "train.steps=1"
        )
    )
    said = next(line for line in capsys.readouterr().err.splitlines() if "truncated" in line)
    assert "0 truncated" in said and int(said.partition("trained token, ")[2].split()[0]) > 0


def test_a_system_prompt_is_trained_and_asked_with(tmp_path):
    methods.run(
        load(
            tmp_path / "run",
            "data.system=Think first.",
            "think.base=false",
            "data.template=chatml",
            "data.max_length=192",
        )
    )
    assert locate(tmp_path / "run").system == "Think first."
    from mlx_posttrain.data.read import read_conversations

    chosen = load(tmp_path / "other", "data.system=Think first.")
    (first, *_) = read_conversations(chosen.data, split="train", limit=2, seed=0)
    assert first.turns[0] == Turn("system", "Think first.")


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES[:1])
def test_thoughts_are_learned(engine, tmp_path):
    """Counting words and following moves: contents that were never trained on come out right with a thought.

    On seeds 0, 1 and 2: 42, 21 and 25 % after thinking, 4, 4 and 6 % when made to answer at once.
    """
    chosen = methods.load_recipe(
        "demo_distill",
        [
            f"engine={engine}",
            "data.limit=2560",
            "data.eval_limit=120",
            "think.questions=120",
            "think.base=false",
            "sample.count=0",
            f"output={tmp_path / 'run'}",
        ],
    )
    result = methods.run(chosen)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert result["format_rate"] > 0.9 and result["accuracy"] > 0.2
    mean, low, _ = report["thinking_minus_at_once"]
    assert low > 0 and mean > 0.1  # the thought is used
    assert result["loss"] < 0.6  # 4.7 before


def test_the_embedded_rows_verify_themselves():
    from mlx_posttrain.rewards import verify

    for row in tasks.reasoning("valid", limit=50):
        assert verify.verify(row, row["response"]) and not verify.verify(row, "<think>\n1\n</think>\nno idea")
