"""Each model is asked as it was trained to be, and with the room its thoughts had in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.evaluate import ask, measure, suite
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source


def run(template, method: str = "sft", **more) -> Source:
    return Source(
        Path("x"), None, {"method": method, "data": {"template": template, "max_length": 900, **more}}
    )


BASE, SFT, MANY, PPO = (
    Source(Path("base")),
    run("instruction"),
    run(["plain", "chatml"]),
    run("dialogue", "ppo"),
)
DISTILLED = run("chatml", "distill", system="Think first.")


def test_every_run_has_its_own_template_and_the_base_that_of_most():
    found = ask.ways(
        [BASE, SFT, run("instruction"), MANY, PPO, DISTILLED, run("question", pack=True)], max_tokens=40
    )
    assert [way.template for way in found] == [
        "instruction",
        "instruction",
        "instruction",
        "plain",
        "dialogue",
        "chatml",
        "none",
    ]
    assert [way.system for way in found] == [None] * 5 + ["Think first.", None]
    assert ask.ways([BASE], max_tokens=40)[0].template == "instruction"


def test_one_template_for_all_is_said(capsys):
    found = ask.ways([BASE, SFT, PPO], template="question", max_tokens=40)
    assert {way.template for way in found} == {"question"}
    assert "some runs were trained with dialogue, instruction" in capsys.readouterr().err
    ask.ways([BASE, SFT], template="instruction", max_tokens=40)
    assert not capsys.readouterr().err


def test_thoughts_have_the_room_of_the_longest_training_row():
    assert [way.max_tokens for way in ask.ways([BASE, SFT, DISTILLED], max_tokens=40)] == [40, 40, 900]
    assert [way.max_tokens for way in ask.ways([BASE, SFT, DISTILLED], max_tokens=40, think_tokens=300)] == [
        40,
        40,
        300,
    ]


def test_a_system_prompt_is_given_once_and_only_in_a_template():
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    assert ask.with_system(Conversation(turns), "s").turns == (Turn("system", "s"), *turns)
    assert ask.with_system(Conversation(turns), None).turns == turns
    assert ask.with_system(Conversation(turns, templated=False), "s").turns == turns
    own = (Turn("system", "own"), *turns)
    assert ask.with_system(Conversation(own), "s").turns == own


@pytest.mark.parametrize("engine", engines.available()[:1])
def test_a_comparison_asks_each_in_its_own_way_greedy_and_sampled(
    engine, random_gpt2, rows_file, tmp_path, monkeypatch
):
    made = {
        "sft": ("01_sft", ["data.template=plain"]),
        "distilled": (
            "08_distill",
            [
                "data.template=dialogue",
                "data.too_long=cut",
                "data.system=Hi.",
                "data.config=null",
                "data.format=auto",
                "think.questions=0",
                "adapter.rank=2",
                "train.gradient_checkpointing=false",
            ],
        ),
    }
    for name, (shipped, more) in made.items():
        chosen = methods.load_recipe(
            shipped,
            [
                f"model={random_gpt2}",
                f"engine={engine}",
                f"data.source={rows_file}",
                "data.max_length=60",
                "data.holdout=2",
                "train.steps=1",
                "sample.count=0",
                f"output={tmp_path / name}",
                *more,
            ],
        )
        methods.run(chosen)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"Say {w}.", "answer": w}) + "\n" for w in ("cat", "dog", "hen"))
    )
    asked = []
    answers = measure.answers

    def spy(model, tokenizer, rows, **how):
        asked.append((how["template"], how["max_tokens"], rows[0].turns[0].role, how.get("samples", 1)))
        return answers(model, tokenizer, rows, **how)

    monkeypatch.setattr(measure, "answers", spy)
    settings = suite.SuiteSection(rows=str(questions), texts=None, max_tokens=6, samples=3)
    found = suite.compare(
        [str(random_gpt2), *(str(tmp_path / name) for name in made)], settings, engine, ["gpt2", *made]
    )
    plain, thinking = ("plain", 6, "user"), ("dialogue", 60, "system")
    assert asked == [(*way, samples) for way in (plain, plain, thinking) for samples in (1, 3)]
    assert found.asked().startswith(
        f"each in its own template ({found.models[0].name}, sft: plain; distilled: dialogue)"
    )
    # The sampled figures are means over the samples of each question.
    model, tokenizer, _ = open_model(tmp_path / "sft", engine)
    rows = suite.read_questions(settings)
    drawn = answers(
        model,
        tokenizer,
        rows,
        template="plain",
        max_tokens=6,
        samples=3,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    ended, length = (
        np.array(values, float).reshape(3, 3).mean(1)
        for values in ([a.stopped for a in drawn], [len(a.tokens) for a in drawn])
    )
    assert found.models[1].values["ended_sampled"].rows.tolist() == ended.tolist()
    assert found.models[1].values["length_sampled"].rows.tolist() == length.tolist()
