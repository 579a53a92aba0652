"""What completions are worth: reward models and reward functions, weighted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from mlx_posttrain.config import Section
from mlx_posttrain.console import log
from mlx_posttrain.data import pairs
from mlx_posttrain.data.batches import group_similar
from mlx_posttrain.engines.base import Engine, Model, check_fits
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards import functions
from mlx_posttrain.rl.rollouts import Completion

#: Padded tokens that are scored at once: of GPT-2 124M 0.35 GB without gradients, and 1.2 GB in rows of
#: 1,024, whose attention weighs more.
TOKEN_BUDGET = 8192


class RewardEntry(Section):
    """One reward: a model or a function."""

    model: str | None = Field(
        None, description="a reward run, a sequence-classifier folder with one label, or a hub id of one"
    )
    function: str | None = Field(
        None,
        description="f(prompts, completions, **columns) -> list of float or None: module:name, "
        f"file.py:name, or {', '.join(functions.BUILT_IN)}",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")
    timeout: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description=f"seconds that one call of the function may take; null: {functions.TIMEOUT:g}, or for "
        "python_tests only what each answer may take",
    )
    weight: float = Field(1.0, ge=-1e6, le=1e6, description="of this reward in the sum")
    normalise: bool | None = Field(
        None,
        description="bring scores to mean 0 and standard deviation 1 on the reference's answers; "
        "null: for models, not for functions",
    )

    @model_validator(mode="after")
    def _one(self) -> RewardEntry:
        if (self.model is None) == (self.function is None):
            raise ValueError("a reward is a model or a function: give one of the two")
        if self.function is None and (self.args or self.timeout is not None):
            raise ValueError("args and timeout are a function's: a model takes none")
        if self.function in functions.BUILT_IN:
            try:
                self.load()
            except UserError as error:
                raise ValueError(str(error)) from None
        return self

    @classmethod
    def entry(cls, text: str) -> dict[str, Any]:
        """The function or the model that a plain text names."""
        return {"function" if text in functions.BUILT_IN or ":" in text else "model": text}

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.function or self.model)

    @property
    def short_name(self) -> str:
        """The function's name, or that of the model's folder."""
        if self.function is not None:
            return self.function.rpartition(":")[2]
        path = Path(str(self.model))
        return path.parent.name if path.name == "final" and path.parent.name else path.name

    @property
    def limit(self) -> float | None:
        """Seconds that a call may take."""
        # All of a step's answers may loop endlessly, which must not end the run.
        return self.timeout or (None if self.function == "python_tests" else functions.TIMEOUT)

    def load(self) -> functions.RewardFunction:
        """Return the function with its arguments filled in; see functions.load and functions.bind."""
        return functions.bind(functions.load(self.name, self.limit), self.args, self.name)


@dataclass(frozen=True)
class Scores:
    """What completions are worth.

    total: the weighted sum, [R], nan where no reward has a score. parts: each reward's own scores by its name
    in ``Scorer.names``, neither weighted nor normalised, [R], nan where it has none.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]


def score_rows(model: Model, rows: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    """A reward model's score of each row of token ids, [R] float64, in order.

    Raises UserError for a row beyond the context.
    """
    check_fits(max(map(len, rows), default=0), model.context)
    found = np.zeros(len(rows))
    for chunk in group_similar(rows, model.shares_prefixes, len(rows), TOKEN_BUDGET):
        batch = pairs.collate_scores([rows[i] for i in chunk], pad, model.context)
        found[chunk] = model.apply(lambda m, b: {"scores": m.scores(b)}, [batch])[0]["scores"]
    return found


class Scorer:
    """Weighted sum of rewards, each on its own scale or normalised on the reference's answers.

    names: a short name for each reward, numbered from the second of its kind: brief, brief_2.
    """

    def __init__(self, entries: Sequence[RewardEntry], engine: Engine, tokenizer: Any, template: str):
        self.entries = entries
        self.names = _numbered([entry.short_name for entry in entries])
        self._models: dict[int, tuple[Model, int]] = {}
        self._functions: dict[int, Any] = {}
        self._normalisers: dict[int, functions.Normaliser] = {}
        for i, entry in enumerate(entries):
            if entry.model is not None:
                self._models[i] = _reward_model(entry.model, engine, tokenizer, template)
            else:
                self._functions[i] = entry.load()
            if entry.normalise if entry.normalise is not None else entry.model is not None:
                self._normalisers[i] = functions.Normaliser()

    def parts(self, completions: Sequence[Completion]) -> list[np.ndarray]:
        """Each reward's own scores, [R], nan where it has none."""
        found = []
        for i, entry in enumerate(self.entries):
            if i in self._models:
                model, pad = self._models[i]
                found.append(score_rows(model, [c.row for c in completions], pad))
            else:
                names = dict.fromkeys(name for c in completions for name in c.prompt.columns)
                columns: dict[str, list[Any]] = {
                    name: [c.prompt.columns.get(name) for c in completions] for name in names
                }
                columns["completion_ids"] = [list(c.tokens) for c in completions]
                prompts, texts = [c.prompt.text for c in completions], [c.text for c in completions]
                found.append(
                    functions.call(self._functions[i], prompts, texts, columns, entry.name, entry.limit)
                )
        return found

    @property
    def normalises(self) -> bool:
        """Whether a reward is brought to the scale of the reference's answers."""
        return bool(self._normalisers)

    def normalise_on(self, completions: Sequence[Completion]) -> None:
        """Fit the normalisers on the reference's answers (Ziegler et al. 2019, section 2.2)."""
        if self._normalisers:
            for i, scores in enumerate(self.parts(completions)):
                if i in self._normalisers:
                    self._normalisers[i].fit(scores)

    def check_context(self, length: int) -> None:
        """Raise UserError, naming the reward model, if one cannot read ``length`` tokens."""
        for i, (model, _) in self._models.items():
            if model.context is not None and length > model.context:
                raise UserError(
                    f"{self.entries[i].name}: it reads {model.context} tokens, and the longest prompt with "
                    f"rollout.max_tokens has {length}: "
                    "lower data.max_length or rollout.max_tokens"
                )

    def share_of(self, model: str) -> tuple[float, float]:
        """(factor, offset) with which a reward model's score enters the sum: factor * score + offset."""
        for i, entry in enumerate(self.entries):
            if entry.model == model:
                scale = self._normalisers.get(i, functions.Normaliser())
                return entry.weight / scale.std, -entry.weight * scale.mean / scale.std
        raise ValueError(f"{model} is not among the rewards")

    def score(self, completions: Sequence[Completion]) -> Scores:
        """The weighted sum and each reward's own scores, from asking each once."""
        if not self.entries or not completions:
            nothing = np.full(len(completions), np.nan)
            return Scores(nothing, dict.fromkeys(self.names, nothing))
        parts = self.parts(completions)
        scaled = [
            self._normalisers[i](part) if i in self._normalisers else part for i, part in enumerate(parts)
        ]
        total = functions.combine(scaled, [entry.weight for entry in self.entries])
        return Scores(total, dict(zip(self.names, parts, strict=True)))

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """[R] scores, nan where no reward has one."""
        return self.score(completions).total

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {str(i): n.state() for i, n in self._normalisers.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        for key, value in state.items():
            self._normalisers[int(key)].restore(value)


def _numbered(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(2))
        found.append(next(n for n in itertools.chain([name], others) if n not in found))
    return found


def _reward_model(name: str, engine: Engine, tokenizer: Any, template: str) -> tuple[Model, int]:
    model, own, source = open_model(name, engine.name, scores=True, beside=tokenizer)
    # Tokens of its own, a pad token for one, do no harm: no answer has them.
    known = own.get_vocab()
    if any(known.get(token) != number for token, number in tokenizer.get_vocab().items()):
        raise UserError(
            f"{name}: its tokenizer is not the policy's; answers are scored as token ids, so both must "
            "share one (train the reward model on the policy's base)"
        )
    trained = source.template
    if trained is not None and trained != template:
        log(
            f"{name} was trained with the template {trained!r}, and the prompts here use {template!r}: its "
            "scores may mean little"
        )
    return model, pad_id(model.config, own)
