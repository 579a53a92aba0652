"""Other trainers on the same rows: mlx-lm's, transformers', and TRL's for supervised training and PPO.

Each trainer keeps its own defaults, batches, padding and averages; only the batch size, the learning rate,
float32, no dropout and completion-only loss are set. Recorded of its first batch are the rows it holds, the
number of tokens it trains, and its loss before any update.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain.bench.harness import ROLLOUT, Gate, learning_rate, prompts, use_device
from mlx_posttrain.bench.inputs import Shape, rows
from mlx_posttrain.bench.kinds import training_kinds
from mlx_posttrain.data.types import Example


class Baseline(NamedTuple):
    """Another trainer: the library it shares with one of our engines, its packages, and its kinds of work."""

    engine: str
    packages: tuple[str, ...]
    kinds: tuple[str, ...]


BASELINES = {
    "mlx-lm": Baseline("mlx", ("mlx_lm",), ("sft", "lora")),
    "transformers": Baseline("torch", ("torch", "accelerate", "peft"), ("sft", "lora")),
    "trl": Baseline("torch", ("trl", "accelerate", "peft"), ("sft", "lora", "ppo")),
}


def installed(engines: Sequence[str]) -> dict[str, str]:
    """The installed baselines on the devices of ``engines``, each with the engine it is compared with.

    For example ``{"mlx-lm-cpu": "mlx-cpu"}``.
    """
    pairs: dict[str, str] = {}
    for name, baseline in BASELINES.items():
        if all(importlib.util.find_spec(package) for package in baseline.packages):
            pairs |= {
                f"{name}-{e.rpartition('-')[2]}": e for e in engines if e.startswith(f"{baseline.engine}-")
            }
    return pairs


def baseline_name(name: str) -> str:
    """The key in ``BASELINES`` of a name that ``installed`` returns: the name without its device."""
    return name.rpartition("-")[0]


class _Finished(Exception):
    """Raised inside a trainer's loop to leave it."""


def _row_numbers(batch: Sequence[Sequence[int]], examples: Sequence[Example]) -> list[int]:
    """Which of ``examples`` the rows of a padded batch begin with."""
    return [i for row in batch for i, e in enumerate(examples) if tuple(row[: len(e.tokens)]) == e.tokens]


def mlx_lm(spec: dict[str, Any], gate: Gate) -> None:
    """mlx-lm's training loop.

    Its ``full`` trains the blocks only. Its LoRA is put on the attention and MLP projections of every block,
    as ours is.
    """
    from mlx_posttrain.convert import hub, weights
    from mlx_posttrain.engines.mlx.cpu import blas

    blas.load()
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    use_device(spec["against"])
    folder, shape = Path(spec["folder"]), Shape(**spec["shape"])
    with tempfile.TemporaryDirectory() as scratch:
        # It expects GPT-2's weights without the prefix that transformers saves, and trains in the
        # file's dtype.
        if hub.check_config(folder)["model_type"] == "gpt2":
            weights.convert(folder, folder := Path(scratch) / "model", dtype="float32")
        net, config = load_model(folder)
        mx.eval(net.parameters())
    net.freeze()
    if spec["what"] == "lora":
        keys = {
            "rank": 16,
            "dropout": 0.0,
            "scale": 2.0,
            "keys": ["attn.c_attn", "attn.c_proj", "mlp.c_proj"],
        }
        linear_to_lora_layers(net, len(net.layers), keys)
    else:
        for layer in net.layers:
            layer.unfreeze()
    examples = rows(shape, config["vocab_size"])
    data = [(list(e.tokens), sum(not t for t in e.trained)) for e in examples]
    tokens = float(sum(sum(e.trained) for e in examples))
    steps = len(data) // shape.batch_size
    first: dict[str, Any] = {}
    # loss and trained tokens of each step: mlx-lm averages over batches, we average over tokens
    losses: list[tuple[float, float]] = []

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        """mlx-lm's batches, with the loss of a row ending at its last token.

        Its own loss includes the padding token after that.
        """
        for batch, spans in trainer.iterate_batches(*args, **kwargs):
            if not first:
                first["rows"] = _row_numbers(np.array(batch).tolist(), examples)
            yield batch, spans - mx.array([0, 1])

    class UnitCallback(TrainingCallback):
        trained_tokens = 0.0

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            losses.append((info["train_loss"], info["trained_tokens"] - self.trained_tokens))
            self.trained_tokens = info["trained_tokens"]
            if "loss" not in first:
                first.update(loss=losses[0][0], tokens=losses[0][1])
            if len(losses) == steps:
                mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
                gate.report(loss=mean, rows=steps * shape.batch_size, tokens=tokens, steps=steps)
                losses.clear()
                if not gate.open():
                    raise _Finished

    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.eval(net.parameters())
    mx.reset_peak_memory()
    if gate.open():
        with tempfile.TemporaryDirectory() as scratch:
            settings = trainer.TrainingArgs(
                batch_size=shape.batch_size,
                iters=10**6,
                steps_per_report=1,
                steps_per_eval=10**9,
                steps_per_save=10**9,
                max_seq_length=config["n_positions"],
                adapter_file=f"{scratch}/adapters.safetensors",
            )
            with contextlib.suppress(_Finished):
                # Its recipes leave Adam's bias correction off, which makes the first steps three times as
                # large: the losses would diverge.
                adam = optim.AdamW(
                    learning_rate=learning_rate(training_kinds()[spec["what"]].adapter),
                    weight_decay=0.0,
                    bias_correction=True,
                )
                trainer.train(
                    net, adam, data, args=settings, iterate_batches=batches, training_callback=UnitCallback()
                )
    gate.close(device=spec["against"], version=importlib.metadata.version("mlx-lm"), first=first)


def trl(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's SFTTrainer, or its PPOTrainer in releases that still have one."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if spec["what"] == "ppo":
        return _trl_ppo(spec, gate)
    from trl import SFTConfig, SFTTrainer

    def make(
        net: Any,
        adapter: Any,
        tokenizer: Any,
        common: dict[str, Any],
        recorded: Callable[[type], type],
        **kwargs: Any,
    ) -> Any:
        options = {
            "max_length": None,
            "completion_only_loss": True,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "packing": False,
        }
        return recorded(SFTTrainer)(
            model=net,
            args=SFTConfig(**common, **options),
            processing_class=tokenizer,
            peft_config=adapter,
            **kwargs,
        )

    return _supervised(spec, gate, "trl", make)


def transformers(spec: dict[str, Any], gate: Gate) -> None:
    """transformers' Trainer; adapters through peft."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def make(
        net: Any,
        adapter: Any,
        tokenizer: Any,
        common: dict[str, Any],
        recorded: Callable[[type], type],
        **kwargs: Any,
    ) -> Any:
        net = net if adapter is None else get_peft_model(net, adapter)
        return recorded(Trainer)(
            model=net,
            args=TrainingArguments(**common),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            **kwargs,
        )

    return _supervised(spec, gate, "transformers", make)


def _common(scratch: str, batch_size: int, rate: float) -> dict[str, Any]:
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


def _unit_callback(gate: Gate, stats: Callable[[dict[str, float]], dict[str, float] | None]) -> Any:
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
                    raise _Finished

    return UnitCallback()


def _recorded(
    trainer: Any, examples: Sequence[Example], first: dict[str, Any], losses: list[tuple[float, int]]
) -> Any:
    """The trainer's class, recording its first batch and the loss of every batch.

    first: gets the first batch's rows, trained tokens and loss. losses: gets every batch's (loss, trained
    tokens).
    """

    class Recorded(trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows, tokens = inputs["input_ids"].tolist(), int((inputs["labels"] != -100).sum())
            result = super().compute_loss(model, inputs, *args, **kwargs)
            loss = float(result[0] if isinstance(result, tuple) else result)
            if not first:
                first.update(rows=_row_numbers(rows, examples), tokens=tokens, loss=loss)
            losses.append((loss, tokens))
            return result

    return Recorded


def _supervised(spec: dict[str, Any], gate: Gate, package: str, make: Callable[..., Any]) -> None:
    """Supervised training by the trainer that ``make`` returns.

    make: is called with a model, an adapter's settings or None, a tokenizer, the common arguments, a function
    that makes a trainer's class record its losses, and what else the trainer takes.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = Shape(**spec["shape"])
    net = AutoModelForCausalLM.from_pretrained(
        spec["folder"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = rows(shape, net.config.vocab_size)
    labels = [
        [token if trained else -100 for token, trained in zip(e.tokens, e.trained, strict=True)]
        for e in examples
    ]
    data = Dataset.from_dict({"input_ids": [list(e.tokens) for e in examples], "labels": labels})
    adapter = None
    if spec["what"] == "lora":
        from peft import LoraConfig

        adapter = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["c_attn", "c_proj"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        )
    tokens = float(sum(sum(e.trained) for e in examples))
    steps = len(examples) // shape.batch_size
    first: dict[str, Any] = {}
    losses: list[tuple[float, int]] = []

    def unit_stats(logs: dict[str, float]) -> dict[str, float] | None:
        if "loss" not in logs:
            return None
        # The log has the mean of the batches' means, which depends on the order of the rows; ours is the mean
        # over tokens.
        mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        losses.clear()
        return {"loss": mean, "rows": len(examples), "tokens": tokens, "steps": steps}

    with tempfile.TemporaryDirectory() as scratch:
        common = _common(scratch, shape.batch_size, learning_rate(training_kinds()[spec["what"]].adapter))
        common |= {"lr_scheduler_type": "constant", "max_steps": 10**6, "logging_steps": steps}
        trainer = make(
            net,
            adapter,
            tokenizer,
            common,
            lambda trainer_class: _recorded(trainer_class, examples, first, losses),
            train_dataset=data,
            callbacks=[_unit_callback(gate, unit_stats)],
        )
        if gate.open():
            with contextlib.suppress(_Finished):
                trainer.train()
    gate.close(device="CPU", version=importlib.metadata.version(package), first=first)


def _trl_ppo(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's PPOTrainer, one iteration per unit."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    batch_size = spec["shape"]["batch_size"]
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    policy, reference = (AutoModelForCausalLM.from_pretrained(spec["folder"], **no_dropout) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(spec["reward"], num_labels=1, **no_dropout)
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["folder"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    count = ROLLOUT["prompts"] * ROLLOUT["samples"]
    repeated = [p for p in prompts(policy.config.vocab_size) for _ in range(ROLLOUT["samples"])]
    data = Dataset.from_dict({"input_ids": repeated})
    first: dict[str, Any] = {}

    def unit_stats(logs: dict[str, float]) -> dict[str, float] | None:
        if "objective/entropy" not in logs:
            return None
        if not first:
            first.update(kl=logs["objective/kl"], score=logs["objective/scores"])
        return {
            "loss": logs["objective/entropy"] / ROLLOUT["max_tokens"],
            "rows": count,
            "tokens": count * ROLLOUT["max_tokens"],
        }

    with tempfile.TemporaryDirectory() as scratch:
        settings = PPOConfig(
            **_common(scratch, batch_size, learning_rate(adapter=False)),
            gradient_accumulation_steps=max(1, count // batch_size),
            num_ppo_epochs=2,
            num_mini_batches=1,
            total_episodes=10**6,
            response_length=ROLLOUT["max_tokens"],
            temperature=1.0,
            num_sample_generations=0,
            logging_steps=1,
        )
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            callbacks=[_unit_callback(gate, unit_stats)],
        )
        if gate.open():
            with contextlib.suppress(_Finished):
                trainer.train()
    gate.close(device="CPU", version=importlib.metadata.version("trl"), first=first)


TRAINERS = {"mlx-lm": mlx_lm, "transformers": transformers, "trl": trl}
