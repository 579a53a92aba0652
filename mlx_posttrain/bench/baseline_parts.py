"""What other trainers' runs share: their models without dropout, their arguments, and the end of a unit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.harness import Gate, use_device
from mlx_posttrain.data.types import Example


class Finished(Exception):
    """Raised inside a trainer's loop to leave it."""


def row_numbers(batch: Sequence[Sequence[int]], examples: Sequence[Example]) -> list[int]:
    """Which of ``examples`` the rows of a padded batch begin with."""
    return [i for row in batch for i, e in enumerate(examples) if tuple(row[: len(e.tokens)]) == e.tokens]


def mlx_model(folder: Path, engine: str) -> tuple[Any, dict[str, Any]]:
    """A model as mlx-lm loads it, frozen, with its config, on the device of ``engine``."""
    from mlx_posttrain.convert import hub, weights
    from mlx_posttrain.engines.mlx.cpu import blas

    blas.load()
    import mlx.core as mx
    from mlx_lm.utils import load_model

    use_device(engine)
    with tempfile.TemporaryDirectory() as scratch:
        # It expects GPT-2's weights without the prefix that transformers saves, and trains in the
        # file's dtype.
        if hub.check_config(folder)["model_type"] == "gpt2":
            weights.convert(folder, folder := Path(scratch) / "model", dtype="float32")
        net, config = load_model(folder)
        mx.eval(net.parameters())
    net.freeze()
    return net, config


def train_parts(net: Any, adapter: bool) -> None:
    """Make an mlx-lm model train LoRA on every block's projections, as ours does, or else the blocks only."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if adapter:
        gpt2 = net.model_type == "gpt2"
        targets = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"] if gpt2 else None  # all linear layers
        settings = {"rank": 16, "dropout": 0.0, "scale": 2.0, "keys": targets}
        linear_to_lora_layers(net, len(net.layers), settings)
    else:
        for layer in net.layers:
            layer.unfreeze()


def mlx_adam(rate: float) -> Any:
    """mlx's AdamW.

    The recipes of mlx-lm and mlx-lm-lora leave Adam's bias correction off, which makes the first steps three
    times as large: the losses would diverge.
    """
    import mlx.optimizers as optim

    return optim.AdamW(learning_rate=rate, weight_decay=0.0, bias_correction=True)


def mlx_arguments(scratch: str, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of mlx-lm's trainer and of those that build on it: steps without end, nothing saved."""
    return {
        "iters": 10**6,
        "steps_per_report": 1,
        "steps_per_eval": 10**9,
        "steps_per_save": 10**9,
        "max_seq_length": config.get("n_positions") or config["max_position_embeddings"],
        "adapter_file": f"{scratch}/adapters.safetensors",
    }


def no_dropout(folder: str, **settings: Any) -> Any:
    """The config of a model, with GPT-2's dropout off; others have none by default."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, **settings)
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return config


def torch_model(folder: str, padding_side: str = "right") -> tuple[Any, Any]:
    """A language model without dropout, and its tokenizer with a pad token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, config=no_dropout(folder)), tokenizer


def peft_config(net: Any, adapter: bool) -> Any:
    """LoRA on every block's projections, as ours is; None for all weights."""
    if not adapter:
        return None
    from peft import LoraConfig

    gpt2 = net.config.model_type == "gpt2"
    targets = ["c_attn", "c_proj"] if gpt2 else "all-linear"
    return LoraConfig(r=16, lora_alpha=32, target_modules=targets, fan_in_fan_out=gpt2, task_type="CAUSAL_LM")


def common_arguments(scratch: str, batch_size: int, rate: float) -> dict[str, Any]:
    """Arguments of every trainer that builds on transformers."""
    os.environ.setdefault("WANDB_DISABLED", "true")
    return {
        "output_dir": scratch,
        "per_device_train_batch_size": batch_size,
        "learning_rate": rate,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def unit_callback(gate: Gate, stats: Callable[[dict[str, float]], dict[str, float] | None]) -> Any:
    """A callback that ends a unit at every logged record of the trainer that ``stats`` accepts.

    stats: returns the unit's stats for a record of the log, or None for a record that ends no unit.
    """
    from transformers import TrainerCallback

    class UnitCallback(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            unit = stats(logs or {})
            if unit is not None:
                gate.report(**unit)
                if not gate.open():
                    raise Finished

    return UnitCallback()


def lend_device_facts() -> None:
    """Let mlx-lm-lora run without a GPU.

    It reads a size that only Metal tells, and sets how much Metal keeps wired by it.
    """
    import mlx.core as mx

    key = "max_recommended_working_set_size"
    facts = mx.device_info()
    if key not in facts:
        mx.device_info = lambda *_: {**facts, key: 0}
        mx.set_wired_limit = lambda limit: 0
