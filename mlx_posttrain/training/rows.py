"""Learning from fixed rows: one optimizer step on the next micro-batches of a dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.console import log
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.data.dataset import Dataset
from mlx_posttrain.engines.base import Engine, Loss, Model
from mlx_posttrain.training.checks import check_settings, fingerprint
from mlx_posttrain.training.optimizer import adamw

#: Held-out figures that a mixture's sources have each: the loss, and the share of pairs that are right.
BY_SOURCE = ("loss", "accuracy", "rewards/accuracies")


class RowLearner:
    """A model, its optimizer, and the dataset that it is trained on; see loop.Learner.

    metrics: from the loss's metrics, summed over a step or an evaluation, to those that are logged.
    prepare: called once before the first step, to give the dataset what its batches carry besides.
    """

    select_by = "loss"
    finite = ("loss", "loss")

    def __init__(
        self,
        engine: Engine,
        model: Model,
        loss: Loss,
        dataset: Dataset,
        *,
        metrics: Callable[[Mapping[str, float]], dict[str, float]] = dict,
        samples: Callable[[int], None] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self.model, self.loss, self.dataset = model, loss, dataset
        self.steps = dataset.steps
        self.trainer = engine.trainer(model, adamw(dataset.settings))
        self.trainers = {"optimizer": self.trainer}
        self._metrics, self._samples, self._prepare = metrics, samples, prepare
        self._by_source = dataset.evaluation_by_source()
        self._last: Sequence[Batch] = ()

    def check(self) -> None:
        check_settings(self.dataset, self._held_out)
        if not self._held_out and self.dataset.settings.select == "best":
            log(
                "there are no held-out rows to choose the best weights by: final/ will hold those of the "
                "last "
                "step"
            )

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        return fingerprint(self.dataset, self._held_out)

    def parameter_counts(self) -> tuple[int, int]:
        return self.model.parameter_counts()

    def trained_parameters(self) -> int:
        return self.model.parameter_counts()[1]

    def prepare(self) -> None:
        if self._prepare is not None:
            self._prepare()
            self._by_source = self.dataset.evaluation_by_source()

    @property
    def _held_out(self) -> list[Batch]:
        return [batch for batches in self._by_source.values() for batch in batches]

    def begin(self) -> None:
        pass

    def step(self, step: int, lr: float) -> dict[str, float]:
        self._last = self.dataset.micro_batches(self.dataset.rows(step))
        metrics = self._metrics(self.trainer.step(self.loss, self._last, lr))
        tokens = sum(b.trained_tokens for b in self._last)
        return {"epoch": (step + 1) / self.dataset.steps_per_epoch, "tokens": tokens, **metrics}

    def headline(self, record: Mapping[str, float]) -> float:
        return record["loss"]

    def advice(self, step: int) -> str:
        numbers = [i for part in self.dataset.rows(step) for i in part][:16]
        return (
            f"The batch: training rows {numbers}, counted from 0 after filtering. Look at those rows, or "
            "start "
            "anew with a lower train.lr"
        )

    def problem(self) -> str | None:
        after = self.model.evaluate(self.loss, self._last[:1])["loss"]
        return None if math.isfinite(after) else f"the loss with the weights that it made is {after}"

    def evaluate(self) -> dict[str, float] | None:
        """Metrics over all held-out items and, of a mixture, those in ``BY_SOURCE`` of each source too."""
        if not self._by_source:
            return None
        found = {name: self.model.evaluate(self.loss, part) for name, part in self._by_source.items()}
        units = {name: sum(b.count for b in part) for name, part in self._by_source.items()}
        whole = {
            metric: sum(found[name][metric] * (units[name] / sum(units.values())) for name in found)
            for metric in next(iter(found.values()))
        }
        metrics = self._metrics(whole)
        for name, sums in found.items():
            if name:
                of_source = self._metrics(sums)
                metrics |= {f"{m}/{name}": of_source[m] for m in BY_SOURCE if m in of_source}
        return metrics

    def describe(self, metrics: Mapping[str, float]) -> str:
        parts = [f"{name} {metrics[f'loss/{name}']:.4f}" for name in self._by_source if name]
        return f"held-out loss {metrics['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else "")

    def write_samples(self, step: int) -> None:
        if self._samples is not None:
            self._samples(step)

    def save(self, folder: Path) -> None:
        self.model.save(folder / "weights")
        self.trainer.save(folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        self.model.load_trained(folder / "weights")
        self.trainer.load(folder / "optimizer.safetensors")

    def save_model(self, folder: Path) -> None:
        self.model.save(folder)

    def load_model(self, folder: Path) -> None:
        self.model.load_trained(folder)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
