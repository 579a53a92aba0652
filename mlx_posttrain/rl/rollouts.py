"""Rollouts: a policy's completions of prompts, and token-aligned statistics of them as batches to train on.

Token ids are kept as they were sampled and never decoded and encoded again: another spelling of the same text
would have other log-probabilities. A completion's tokens end with the stop token where the policy gave one;
what it would have written after it is not part of the completion. NumPy only; models are asked through the
engine's protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_posttrain.data.batches import Batch, collate, group_similar, with_extra
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines import decoding
from mlx_posttrain.engines.base import Model, Stop

#: Statistics of completions by name: for each completion an array over its tokens.
Stats = Mapping[str, Sequence[np.ndarray]]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, the text of its last turn, and the row's other columns for reward functions.

    source: the name of the row's source in a mixture.
    """

    tokens: tuple[int, ...]
    text: str
    columns: Mapping[str, Any]
    source: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Completion:
    """A sampled completion of a prompt.

    tokens: its ids, the stop token included when ``stopped``.
    text: without outer white space.
    logprobs: of each token under the policy that sampled it, at the sampling temperature, in nats.
    group: number of the prompt within the step; completions of one prompt share it.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    stopped: bool
    text: str
    logprobs: tuple[float, ...] = ()
    group: int = 0

    @property
    def row(self) -> tuple[int, ...]:
        """Prompt and completion: what reward model, policy and critic read."""
        return self.prompt.tokens + self.tokens

    @property
    def example(self) -> Example:
        """The row with the completion's tokens marked."""
        return Example(self.row, (False,) * len(self.prompt.tokens) + (True,) * len(self.tokens))


def sample(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    stop: Stop,
    seed: int,
    token_budget: int,
) -> list[Completion]:
    """``samples`` completions of each prompt from the full softmax.

    Entry ``p * samples + s`` is sample s of prompt p.

    Decode batches are bounded by ``token_budget`` (decoding.in_batches); a completion's tokens depend on
    ``seed`` and its place in the list, not on the budget. Raises UserError for a prompt that leaves no room
    in the context.
    """
    generated = decoding.in_batches(
        model,
        [p.tokens for p in prompts],
        max_tokens=max_tokens,
        samples=samples,
        token_budget=token_budget,
        stop=stop,
        temperature=temperature,
        seed=seed,
    )
    return [
        Completion(
            prompts[i // samples],
            tuple(g.tokens) if g.stop is None else (*g.tokens, g.stop),
            g.stopped,
            tokenizer.decode(g.tokens).strip(),
            tuple(g.logprobs),
            i // samples,
        )
        for i, g in enumerate(generated)
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


def collate_stats(examples: Sequence[Example], stats: Stats, context: int | None) -> Batch:
    """A batch of examples with token-aligned statistics in ``extra``, as [N] float32."""
    return with_extra(collate(examples, context), stats)


def minibatches(
    rows: Sequence[Sequence[int]],
    *,
    shares_prefixes: bool,
    batch_size: int,
    grad_accumulation: int,
    token_budget: int | None,
    rng: np.random.Generator,
) -> list[list[list[int]]]:
    """One pass over all rows in a new order: optimizer steps, each a list of micro-batches of row numbers.

    A step has at most ``batch_size * grad_accumulation`` random rows, and all steps as many but for one: a
    small rest would move the weights as far as a whole step. Rows are sorted within a step only
    (:func:`~mlx_posttrain.data.batches.group_similar`): a step made of one length or of one prompt would not
    be a fair sample of the completions.
    """
    order = rng.permutation(len(rows))
    size = batch_size * grad_accumulation
    steps = [part.tolist() for part in np.array_split(order, -(-len(order) // size))]
    limits = (shares_prefixes, batch_size, token_budget)
    return [
        [[step[i] for i in part] for part in group_similar([rows[r] for r in step], *limits)]
        for step in steps
    ]
