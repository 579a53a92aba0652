"""Other trainers on the same rows: supervised training by mlx-lm, transformers and TRL.

Each trainer keeps its own defaults, batches, padding and averages; only the batch size, the learning rate,
float32, no dropout and completion-only loss are set. Recorded of its first batch are the rows it holds, the
number of tokens it trains, and its loss before any update.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.baseline_parts import (
    Finished,
    common_arguments,
    mlx_adam,
    mlx_arguments,
    mlx_model,
    peft_config,
    row_numbers,
    torch_model,
    train_parts,
    unit_callback,
)
from mlx_posttrain.bench.harness import Gate, learning_rate
from mlx_posttrain.bench.inputs import Shape, rows
from mlx_posttrain.bench.kinds import training_kinds
from mlx_posttrain.data.types import Example


def mlx_lm(spec: dict[str, Any], gate: Gate) -> None:
    """mlx-lm's training loop.

    Its ``full`` trains the blocks only. Its LoRA is put on the attention and MLP projections of every block,
    as ours is.
    """
    net, config = mlx_model(Path(spec["folder"]), spec["against"])
    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    kind, shape = training_kinds()[spec["what"]], Shape(**spec["shape"])
    train_parts(net, kind.adapter)
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
                first["rows"] = row_numbers(np.array(batch).tolist(), examples)
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
                    raise Finished

    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.eval(net.parameters())
    mx.reset_peak_memory()
    if gate.open():
        with tempfile.TemporaryDirectory() as scratch:
            settings = trainer.TrainingArgs(batch_size=shape.batch_size, **mlx_arguments(scratch, config))
            with contextlib.suppress(Finished):
                adam = mlx_adam(learning_rate(kind.adapter))
                trainer.train(
                    net, adam, data, args=settings, iterate_batches=batches, training_callback=UnitCallback()
                )
    gate.close(device=spec["against"], version=importlib.metadata.version("mlx-lm"), first=first)


def trl(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's SFTTrainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
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
                first.update(rows=row_numbers(rows, examples), tokens=tokens, loss=loss)
            losses.append((loss, tokens))
            return result

    return Recorded


def _supervised(spec: dict[str, Any], gate: Gate, package: str, make: Callable[..., Any]) -> None:
    """Supervised training by the trainer that ``make`` returns.

    make: is called with a model, an adapter's settings or None, a tokenizer, the common arguments, a function
    that makes a trainer's class record its losses, and what else the trainer takes.
    """
    from datasets import Dataset

    kind, shape = training_kinds()[spec["what"]], Shape(**spec["shape"])
    net, tokenizer = torch_model(spec["folder"])
    examples = rows(shape, net.config.vocab_size)
    labels = [
        [token if trained else -100 for token, trained in zip(e.tokens, e.trained, strict=True)]
        for e in examples
    ]
    data = Dataset.from_dict({"input_ids": [list(e.tokens) for e in examples], "labels": labels})
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
        common = common_arguments(scratch, shape.batch_size, learning_rate(kind.adapter))
        common |= {"lr_scheduler_type": "constant", "max_steps": 10**6, "logging_steps": steps}
        trainer = make(
            net,
            peft_config(net, kind.adapter),
            tokenizer,
            common,
            lambda trainer_class: _recorded(trainer_class, examples, first, losses),
            train_dataset=data,
            callbacks=[unit_callback(gate, unit_stats)],
        )
        if gate.open():
            with contextlib.suppress(Finished):
                trainer.train()
    gate.close(device="CPU", version=importlib.metadata.version(package), first=first)
