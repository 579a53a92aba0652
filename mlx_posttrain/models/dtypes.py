"""The number format of a model that is opened, and of one that a recipe trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_posttrain.convert import checks, hub
from mlx_posttrain.engines.base import Engine
from mlx_posttrain.engines.precision import model_dtype
from mlx_posttrain.models.source import Source, starting_folder


def of_source(source: Source, engine: Engine, asked: str | None = None) -> str:
    """That of a model which only reads and writes: as asked, as its run's, or by the device.

    Raises UserError for an unknown one.
    """
    return model_dtype(
        asked or source.dtype, gpu=engine.gpu, trained=False, stored=lambda: _stored(source.folder)
    )


def of_recipe(recipe: Any, engine: Engine) -> str:
    """That of a recipe's model. Raises UserError where there is no such model."""
    frozen = getattr(recipe, "adapter", None) is not None
    return model_dtype(recipe.dtype, gpu=engine.gpu, trained=not frozen, stored=lambda: _start(recipe.model))


def _start(name: str | Path) -> str:
    """The format of the weights that a run on ``name`` starts from, also where these are to be merged."""
    folder, unmerged = starting_folder(name)
    if unmerged is None:
        return _stored(folder)
    # as models.merge.write_merged writes it
    return "float32" if unmerged.dtype in (None, "float32") else _stored(unmerged.shape_folder)


def _stored(folder: Path) -> str:
    return checks.stored_dtype(folder, hub.weight_files(folder))
