"""Examples to batches: which rows go together, and the arrays that an engine trains on.

Rows are right-padded. A causal model never looks right, so training needs no padding mask, and because a
batch names its trained positions by flat index, logits are computed for those positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from mlx_posttrain.data.types import Example


class Multiples(NamedTuple):
    """What padded lengths and counts of positions are multiples of.

    So that a compiled step meets few shapes.
    """

    length: int
    positions: int


#: On a CPU, where short rows padded to 32 would be half padding, and padding takes its time.
FINE = Multiples(8, 64)
#: On a GPU, for which a row's padding is cheap and a new shape is not.
COARSE = Multiples(32, 256)

_multiples = FINE


def pad_to(multiples: Multiples) -> None:
    """Choose the multiples for the whole process: an engine's part."""
    global _multiples
    _multiples = multiples


def padded_length(n: int) -> int:
    """The length to which rows of at most ``n`` tokens are padded."""
    return round_up(n, _multiples.length)


def padded_positions(n: int) -> int:
    """The number to which ``n`` trained positions are padded."""
    return round_up(n, _multiples.positions)


#: So many times the rows, and padded tokens, of a training micro-batch go through a model together where
#: there is no gradient. A block's arrays are let go as the next one begins: of GPT-2 a pass holds 14 numbers
#: for each token and unit of width, on MLX two to three times as many, a training step 15 to 25 in every
#: block.
EVALUATION_FACTOR = 4


class PackingRule(NamedTuple):
    """When an engine packs rows into one piece.

    share: of the padded tokens, above which packing gains less than it costs: gathering rows, and on MLX
    compiling further shapes. multiple: of tokens that the piece is padded to.
    """

    share: float
    multiple: int

    def tokens(self, needed: int, padded: int) -> int | None:
        """Tokens of the piece, its padding included; None where packing does not pay.

        needed: without padding; padded: those of the rows, padded to one length.
        """
        found = round_up(needed, self.multiple)
        return found if found <= self.share * padded else None


PACKING = {"mlx": PackingRule(0.7, 64), "torch": PackingRule(0.95, 1)}


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows, padded to T tokens, with N trained positions (padded).

    tokens: [B, T] int32, right-padded with 0 (no pad id is needed: nothing reads a padded position).
    index: [N] int32, ``row * T + t`` of the position whose output predicts ``target``.
    target: [N] int32, the token at ``t + 1``.
    row: [N] int32, the row that a position belongs to.
    mask: [N] float32, 1 at a position that counts, 0 at padding of the index.
    weight: [N] float32, how much a position counts; any number at padding.
    extra: further arrays of a method, by name: PPO's advantages, the margins of pairs.
    units: what the loss is averaged over, summed with the step's other micro-batches of the same ``term``;
        None: the weights.
    term: micro-batches of one step with the same term are averaged together: PPO's own, and the texts mixed
    in.
    """

    tokens: np.ndarray
    index: np.ndarray
    target: np.ndarray
    row: np.ndarray
    mask: np.ndarray
    weight: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    units: float | None = None
    term: str = ""

    @property
    def trained_tokens(self) -> float:
        """The number of positions that count."""
        return float(self.mask.sum())

    @property
    def count(self) -> float:
        """How many units the batch adds to what its loss is averaged over."""
        if self.units is not None:
            return self.units
        return float((self.weight * self.mask).sum())


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


def collate(examples: Sequence[Example], max_length: int | None = None) -> Batch:
    """Pad ``examples`` to one batch.

    ``max_length`` is the model's context: padding never goes beyond it. Raises ValueError if a row is longer.
    """
    longest = max(len(e.tokens) for e in examples)
    length = padded_length(longest)
    if max_length is not None:
        if longest > max_length:
            raise ValueError(f"a row of {longest} tokens does not fit a context of {max_length}")
        length = min(length, max_length)
    tokens = np.zeros((len(examples), length), np.int32)
    index, target, row = [], [], []
    for r, example in enumerate(examples):
        ids = np.asarray(example.tokens, np.int32)
        tokens[r, : len(ids)] = ids
        # A token is predicted from the position before it; the first token of a row is never predicted.
        trained = np.flatnonzero(example.trained[1:])
        index.append(r * length + trained)
        target.append(ids[trained + 1])
        row.append(np.full(len(trained), r))
    n = sum(len(i) for i in index)
    padded = padded_positions(max(n, 1))

    def flat(parts: list[np.ndarray]) -> np.ndarray:
        return np.pad(np.concatenate(parts), (0, padded - n)).astype(np.int32)

    mask = np.zeros(padded, np.float32)
    mask[:n] = 1.0
    return Batch(tokens, flat(index), flat(target), flat(row), mask, np.ones(padded, np.float32))


def layout(tokens: np.ndarray, index: np.ndarray, rule: PackingRule) -> tuple[np.ndarray, np.ndarray] | None:
    """How rows are packed into one piece, in which shared beginnings stand once.

    Nothing behind the last output asked for is in it. None where it does not pay by the engine's
    ``rule``, an entry of PACKING.

    tokens: [B, T] right-padded ids; index: [N] outputs asked for, into B * T flattened. A row shares its
    beginning with the earlier row that it has most in common with: a template with all rows, and behind it a
    prompt with the other answers to it. Returns place, [B, t] of each row's tokens in the piece, 0 behind a
    row's end, t its longest; and owner, [P] index into B * t, flattened, of one row's copy of each token of
    the piece.
    """
    rows, width = tokens.shape
    needed = np.zeros(rows, int)
    np.maximum.at(needed, index // width, index % width + 1)
    place = np.zeros((rows, needed.max()), np.int64)
    owner: list[int] = []
    for r, n in enumerate(needed):
        shared = 0
        if r:
            differs = tokens[:r] != tokens[r]
            alike = np.where(differs.any(1), differs.argmax(1), width)
            common = np.minimum(np.minimum(alike, needed[:r]), n)
            nearest = int(common.argmax())
            shared = int(common[nearest])
            place[r, :shared] = place[nearest, :shared]
        place[r, shared:n] = np.arange(len(owner), len(owner) + n - shared)
        owner += range(r * place.shape[1] + shared, r * place.shape[1] + n)
    pays = rule.tokens(len(owner), tokens.size) is not None
    return (place, np.array(owner, np.int64)) if pays else None


def by_row(batch: Batch, values: np.ndarray) -> list[np.ndarray]:
    """[N, ...] values at a batch's positions as one array per row of the batch."""
    real = batch.mask > 0
    return [values[real & (batch.row == r)] for r in range(len(batch.tokens))]


def with_extra(batch: Batch, extra: Mapping[str, Sequence[np.ndarray]]) -> Batch:
    """The batch carrying more arrays in ``extra`` as [N, ...] float32.

    extra: for each name one array per row of the batch, over its positions, as :func:`by_row` gives them.
    """

    def flat(parts: Sequence[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)
        found = np.zeros((len(batch.mask), *joined.shape[1:]), np.float32)
        found[: len(joined)] = joined
        return found

    return replace(batch, extra={**batch.extra, **{name: flat(parts) for name, parts in extra.items()}})


def _micro_batches(
    rows: list[int], lengths: Sequence[int], batch_size: int, token_budget: int | None
) -> Iterator[list[int]]:
    batch: list[int] = []
    longest = 0
    for i in rows:
        longest = max(longest, lengths[i])
        full = len(batch) == batch_size
        over = token_budget is not None and (len(batch) + 1) * padded_length(longest) > token_budget
        if batch and (full or over):
            yield batch
            batch, longest = [], lengths[i]
        batch.append(i)
    yield batch


def by_length(lengths: Sequence[int], batch_size: int, token_budget: int | None = None) -> list[list[int]]:
    """Row numbers in micro-batches of similar length; every row exactly once."""
    rows = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return list(_micro_batches(rows, lengths, batch_size, token_budget)) if rows else []


def group_similar(
    rows: Sequence[Sequence[int]], shares_prefixes: bool, batch_size: int, token_budget: int | None = None
) -> list[list[int]]:
    """Row numbers in the micro-batches that cost a model least; every row exactly once.

    Rows of similar length; for a model that shares prefixes, which reads what rows share once and no padding,
    rows with their beginnings in common.
    """
    lengths = [len(r) for r in rows]
    if not shares_prefixes:
        return by_length(lengths, batch_size, token_budget)
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    return list(_micro_batches(order, lengths, batch_size, token_budget)) if rows else []


def evaluation_limits(batch_size: int, token_budget: int | None = None) -> tuple[int, int | None]:
    """(rows, padded tokens) of a pass without gradients, from the limits of a training micro-batch.

    See ``EVALUATION_FACTOR``; no limit of tokens stays none.
    """
    return EVALUATION_FACTOR * batch_size, token_budget and EVALUATION_FACTOR * token_budget


def for_evaluation(
    lengths: Sequence[int], batch_size: int, token_budget: int | None = None
) -> list[list[int]]:
    """:func:`by_length` for passes without gradients; see :func:`evaluation_limits`."""
    return by_length(lengths, *evaluation_limits(batch_size, token_budget))
