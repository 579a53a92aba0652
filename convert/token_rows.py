"""Rows of an embedding that are trained beside a LoRA adapter: PEFT's `trainable_token_indices`.

PEFT keeps the rows themselves, not what was added to them, in the order of the indices in its config, as
`base_model.model.<embedding>.token_adapter.trainable_tokens_delta` (n, d). A tied head follows the embedding;
one that is not tied has rows of its own where the config names it too. Of a base that was resized before
training PEFT saves the whole tables as well. Sources: `peft/tuners/trainable_tokens/layer.py`,
`peft/utils/other.py` (TrainableTokensWrapper), `peft/utils/save_and_load.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

from .arrays import like, read_float32, to_float32
from .files import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INDICES = "trainable_token_indices"
EMBEDDINGS, HEADS = ("wte", "embed_tokens", "embed_in"), ("lm_head", "embed_out")

NOT_PLAIN = (
    "the model's embedding or head has a bias or an adapter of its own, beside which no rows can be trained: "
    "leave it out of adapter.targets, or train all weights"
)

_ROWS = ".token_adapter.trainable_tokens_delta"
_TABLE = re.compile(
    rf"(?P<path>(.+\.)?(?P<name>{'|'.join((*EMBEDDINGS, *HEADS))}))"
    r"(?P<part>\.token_adapter\.trainable_tokens_delta|(\.token_adapter\.base_layer)?\.weight)$"
)


@dataclass(frozen=True)
class TokenRows:
    """The rows of n tokens.

    tokens: their ids. path: of the embedding, as in transformers. embedding: (n, d) float32. head: the same
    of a head that is not tied; None where it is, or keeps its own.
    """

    tokens: tuple[int, ...]
    path: str
    embedding: Any
    head: Any | None = None

    @property
    def config(self) -> list[int] | dict[str, list[int]]:
        """PEFT's `trainable_token_indices`."""
        if self.head is None:
            return list(self.tokens)
        return {self.path.rpartition(".")[2]: list(self.tokens), "lm_head": list(self.tokens)}

    @property
    def tensors(self) -> dict[str, Any]:
        """PEFT's tensors by key."""
        parts = {self.path: self.embedding} | ({} if self.head is None else {"lm_head": self.head})
        return {f"{PREFIX}{path}{_ROWS}": to_float32(rows).copy(order="C") for path, rows in parts.items()}


def is_table(key: str) -> bool:
    """Whether an adapter's tensor is an embedding's or a head's: rows of it, or all of it."""
    return _TABLE.match(key.removeprefix(PREFIX)) is not None


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], where: object) -> TokenRows | None:
    """Return the rows that an adapter has beside its matrices; None without `trainable_token_indices`.

    Where the whole tables are there, rows behind the last index, from a base resized to a round number, count
    as trained ones.

    Raises:
        UserError: indices of another kind, or that differ between embedding and head, or without rows.
    """
    import numpy as np

    if not config.get(INDICES):
        return None
    tokens = _indices(config[INDICES], where)
    parts: dict[tuple[bool, bool], Any] = {}
    path = ""
    for key, value in tensors.items():
        if (match := _TABLE.match(key.removeprefix(PREFIX))) is not None:
            of_embedding = match["name"] in EMBEDDINGS
            parts[of_embedding, match["part"] == _ROWS] = to_float32(value)
            path = match["path"] if of_embedding else path
    rows, head = parts.get((True, True)), parts.get((False, True))
    for found in (rows, head):
        if found is not None and (found.ndim != 2 or len(found) != len(tokens)):
            raise UserError(f"{where} has {len(tokens)} {INDICES}, and their rows have shape {found.shape}")
    if rows is None:
        raise UserError(f"{where} has {INDICES}, and the adapter no rows of an embedding")
    table, head_table = parts.get((True, False)), parts.get((False, False))
    if head is None and head_table is not None:
        head = head_table[list(tokens)]
    if table is not None and (behind := range(max(tokens) + 1, len(table))):
        tokens = (*tokens, *behind)
        rows = np.concatenate([rows, table[behind.start :]])
        if head is not None and head_table is not None:
            head = np.concatenate([head, head_table[behind.start :]])
    return TokenRows(tokens, path, rows, head)


def has_rows(folder: Path) -> bool:
    """Return whether a PEFT adapter folder has rows of an embedding beside its matrices."""
    return bool(read_json(folder / CONFIG).get(INDICES))


def read_rows(folder: Path) -> TokenRows | None:
    """Return the rows that a PEFT adapter folder has; None without any. Raises UserError as `read`."""
    if not has_rows(folder):
        return None
    return read(read_float32(folder / TENSORS), read_json(folder / CONFIG), folder / CONFIG)


def _indices(given: Any, where: object) -> tuple[int, ...]:
    by_layer = given if isinstance(given, dict) else {EMBEDDINGS[0]: given}
    names = {str(layer).rpartition(".")[2] for layer in by_layer}
    lists = [tuple(ids) if isinstance(ids, list) else () for ids in by_layer.values()]
    if not names & set(EMBEDDINGS) or names - {*EMBEDDINGS, *HEADS} or len(set(lists)) != 1:
        raise UserError(
            f"{where}: {INDICES} must be those of the embedding, and the same of the head: merge the adapter "
            "with PEFT (merge_and_unload) and start from that model"
        )
    if not all(isinstance(i, int) and i >= 0 for i in lists[0]) or len(set(lists[0])) < len(lists[0]):
        raise UserError(f"{where}: {INDICES} must be different whole numbers")
    return lists[0]


def grow(table: Any, count: int) -> Any:
    """Return a table (V, d) in NumPy float32 with at least `count` rows; new ones are the mean of the old.

    A new token is then about as likely as the old ones are on average, where a random row may take all
    probability (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    import numpy as np

    if count <= len(table):
        return table
    mean = table.mean(axis=0, dtype=np.float64).astype(np.float32)
    return np.concatenate([table, np.broadcast_to(mean, (count - len(table), *mean.shape))])


def merge(base: Mapping[str, Any], rows: TokenRows, tied: bool) -> dict[str, Any]:
    """Return weights under Hugging Face's names with the rows in their embedding and head.

    Raises:
        UserError: the base has no such embedding, or one of another width.
    """
    merged = dict(base)
    for name, value in base.items():
        match = _TABLE.match(name)
        if match is None or match["part"] != ".weight":
            continue
        new = rows.embedding if match["name"] in EMBEDDINGS or tied else rows.head
        table = to_float32(value)
        if new is not None and table.shape[1:] != new.shape[1:]:
            raise UserError(
                f"the adapter does not fit this base: {name} is {table.shape}, its new rows {new.shape}"
            )
        table = grow(table, max(rows.tokens) + 1).copy()
        if new is not None:
            table[list(rows.tokens)] = new
        merged[name] = like(table, value)
    if not any(is_table(name) for name in base):
        raise UserError("the adapter does not fit this base: it has new rows, and the base no embedding")
    return merged


def vocabulary(tensors: Mapping[str, Any]) -> int | None:
    """Return how many rows the embedding among a model's tensors has; None where none is found."""
    for name, value in tensors.items():
        match = _TABLE.match(name)
        if match is not None and match["name"] in EMBEDDINGS and match["part"] == ".weight":
            return int(value.shape[0])
    return None
