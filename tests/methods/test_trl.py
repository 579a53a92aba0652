"""Preference optimisation against TRL 1.16 itself, from rows of text to the metrics of three steps.

It needs TRL in the same environment, which no extra of ours installs:

    pip install trl==1.16.0
    python -m pytest -m exhaustive tests/methods/test_trl.py
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

import mlx_posttrain as mp
from mlx_posttrain.convert.weights import convert

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not any(d.metadata["Name"] == "trl" and d.version == "1.16.0" for d in metadata.distributions()),
        reason="TRL 1.16.0 is not installed",
    ),
]

# Each answer begins with a space, where a byte-level tokenizer begins a token.
ROWS = [
    {
        "prompt": "Question: Which is the bigger animal?\nAnswer:",
        "chosen": " The elephant.",
        "rejected": " A dog",
    },
    {"prompt": "Say hello.", "chosen": " Good morning to you all!", "rejected": " No."},
    {
        "prompt": "Name three colours, please:",
        "chosen": " red, green and blue",
        "rejected": " one two three four",
    },
    {
        "prompt": "The sea is",
        "chosen": " wide and deep.",
        "rejected": " a small box of tea on the kitchen table.",
    },
]
STEPS = 3
OPTIMIZER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
NAMES = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)
#: Our settings, and TRL's.
CASES = {
    "dpo": ({"loss": "dpo", "beta": 0.1}, {"loss_type": ["sigmoid"], "beta": 0.1}),
    "robust": (
        {"loss": "robust", "beta": 0.1, "label_smoothing": 0.2},
        {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.2},
    ),
    "ipo": ({"loss": "ipo", "beta": 0.1, "normalise": "length"}, {"loss_type": ["ipo"], "beta": 0.1}),
    "hinge": ({"loss": "hinge", "beta": 0.1}, {"loss_type": ["hinge"], "beta": 0.1}),
    "apo_zero": ({"loss": "apo_zero", "beta": 0.1}, {"loss_type": ["apo_zero"], "beta": 0.1}),
    "apo_down": ({"loss": "apo_down", "beta": 0.1}, {"loss_type": ["apo_down"], "beta": 0.1}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model as transformers loads it, and the rows: all in each step, so no order matters."""
    convert("tiny", tmp_path / "model", dtype="float32", to="hf")
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / "rows" / f"{split}.jsonl").write_text(text)
    return tmp_path


def ours(folder: Path, settings: dict) -> list[dict]:
    run = mp.train(
        "09_dpo",
        {
            "model": str(folder / "model"),
            "engine": "torch",
            "output": str(folder / "run"),
            **{f"preference.{key}": value for key, value in settings.items()},
            "data.source": str(folder / "rows"),
            "data.limit": None,
            "data.template": "none",
            "data.eval_split": "test",
            "train.epochs": STEPS,
            "train.batch_size": len(ROWS),
            "train.grad_accumulation": 1,
            "train.schedule": "constant",
            "train.warmup": 0,
            "sample.count": 0,
            **{f"train.{key}": value for key, value in OPTIMIZER.items()},
        },
    )
    return [row for row in run.metrics if "rewards/chosen" in row]


def theirs(folder: Path, settings: dict) -> list[dict]:
    os.environ["WANDB_DISABLED"] = "true"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **off)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=len(ROWS),
            num_train_epochs=STEPS,
            learning_rate=OPTIMIZER["lr"],
            adam_beta1=OPTIMIZER["beta1"],
            adam_beta2=OPTIMIZER["beta2"],
            adam_epsilon=OPTIMIZER["eps"],
            weight_decay=OPTIMIZER["weight_decay"],
            max_grad_norm=OPTIMIZER["max_grad_norm"],
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "rewards/chosen" in row]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_of_all_weights(case, folder):
    settings, as_trl_has_them = CASES[case]
    found, expected = ours(folder, settings), theirs(folder, as_trl_has_them)
    assert len(found) == len(expected) == STEPS
    for step, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        for name in NAMES:
            if step == 1 and name == "rewards/accuracies":  # margins are 0 but for rounding
                continue
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), (step, name)
    assert found[-1]["loss"] != pytest.approx(found[0]["loss"], abs=1e-3)  # something was learned
