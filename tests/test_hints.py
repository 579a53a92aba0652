"""Commands and options of other tools are answered with ours, in one line."""

from __future__ import annotations

import pytest

from tests.helpers import cli, refused


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("sft", "there is no command 'sft'; to train, run a recipe: `mlx-posttrain run 01_sft`"),
        ("dpo", "`mlx-posttrain run 09_dpo`"),
        ("preference", "`mlx-posttrain run 09_dpo`"),
        ("grpo", "`mlx-posttrain run 10_grpo`"),
        ("train 01_sft", "`mlx-posttrain run 01_sft`"),
        ("lora", "`mlx-posttrain run 03_lora`"),
        ("evaluate runs/x", "did you mean 'eval'?"),
        ("fuse", "did you mean 'export'?"),
        ("rnu 01_sft", "to train, run a recipe"),
        ("chatt", "did you mean 'chat'?"),
        ("xyzzy", "there are run, sweep,"),
        (
            "run 03_lora --lr 1e-4",
            "there is no option --lr: settings are written key=value, here train.lr=1e-4; "
            "`mlx-posttrain keys` lists them",
        ),
        ("run 01_sft --model tiny", "here model=tiny;"),
        ("run 01_sft --learning-rate=1e-4", "here train.lr=1e-4;"),
        ("run --epochs 3 01_sft", "here train.epochs=3;"),
        ("run 01_sft --batch-size 4", "here train.batch_size=4;"),
        ("run 01_sft --per_device_train_batch_size 4", "here train.batch_size=4;"),
        ("run 01_sft --seed 1", "here seed=1;"),
        ("run 01_sft --train.lr 1e-4", "here train.lr=1e-4;"),
        ("run 01_sft --batchsize 4", "here train.batch_size=4;"),
        ("sweep 10_grpo --num-generations 4", "here rollout.samples=4;"),
        ("run none.yaml --lr 1", "here train.lr=1;"),
        ("run 01_sft --xyzzy 1", "settings are written key=value; `mlx-posttrain keys`"),
        ("plan 01_sft --iters", "here train.steps=VALUE;"),
        ("validate 01_sft --rank --x", "here adapter.rank=VALUE;"),
        ("data 01_sft --template chat --rows 1", "here data.template=chat;"),
    ],
)
def test_one_line_names_ours(typed, message, capfd):
    assert message in refused(capfd, *typed.split())


def test_a_prompt_without_its_option_is_told_to_have_one(capfd):
    assert "prompts are options: --prompt 'Hello you'" in refused(capfd, "generate", "tiny", "Hello you")
    two = refused(capfd, "generate", "tiny", "Hello you", "And I")
    assert "--prompt 'Hello you' --prompt 'And I'" in two

    two = refused(capfd, "generate", "tiny", "Hello", "--prompt", "And I")
    assert two.strip().endswith("prompts are options: --prompt Hello")


@pytest.mark.parametrize("typed", ["--prompt What is 2?", "What is 2?"])
def test_a_prompt_of_several_words_is_told_to_stand_in_quotes(typed, capfd):
    said = refused(capfd, "generate", "tiny", *typed.split())
    assert "prompts are options: --prompt 'What is 2?'" in said


def test_keys_are_found_by_several_words(capsys):
    assert cli("keys", "learning", "rate") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("train.lr (") for line in lines)
    assert all("learning" in line and "rate" in line for line in lines)
