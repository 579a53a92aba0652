"""Commands and options of other tools are answered with ours, in one line."""

from __future__ import annotations

import pytest

from tests.helpers import refused


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
        ("run 01_sft --model tiny", "--model is no option: a recipe's settings are words, here model=tiny"),
        ("run 01_sft --learning-rate=1e-4", "here learning_rate=1e-4"),
        ("plan 01_sft --iters", "here iters=VALUE"),
        ("validate 01_sft --rank --x", "here rank=VALUE"),
        ("data 01_sft --template chat --rows 1", "here template=chat"),
    ],
)
def test_one_line_names_ours(typed, message, capfd):
    assert message in refused(capfd, *typed.split())
