"""A run that is set up: what a method's samples, report and last step may look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.data.dataset import Dataset
from mlx_posttrain.data.read import ModelFacts
from mlx_posttrain.engines.base import Engine, Model
from mlx_posttrain.training.method import Method


@dataclass
class Session:
    """A run that is set up. ``dataset`` is None for a method on rollouts."""

    method: Method
    recipe: Any
    engine: Engine
    run: runs.Run
    resume: bool
    folder: Path
    model: Model
    facts: ModelFacts
    dataset: Dataset | None = None
