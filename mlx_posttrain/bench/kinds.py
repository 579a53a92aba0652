"""The kinds of work that can be timed: those that methods name, decoding, and scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_posttrain.bench.harness import ROLLOUT, characters
from mlx_posttrain.data.labelled import LabelledCollator
from mlx_posttrain.data.read import ModelFacts
from mlx_posttrain.methods import METHODS
from mlx_posttrain.rewards import functions
from mlx_posttrain.training.method import Algorithm, Method

#: Kinds of work that no method names.
OTHER = ("generate", "generate-single", "scaling")


@dataclass(frozen=True)
class Kind:
    """A kind of training: a method and the recipe keys that are set for it."""

    method: Method
    keys: Mapping[str, Any]

    @property
    def on_rollouts(self) -> bool:
        """Whether a unit is an iteration on rollouts rather than a pass over rows."""
        return self.method.trains_on == "rollouts"

    @property
    def adapter(self) -> bool:
        """Whether an adapter is trained."""
        return "adapter" in self.keys

    @property
    def reference_pass(self) -> bool:
        """Whether each step also runs a frozen reference."""
        return not self.on_rollouts and self.method.reference(self._default_recipe()) == "distribution"

    @property
    def scores(self) -> bool:
        """Whether the model scores rows, with a head of one number per row."""
        return self.method.saves(self._default_recipe()) == "classifier"

    @property
    def scored_by_model(self) -> bool:
        """Whether answers are scored by a reward model rather than by their number of characters."""
        return "critic" in self.method.Recipe.model_fields

    @property
    def algorithm(self) -> Algorithm:
        """What an iteration on rollouts does."""
        assert self.method.algorithm is not None
        return self.method.algorithm(self._default_recipe())

    @property
    def rows_per_item(self) -> int:
        """1 where rows are trained on; 2 for pairs of rows, and for answers beside mismatched ones."""
        return 1 if self.on_rollouts else self._collator().rows_per_item

    @property
    def labelled(self) -> bool:
        """Whether single answers are trained on, each beside a mismatched one."""
        return not self.on_rollouts and isinstance(self._collator(), LabelledCollator)

    def _collator(self) -> Any:
        facts = ModelFacts(SimpleNamespace(pad_token_id=0, eos_token_id=0), None, {})
        return self.method.collator(self._default_recipe(), facts)

    def _default_recipe(self) -> Any:
        return self.recipe("tiny", "auto", 8, None)

    def recipe(
        self,
        model: str | Path,
        engine: str,
        batch_size: int,
        reward: str | None,
        dtype: str = "float32",  # as the other trainers
    ) -> Any:
        """The recipe of a unit.

        reward: the reward model of a method that trains on rollouts. dtype: of a frozen base.
        """
        data = {"source": "embedded/tasks", "template": "none"}
        keys: dict[str, Any] = {
            "method": self.method.name,
            "model": str(model),
            "engine": engine,
            "dtype": dtype,
            "data": data,
        }
        if self.on_rollouts:
            answers = ROLLOUT["prompts"] * ROLLOUT["samples"]
            accumulation = max(1, answers // batch_size)
            keys["train"] = {"batch_size": batch_size, "grad_accumulation": accumulation}
            keys["rollout"] = {**ROLLOUT, "missing_eos_penalty": None}
            scored = {"model": reward or "tiny"}
            if not self.scored_by_model:
                scored = {"function": functions.register(characters)}
            keys["reward"] = [scored]
        else:
            keys["train"] = {"batch_size": batch_size}
        return self.method.Recipe.model_validate({**keys, **self.keys})


def training_kinds() -> dict[str, Kind]:
    """The kinds of training that methods name, by name."""
    return {name: Kind(m, keys) for m in METHODS.values() for name, keys in m.bench.items()}


def kind_names() -> tuple[str, ...]:
    """The names of all kinds of work."""
    return (*training_kinds(), *OTHER)


def on_rollouts(what: str) -> bool:
    """Whether a unit of a kind of work is an iteration on rollouts."""
    kind = training_kinds().get(what)
    return kind is not None and kind.on_rollouts
