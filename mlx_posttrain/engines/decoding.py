"""Batched decoding, written once for both engines.

Each prompt is prefilled once and its key/value cache repeated for its samples. All rows then decode together,
one forward pass per token, and rows that have stopped leave the batch. Sampling inverts the cumulative
distribution at one uniform number per (row, step) that NumPy draws ahead of time: a row's text depends on the
seed and its own number only, not on the other rows or on which of them have left. The engines sample the same
tokens until a draw falls between their roundings of a boundary, see docs/architecture.md.

A GPU is given the forward pass of a token before the host has read the token, so that it is never idle. The
host then learns a pass too late that a row has stopped.
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
    """A model with a key/value cache for a batch of rows.

    ahead: whether a token's forward pass is begun before the host has read the token, so that a device that
    works on its own never waits for the host. A batch whose rows all stop has then run one pass too many.
    leave_at: the share of the batch's rows that must have stopped before these leave it.
    """

    ahead: bool
    leave_at: float

    def prefill(self, prompts: Sequence[Sequence[int]], samples: int) -> Array:
        """Left-pad and run P prompts, and repeat each row of the cache ``samples`` times.

        Returns next-token logits, [P * samples, V].
        """

    def advance(self, tokens: Array) -> Array:
        """Append one token to each row; returns next-token logits, [rows, V]."""

    def keep(self, rows: np.ndarray, array: Array) -> Array:
        """Drop all rows but ``rows`` from the cache; returns these rows of ``array``."""

    def pick(
        self, logits: Array, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[Array, Array]:
        """One token per row, and what :meth:`read` takes; see :func:`pick`."""

    def read(self, picked: Array) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a ``pick`` and their log-probabilities, [rows] each."""


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
        tokens = _draw(p, uniforms)
    else:
        order = xp.argsort_descending(p)
        ranked = xp.take_along_axis(p, order, axis=-1)
        before = xp.cumsum(ranked, axis=-1) - ranked
        rank = _draw(xp.where(before < top_p, ranked, xp.zeros_like(ranked)), uniforms)
        tokens = xp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
    return tokens, xp.log(xp.take_along_axis(p, tokens[:, None], axis=-1)[:, 0])


def _draw(p: Array, uniforms: Array) -> Array:
    """The first entry of each row of ``p`` [R, V] at which its running sum exceeds u of the whole.

    Rounding in a sum over V terms neither pushes the draw past the end nor, on a device whose running sums
    are not monotone, on an entry of 0.
    """
    xp = ops(p)
    cdf = xp.where(p > 0, xp.cumsum(p, axis=-1), p)
    return xp.argmax(cdf > uniforms * xp.max(cdf, axis=-1, keepdims=True), axis=-1)


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
    rooms = [math.inf if context is None else context - len(p) for p in prompts for _ in range(samples)]
    limits = np.minimum(max_tokens, rooms).astype(int)
    rows, most = len(limits), int(limits.max())
    # A generator per row: the numbers of a row depend neither on how many rows there are nor on max_tokens.
    uniforms = np.stack(
        [np.random.default_rng([seed, first_row + row]).random(most, dtype=np.float32) for row in range(rows)]
    )
    # A draw of exactly 0 would take the first token, however unlikely, even a forbidden one.
    uniforms = np.maximum(uniforms, np.float32(2**-25))
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    tokens: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    ended_by: list[int | None] = [None] * rows
    # The rows of the batch by their numbers, and which of them go on.
    batch, going = np.arange(rows), np.ones(rows, bool)
    logits = decoder.prefill(prompts, samples)
    bias = forbidden_bias(logits, forbidden) if forbidden else None
    for step in range(most):
        allowed = logits if bias is None else logits + bias
        following, picked = decoder.pick(allowed, uniforms[batch, step], temperature, top_p)
        ahead = decoder.ahead and bool((limits[batch[going]] > step + 1).any())
        if ahead:
            following = decoder.advance(following)
        found, log_p = decoder.read(picked)
        for i in np.flatnonzero(going).tolist():
            row, token = int(batch[i]), int(found[i])
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
        stopped = batch[~going]
        # A row that has stopped and stays in the batch must not outgrow the context.
        if len(stopped) and (
            len(stopped) >= decoder.leave_at * len(batch) or min(rooms[row] for row in stopped) <= step + 1
        ):
            following = decoder.keep(np.flatnonzero(going), following)
            batch, going = batch[going], going[going]
        logits = following if ahead else decoder.advance(following)
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
