"""A model of any name, opened on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_posttrain import engines
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.models import dtypes
from mlx_posttrain.models.merge import merge_below
from mlx_posttrain.models.prompt_format import own_chat_template
from mlx_posttrain.models.source import Source, locate
from mlx_posttrain.models.tokenizer import check_vocabulary, load_tokenizer


def open_model(
    name: str | Path, engine: str = "auto", dtype: str | None = None, *, scores: bool | None = False
) -> tuple[Model, Any, Source]:
    """(model, tokenizer, source) ready to generate or evaluate.

    dtype: None: as models.dtypes.of_source has it. Raises UserError for a reward model, or with ``scores``
    for a model that is none; None takes both.
    """
    source = locate(name)
    merge_below(source)
    chosen = engines.get(engine)
    group = ((source.recipe or {}).get("adapter") or {}).get("group_size", 64)
    model = chosen.load(
        source.folder,
        dtype=dtypes.of_source(source, chosen, dtype),
        quantize=source.quantize,
        group_size=group,
    )
    if source.adapter is not None:
        model.add_adapter(files.spec_of(source.adapter), seed=0)
        model.load_trained(source.adapter)
    if model.has_head and scores is False:
        raise UserError(f"{name} is a reward model: it scores texts and writes none; give a language model")
    if scores and not model.has_head:
        raise UserError(
            f"{name} is no reward model: train one with 07_reward, or give a sequence "
            "classifier with one label"
        )
    tokenizer = load_tokenizer(source.folder)
    if source.adapter is not None and (template := own_chat_template(source.adapter)):
        tokenizer.chat_template = template
    check_vocabulary(tokenizer, model, source.folder)
    return model, tokenizer, source
