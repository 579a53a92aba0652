"""Each model is prompted as it was trained, with as many tokens as its thoughts had in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data.read import with_system
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.evaluation import completions, prompting, suite
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source


def run(template, method: str = "sft", **more) -> Source:
    recipe = {"method": method, "data": {"template": template, "max_length": 900, **more}}
    if method == "distill":  # the one with questions to think about
        recipe["think"] = {"questions": 200}
    return Source(Path("x"), None, recipe)


BASE, SFT, MANY, PPO = (
    Source(Path("base")),
    run("instruction"),
    run(["plain", "chatml"]),
    run("dialogue", "ppo"),
)
DISTILLED = run("chatml", "distill", system="Think first.")


def test_every_run_has_its_own_template_and_the_base_that_of_most():
    settings = prompting.prompt_settings(
        [BASE, SFT, run("instruction"), MANY, PPO, DISTILLED, run("question", pack=True)], max_tokens=40
    )
    assert [s.template for s in settings] == [
        "instruction",
        "instruction",
        "instruction",
        "plain",
        "dialogue",
        "chatml",
        "none",
    ]
    assert [s.system for s in settings] == [None] * 5 + ["Think first.", None]
    assert prompting.prompt_settings([BASE], max_tokens=40)[0].template == "instruction"


def test_one_template_for_all_is_reported(capsys):
    settings = prompting.prompt_settings([BASE, SFT, PPO], template="question", max_tokens=40)
    assert {s.template for s in settings} == {"question"}
    assert "some runs were trained with dialogue, instruction" in capsys.readouterr().err
    prompting.prompt_settings([BASE, SFT], template="instruction", max_tokens=40)
    assert not capsys.readouterr().err


def test_thoughts_may_be_as_long_as_the_longest_training_row():
    assert [s.max_tokens for s in prompting.prompt_settings([BASE, SFT, DISTILLED], max_tokens=40)] == [
        40,
        40,
        900,
    ]
    assert [
        s.max_tokens
        for s in prompting.prompt_settings([BASE, SFT, DISTILLED], max_tokens=40, think_tokens=300)
    ] == [40, 40, 300]


def test_a_system_prompt_is_added_once_and_only_in_a_template():
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    assert with_system(Conversation(turns), "s").turns == (Turn("system", "s"), *turns)
    assert with_system(Conversation(turns), None).turns == turns
    assert with_system(Conversation(turns, templated=False), "s").turns == turns
    with_own = (Turn("system", "own"), *turns)
    assert with_system(Conversation(with_own), "s").turns == with_own


@pytest.mark.parametrize("engine", engines.available()[:1])
def test_a_comparison_prompts_each_model_in_its_own_template(
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
    calls = []
    generate_answers = completions.generate_answers

    def spy(model, tokenizer, rows, **options):
        first_role = rows[0].turns[0].role
        calls.append((options["template"], options["max_tokens"], first_role, options.get("samples", 1)))
        return generate_answers(model, tokenizer, rows, **options)

    monkeypatch.setattr(completions, "generate_answers", spy)
    settings = suite.SuiteSection(rows=str(questions), texts=None, max_tokens=6, samples=3)
    compared = suite.compare(
        [str(random_gpt2), *(str(tmp_path / name) for name in made)], settings, engine, ["gpt2", *made]
    )
    plain, thinking = ("plain", 6, "user"), ("dialogue", 60, "system")
    assert calls == [(*prompt, samples) for prompt in (plain, plain, thinking) for samples in (1, 3)]
    assert compared.templates_label().startswith(
        f"each in its own template ({compared.models[0].name}, sft: plain; distilled: dialogue)"
    )
    # sampled metrics are means over the samples of each question
    model, tokenizer, _ = open_model(tmp_path / "sft", engine)
    rows = suite.read_questions(settings)
    sampled = generate_answers(
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
        for values in ([a.stopped for a in sampled], [len(a.tokens) for a in sampled])
    )
    assert compared.models[1].values["ended_sampled"].rows.tolist() == ended.tolist()
    assert compared.models[1].values["length_sampled"].rows.tolist() == length.tolist()
