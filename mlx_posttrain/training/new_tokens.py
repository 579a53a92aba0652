"""The tokens that a recipe adds to its model's vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_posttrain.console import log
from mlx_posttrain.convert import token_rows
from mlx_posttrain.data.read import ModelFacts, model_facts
from mlx_posttrain.engines import files
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.source import adapter_folder
from mlx_posttrain.models.tokenizer import add_tokens, has_tokenizer, load_tokenizer, rows_needed


def facts(recipe: Any, folder: Path, tokenizer: Path | None = None) -> ModelFacts:
    """A model's facts with ``data.special_tokens`` in its vocabulary, and those of an adapter to start from.

    tokenizer: the folder that has it, where that is not ``folder``. Prints what is added and what is there
    already. Raises UserError for tokens beside those of an adapter to start from, and for a tokenizer that
    does not fit its model.
    """
    plain = model_facts(folder)
    if tokenizer is not None and tokenizer != folder:
        found = load_tokenizer(tokenizer)
        plain = replace(plain, tokenizer=found, vocabulary=rows_needed(found))
    asked = list(dict.fromkeys(recipe.data.special_tokens))
    path = getattr(getattr(recipe, "adapter", None), "path", None)
    start = None if path is None else adapter_folder(path)
    if start is not None:
        plain = _of_adapter(plain, start)
        new = [text for text in asked if text not in plain.tokenizer.get_vocab()]
        if new:
            raise UserError(
                f"data.special_tokens: {new[0]} is not in the vocabulary of adapter.path={path}, which keeps "
                "its own: merge it, and start from model=RUN with a new adapter"
            )
    if not asked:
        return plain
    rows = max(plain.vocabulary, plain.config.get("vocab_size") or 0)
    last = rows_needed(plain.tokenizer) - 1
    if last >= rows:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {last} and the model's embedding {rows} rows: they do "
            "not belong together"
        )
    known = plain.tokenizer.get_vocab()
    new_ids = add_tokens(plain.tokenizer, asked)
    for text in asked:
        if text in known:
            log(f"data.special_tokens: {text} is in the vocabulary already, id {known[text]}: not added")
    if not new_ids:
        return plain
    grown = max(new_ids) + 1 - rows
    log(
        f"data.special_tokens: {len(new_ids)} new, ids {min(new_ids)} to {max(new_ids)}; "
        + (f"the embedding grows by {grown} rows" if grown > 0 else "the embedding has rows for them")
    )
    return replace(plain, new_tokens=new_ids, vocabulary=max(new_ids) + 1)


def _of_adapter(plain: ModelFacts, start: Path) -> ModelFacts:
    if not token_rows.has_rows(start):
        return plain
    tokens = files.spec_of(start).tokens
    tokenizer = load_tokenizer(start) if has_tokenizer(start) else plain.tokenizer
    return replace(plain, tokenizer=tokenizer, new_tokens=tokens, vocabulary=max(tokens) + 1)
