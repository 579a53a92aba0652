"""A model of any name, opened on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_posttrain import engines
from mlx_posttrain.console import log
from mlx_posttrain.convert import hub
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.models import dtypes
from mlx_posttrain.models.merge import merge_below
from mlx_posttrain.models.prompt_format import own_chat_template
from mlx_posttrain.models.source import Source, locate
from mlx_posttrain.models.tokenizer import add_tokens, check_vocabulary, load_tokenizer, missing_tokens


def open_model(
    name: str | Path,
    engine: str = "auto",
    dtype: str | None = None,
    *,
    scores: bool | None = False,
    beside: Any = None,
) -> tuple[Model, Any, Source]:
    """(model, tokenizer, source) ready to generate or evaluate.

    dtype: None: as models.dtypes.of_source has it. beside: a tokenizer whose added tokens the model gets too,
    where it lacks them, as a new run would. Raises UserError for a reward model, or with ``scores`` for a
    model that is none; None takes both.
    """
    source = locate(name)
    merge_below(source)
    chosen = engines.get(engine)
    group = ((source.recipe or {}).get("adapter") or {}).get("group_size", 64)
    hub.check_config(source.folder)  # in words of ours: the tokenizer's library reads it too
    tokenizer = load_tokenizer(source.tokenizer_folder)
    ids: list[int] = [] if beside is None else [*add_tokens(tokenizer, missing_tokens(beside, tokenizer))]
    if ids:
        log(f"{name} has not learnt {len(ids)} of the tokens here: they begin at the mean of the others")
    spec = None if source.adapter is None else files.spec_of(source.adapter)
    ids += spec.tokens if spec is not None else ()
    model = chosen.load(
        source.folder,
        dtype=dtypes.of_source(source, chosen, dtype),
        quantize=source.quantize,
        group_size=group,
        vocabulary=max(ids, default=-1) + 1,
    )
    if source.adapter is not None and spec is not None:
        model.add_adapter(spec, seed=0)
        model.load_trained(source.adapter)
    if model.has_head and scores is False:
        raise UserError(f"{name} is a reward model: it scores texts and writes none; give a language model")
    if scores and not model.has_head:
        raise UserError(
            f"{name} is no reward model: train one with 07_reward, or give a sequence "
            "classifier with one label"
        )
    if source.adapter is not None and (template := own_chat_template(source.adapter)):
        tokenizer.chat_template = template
    check_vocabulary(tokenizer, model, source.folder)
    return model, tokenizer, source
