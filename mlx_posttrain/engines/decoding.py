"""Batched decoding, written once for both engines.

Each prompt is prefilled once and its key/value cache repeated for its samples. All rows then decode together,
one forward pass per token, and rows that have stopped leave the batch. Sampling inverts the cumulative
distribution at one uniform number per (row, step) that NumPy draws ahead of time: a row's text depends on the
seed and its own number only, not on the other rows or on which of them have left. The engines sample the same
tokens until a draw falls between their roundings of a boundary, see docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mlx_posttrain.data.batches import round_up
from mlx_posttrain.engines.base import Generated, Model, Stop
from mlx_posttrain.errors import UserError
from mlx_posttrain.ops import ops

Array = Any

#: Positions by which mlx-lm's caches grow at a time: a row of 20 tokens takes the memory of 256.
CACHE_BLOCK = 256
#: The same for the torch engine's caches.
TORCH_CACHE_BLOCK = 64
#: Cached positions of one decode batch: 0.6 GB of keys and values with GPT-2 124M.
TOKEN_BUDGET = 32 * CACHE_BLOCK


class Decoder(Protocol):
    """A model with a key/value cache for a batch of rows."""

    def prefill(self, prompts: Sequence[Sequence[int]], samples: int) -> Array:
        """Left-pad and run P prompts, and repeat each row of the cache ``samples`` times.

        Returns next-token logits, [P * samples, V].
        """

    def advance(self, tokens: np.ndarray) -> Array:
        """Append one token to each row; returns next-token logits, [rows, V]."""

    def keep(self, rows: np.ndarray) -> None:
        """Drop all rows but ``rows`` from the cache."""

    def pick(
        self, logits: Array, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token per row and its log-probability; see :func:`pick`."""


def pick(logits: Array, uniforms: Array, temperature: float, top_p: float) -> tuple[Array, Array]:
    """Sample one token per row by inverse CDF; returns it and its log-probability, [R] each.

    logits: [R, V] float32; uniforms: [R, 1] in (0, 1). A temperature of 0 takes the largest logit. ``top_p``
    < 1 samples from the nucleus (Holtzman et al. 2020, section 3.1), the smallest set of tokens whose
    probability reaches top_p. The log-probability is always that of the full softmax at the temperature,
    which is what reinforcement learning needs.
    """
    xp = ops(logits)
    p = xp.softmax(logits / temperature if temperature > 0 else logits, axis=-1)
    if temperature == 0:
        tokens = xp.argmax(logits, axis=-1)
    elif top_p >= 1:
        cdf = xp.cumsum(p, axis=-1)
        # The first entry above u times the last one, so that rounding in a sum over V terms cannot push the
        # draw past the end.
        tokens = xp.argmax(cdf > uniforms * cdf[:, -1:], axis=-1)
    else:
        order = xp.argsort_descending(p)
        ranked = xp.take_along_axis(p, order, axis=-1)
        before = xp.cumsum(ranked, axis=-1) - ranked
        cdf = xp.cumsum(xp.where(before < top_p, ranked, xp.zeros_like(ranked)), axis=-1)
        rank = xp.argmax(cdf > uniforms * cdf[:, -1:], axis=-1)
        tokens = xp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
    return tokens, xp.log(xp.take_along_axis(p, tokens[:, None], axis=-1)[:, 0])


def forbidden_bias(logits: Array, forbidden: Sequence[int]) -> Array:
    """A bias [1, V] for ``logits`` [R, V]: -inf at the forbidden tokens and 0 at all others."""
    bias = ops(logits).zeros_like(logits[:1])
    for token in forbidden:
        bias[:, token] = -math.inf
    return bias


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    context: int | None,
    max_tokens: int,
    stop: Stop,
    temperature: float,
    top_p: float,
    samples: int,
    seed: int,
    first_row: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    forbidden: Sequence[int] = (),
) -> list[Generated]:
    """``samples`` completions of each prompt; entry ``p * samples + s`` is sample s of prompt p.

    A row ends at a token of ``stop``, after ``max_tokens``, or where prompt and completion fill the
    ``context``. ``on_token(row, token)`` is called as tokens appear. ``first_row`` is the number of the first
    row: prompts decoded in several batches get the numbers, and so the texts, that they would have in one.
    ``forbidden`` tokens are never sampled, and log-probabilities are then those of the softmax over the
    others; with the ends of text among them every completion has full length. Raises UserError for an empty
    prompt and for one that leaves no room in the context.
    """
    if not prompts:
        return []
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise UserError("a prompt is empty: give at least one token")
    if context is not None and longest >= context:
        raise UserError(
            f"a prompt of {longest} tokens leaves no room in the model's context of {context}; shorten it"
        )
    limits = [
        max_tokens if context is None else min(max_tokens, context - len(p))
        for p in prompts
        for _ in range(samples)
    ]
    rows = len(limits)
    # A generator per row: the numbers of a row depend neither on how many rows there are nor on max_tokens.
    uniforms = np.stack(
        [
            np.random.default_rng([seed, first_row + row]).random(max(limits), dtype=np.float32)
            for row in range(rows)
        ]
    )
    # A draw of exactly 0 would take the first token, however unlikely, even a forbidden one.
    uniforms = np.maximum(uniforms, np.float32(2**-25))
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    tokens: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    ended_by: list[int | None] = [None] * rows
    alive = np.arange(rows)
    logits = decoder.prefill(prompts, samples)
    bias = forbidden_bias(logits, forbidden) if forbidden else None
    for step in range(max(limits)):
        allowed = logits if bias is None else logits + bias
        picked, log_p = decoder.pick(allowed, uniforms[alive, step], temperature, top_p)
        going = np.ones(len(alive), bool)
        for i, (row, token) in enumerate(zip(alive.tolist(), picked.tolist(), strict=True)):
            logprobs[row].append(float(log_p[i]))
            if token in ends:
                ended_by[row] = token
                going[i] = False
                continue
            tokens[row].append(token)
            if on_token is not None:
                on_token(row, token)
            going[i] = len(tokens[row]) < limits[row]
        if not going.any():
            break
        if not going.all():
            decoder.keep(np.flatnonzero(going))
            alive, picked = alive[going], picked[going]
        logits = decoder.advance(picked)
    return [
        Generated(t, p, end is not None, end) for t, p, end in zip(tokens, logprobs, ended_by, strict=True)
    ]


def in_batches(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    samples: int = 1,
    token_budget: int = TOKEN_BUDGET,
    **settings: Any,
) -> Iterator[Generated]:
    """``model.generate`` for any number of prompts.

    Each decode batch has at most ``token_budget`` cached positions, or one row. The texts are those that a
    single batch would give, since a row's random numbers come from the seed and its number among all rows.
    """
    for batch, at_once in split(
        [len(p) for p in prompts], samples, min(max_tokens, model.context or max_tokens), token_budget
    ):
        for first in range(0, samples, at_once):
            yield from model.generate(
                prompts[batch],
                max_tokens=max_tokens,
                samples=min(at_once, samples - first),
                first_row=batch.start * samples + first,
                **settings,
            )


def split(
    lengths: Sequence[int], samples: int, answer_tokens: int, token_budget: int
) -> Iterator[tuple[slice, int]]:
    """Divide prompts into decode batches of at most ``token_budget`` cached positions.

    lengths: tokens of each prompt. Yields for each batch which prompts it takes and how many samples of each
    are decoded at a time: fewer than ``samples`` where those of a single prompt would be too many.
    """

    def positions(prompt_tokens: int) -> int:
        return round_up(prompt_tokens + answer_tokens, CACHE_BLOCK)

    begin = 0
    while begin < len(lengths):
        end, longest = begin, 0
        while end < len(lengths):
            longest = max(longest, lengths[end])
            if end > begin and (end + 1 - begin) * samples * positions(longest) > token_budget:
                break
            end += 1
        yield (
            slice(begin, end),
            samples if end > begin + 1 else max(1, min(samples, token_budget // positions(lengths[begin]))),
        )
        begin = end
