"""Rollouts: a policy's answers to prompts, and token-aligned figures about them as batches to train on.

Token ids are kept as they were sampled and never decoded and encoded again: another spelling of the same text
would have other log-probabilities. An answer's tokens end with the stop token where the policy gave one; what
it would have said after it is not part of the answer. NumPy only; models are asked through the engine's
protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data.batches import Batch, alike, collate, with_rows
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines import decoding
from mlx_posttrain.engines.base import Model


@dataclass(frozen=True)
class Question:
    """A prompt as token ids and as its last turn's text, and the row's other columns for reward functions."""

    tokens: tuple[int, ...]
    text: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its token ids (the stop token included when ``stopped``), its text without outer
    white space.
    """

    question: Question
    tokens: tuple[int, ...]
    stopped: bool
    text: str

    @property
    def row(self) -> tuple[int, ...]:
        """Prompt and answer: what reward model, policy and critic read."""
        return self.question.tokens + self.tokens

    @property
    def example(self) -> Example:
        """The row with the answer's tokens marked."""
        return Example(self.row, (False,) * len(self.question.tokens) + (True,) * len(self.tokens))


def sample(
    model: Model,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    stop: int,
    seed: int,
    token_budget: int,
) -> list[Answer]:
    """``samples`` answers to each question from the full softmax; entry ``q * samples + s`` is sample s of
    question q.

    Decode batches are bounded by ``token_budget`` (decoding.in_batches); an answer's tokens depend on
    ``seed`` and its place in the list, not on the budget. Raises UserError for a prompt that leaves no room
    in the context.
    """
    completions = decoding.in_batches(
        model,
        [q.tokens for q in questions],
        max_tokens=max_tokens,
        samples=samples,
        token_budget=token_budget,
        stop=stop,
        temperature=temperature,
        seed=seed,
    )
    return [
        Answer(
            questions[i // samples],
            (*c.tokens, stop) if c.stopped else tuple(c.tokens),
            c.stopped,
            tokenizer.decode(c.tokens).strip(),
        )
        for i, c in enumerate(completions)
    ]


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as [R, T] float64, and a mask [R, T] that is 1 where a row has a value."""
    width = max(len(r) for r in rows)
    values, mask = np.zeros((len(rows), width)), np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
        mask[i, : len(row)] = 1.0
    return values, mask


def unpadded(values: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The rows back from :func:`padded`."""
    return [row[: int(m.sum())] for row, m in zip(values, mask, strict=True)]


def with_figures(
    examples: Sequence[Example], figures: Mapping[str, Sequence[np.ndarray]], context: int | None
) -> Batch:
    """A batch of examples that carries token-aligned figures, one array per example and name, in ``extra`` as
    [N] float32.
    """
    return with_rows(collate(examples, context), figures)


def minibatches(
    rows: Sequence[Sequence[int]],
    *,
    packs: bool,
    batch_size: int,
    accumulate: int,
    token_budget: int | None,
    rng: np.random.Generator,
) -> list[list[list[int]]]:
    """One pass over all rows in a new order: optimizer steps of ``batch_size * accumulate`` random rows, cut
    into micro-batches.

    Rows are sorted within a step only (:func:`~mlx_posttrain.data.batches.alike`): a step made of one length
    or of one prompt would not be a fair sample of the answers.
    """
    order = rng.permutation(len(rows))
    group = batch_size * accumulate
    steps = [order[i : i + group].tolist() for i in range(0, len(order), group)]
    return [
        [[step[i] for i in part] for part in alike([rows[r] for r in step], packs, batch_size, token_budget)]
        for step in steps
    ]
