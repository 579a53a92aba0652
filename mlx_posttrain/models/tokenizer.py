"""A model folder's tokenizer, the check that it fits the model, and the pad token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.convert.files import read_json
from mlx_posttrain.convert.mlx_config import transformers_config
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError

#: A folder with any of these files has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(folder: Path, added: Sequence[str] = ()) -> Any:
    """Return the folder's fast tokenizer. Raises UserError if there is none or it is damaged.

    added: texts that it gets as tokens of their own, where its vocabulary does not have them.

    Its ``stop_token_ids`` are the ids that the folder's configs name as ends of a text.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    # without any of these files transformers would make an empty tokenizer
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer: copy its base's tokenizer.json and tokenizer_config.json there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises anything, depending on the library that reads it
        if (folder / "config.json").is_file():
            transformers_config(folder)  # a wrong value there is no fault of the tokenizer's
        raise UserError(
            f"{folder}: no tokenizer can be loaded from it "
            f"({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has model_max_length {longest!r:.40}; it must be a number"
        )
    tokenizer.stop_token_ids = listed_ends(folder)
    add_tokens(tokenizer, added)
    return tokenizer


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    """Give a tokenizer tokens for the texts that its vocabulary does not have; returns the new ids, in order.

    They are not marked as special: decoding keeps them in the text, where parsers and rewards look for them,
    as the marks of a thought are in the tokenizers of models that reason.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [text for text in dict.fromkeys(texts) if text not in known]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in new])
    return tuple(tokenizer.convert_tokens_to_ids(new)) if new else ()


def missing_tokens(tokenizer: Any, other: Any) -> list[str]:
    """The added tokens of a tokenizer that another one does not have, by their ids."""
    known = other.get_vocab()
    added = sorted(tokenizer.added_tokens_decoder.items())
    return [token.content for _, token in added if token.content not in known]


def rows_needed(tokenizer: Any) -> int:
    """One more than a tokenizer's largest id: how many rows its model's embedding has at least."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def listed_ends(folder: Path) -> tuple[int, ...]:
    """Return the ids under ``eos_token_id``, one or a list, in generation_config.json and config.json.

    Raises UserError where one of the two is no JSON.
    """
    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            listed = read_json(folder / name).get("eos_token_id")
            found += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int) and i >= 0))


def check_vocabulary(tokenizer: Any, model: Model, folder: Path) -> None:
    """Raise UserError if the tokenizer has ids beyond the embedding.

    MLX would silently read out of bounds.
    """
    rows = model.config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows}: they do "
            "not belong together"
        )


def pad_id(config: dict[str, Any], tokenizer: Any) -> int:
    """Return the pad token, which is skipped when the position of a score is looked for.

    It is the config's pad, else the tokenizer's, else EOS. A GPT-2 has no pad, so it is EOS: a score is then
    read at the last token before it. See data/pairs.py, last_token.
    """
    for token in (config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "neither the config nor the tokenizer names a pad or an end-of-text token, so scores have no position"
    )
