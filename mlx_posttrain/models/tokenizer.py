"""A model folder's tokenizer, and the tokens that have a part of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError

#: Any of these makes a folder one with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer. Raises UserError when there is none."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    # transformers would make an empty one
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer: copy its base's tokenizer.json and tokenizer_config.json there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a damaged file fails anywhere in the libraries that read it
        raise UserError(
            f"{folder}: no tokenizer can be loaded from it "
            f"({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None


def check_vocabulary(tokenizer: Any, model: Model, folder: Path) -> None:
    """Raise UserError when the tokenizer has ids beyond the embedding: MLX would read out of bounds,
    silently.
    """
    rows = model.config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows}: they do "
            "not belong together"
        )


def pad_id(config: dict[str, Any], tokenizer: Any) -> int:
    """The token that does not count when a score's position is looked for: the config's pad, else the
    tokenizer's, else EOS.

    A GPT-2 has no pad, so it is EOS: a score is then read at the last token before it. See data/pairs.py,
    last_token.
    """
    for found in (config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise UserError(
        "neither the config nor the tokenizer names a pad or an end-of-text token, so scores have no position"
    )
