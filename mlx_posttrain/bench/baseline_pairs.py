"""Preference optimisation by other trainers: TRL's DPO and KTO, and mlx-lm-lora's DPO.

As for supervised training (baseline_rows.py) each keeps its own defaults, and what is recorded of its first
batch shows whether it does the same work: the rows, the number of tokens in their answers, and the answers'
negative log-likelihood per token before any update, since the loss itself is the same for every model then.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.bench.baseline_parts import (
    Finished,
    common_arguments,
    lend_device_facts,
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
from mlx_posttrain.bench.inputs import Shape, labelled, rows
from mlx_posttrain.bench.kinds import training_kinds
from mlx_posttrain.data.types import Example


def trl(spec: dict[str, Any], gate: Gate, *, kept: bool = False) -> None:
    """TRL's DPOTrainer or KTOTrainer.

    kept: compute the reference's log-probabilities before training, as we do, rather than in each step.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    kind, shape = training_kinds()[spec["what"]], Shape(**spec["shape"])
    net, tokenizer = torch_model(spec["folder"])
    examples = rows(shape, net.config.vocab_size)
    batch_size = max(1, shape.batch_size // 2)
    if kind.labelled:
        items = labelled(examples, batch_size)
        examples = [item.answer for item in items]
        data = [
            {
                "prompt_ids": _prompt(item.answer),
                "completion_ids": _answer(item.answer),
                "KL_completion_ids": _answer(item.mismatched),
                "label": item.good,
            }
            for item in items
        ]
    else:
        data = [
            {"prompt_ids": _prompt(a), "chosen_ids": _answer(a), "rejected_ids": _answer(b)}
            for a, b in zip(examples[::2], examples[1::2], strict=True)
        ]
    trainer_class, config = (KTOTrainer, KTOConfig) if kind.labelled else (DPOTrainer, DPOConfig)
    tokens, steps = float(sum(sum(e.trained) for e in examples)), len(data) // batch_size
    first: dict[str, Any] = {}
    losses: list[float] = []

    class Recorded(trainer_class):  # type: ignore[misc,valid-type]
        """Takes tokens as they are, and records its first batch and the loss of every batch."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append(float(result))
            if not first:
                numbers, count = inputs["input_ids"].tolist(), int(inputs["completion_mask"].sum())
                good = int(sum(inputs["label"])) if "label" in inputs else len(numbers) // 2
                sums = {"chosen": good, "rejected": len(numbers) - good}
                logps = sum(n * self._metrics["train"][f"logps/{side}"][-1] for side, n in sums.items() if n)
                first.update(rows=row_numbers(numbers, examples), tokens=count, loss=-logps / count)
            return result

    def unit_stats(logs: dict[str, float]) -> dict[str, float] | None:
        if "loss" not in logs:
            return None
        mean = sum(losses) / len(losses)
        losses.clear()
        return {"loss": mean, "rows": len(examples), "tokens": tokens, "steps": steps}

    with tempfile.TemporaryDirectory() as scratch:
        common = common_arguments(scratch, batch_size, learning_rate(kind.adapter))
        common |= {"lr_scheduler_type": "constant", "max_steps": 10**6, "logging_steps": steps}
        trainer = Recorded(
            model=net,
            args=config(**common, max_length=None, precompute_ref_log_probs=kept),
            processing_class=tokenizer,
            peft_config=peft_config(net, kind.adapter),
            train_dataset=Dataset.from_list(data),
            callbacks=[unit_callback(gate, unit_stats)],
        )
        if gate.open():
            with contextlib.suppress(Finished):
                trainer.train()
    gate.close(device="CPU", version=importlib.metadata.version("trl"), first=first)


def _prompt(example: Example) -> list[int]:
    return list(example.tokens[: example.answer_start])


def _answer(example: Example) -> list[int]:
    return list(example.tokens[example.answer_start :])


def mlx_lm_lora(spec: dict[str, Any], gate: Gate) -> None:
    """mlx-lm-lora's DPO, whose reference is a second model that it asks in each step.

    It would train on prompts too; here it is told where they end, in the way that it has for that.
    """
    net, config = mlx_model(Path(spec["folder"]), spec["against"])
    import mlx.core as mx
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm_lora.trainer import dpo_trainer

    lend_device_facts()
    kind, shape = training_kinds()[spec["what"]], Shape(**spec["shape"])
    reference, _ = mlx_model(Path(spec["folder"]), spec["against"])
    train_parts(net, kind.adapter)
    examples = rows(shape, config["vocab_size"])
    data = [_sides(a, b) for a, b in zip(examples[::2], examples[1::2], strict=True)]
    batch_size = max(1, shape.batch_size // 2)
    tokens, steps = float(sum(sum(e.trained) for e in examples)), len(data) // batch_size
    first: dict[str, Any] = {}
    losses: list[float] = []
    iterate = dpo_trainer.iterate_dpo_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in iterate(*args, **kwargs):
            if not first:
                found = [row for side in batch[:2] for row in side.tolist()]
                first.update(rows=row_numbers(found, examples), tokens=sum(m.sum().item() for m in batch[2:]))
            yield batch

    class UnitCallback(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            losses.append(info["train_loss"])
            if "loss" not in first:
                # its names: these are means over the pairs of the answers' summed log-probabilities
                sums = sum(float(info[f"train_{side}_logits_mean"]) for side in ("chosen", "rejected"))
                first["loss"] = -sums * batch_size / first["tokens"]
            if len(losses) == steps:
                gate.report(loss=sum(losses) / steps, rows=len(examples), tokens=tokens, steps=steps)
                losses.clear()
                if not gate.open():
                    raise Finished

    gate.peak = lambda: mx.get_peak_memory() / 2**30
    mx.eval(net.parameters(), reference.parameters())
    mx.reset_peak_memory()
    if gate.open():
        dpo_trainer.iterate_dpo_batches = batches
        with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(Finished):
            settings = dpo_trainer.DPOTrainingArgs(batch_size=batch_size, **mlx_arguments(scratch, config))
            adam = mlx_adam(learning_rate(kind.adapter))
            dpo_trainer.train_dpo(net, reference, adam, data, args=settings, training_callback=UnitCallback())
    gate.close(device=spec["against"], version=importlib.metadata.version("mlx-lm-lora"), first=first)


def _sides(chosen: Example, rejected: Example) -> dict[str, Any]:
    """A pair as mlx-lm-lora's trainer takes it."""
    sides: Sequence[tuple[str, Example]] = (("chosen", chosen), ("rejected", rejected))
    tokens = {name: list(e.tokens) for name, e in sides}
    return {**tokens, **{f"{name}_prompt_length": e.answer_start for name, e in sides}}
