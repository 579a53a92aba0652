"""One file per method. A method module has ``Recipe`` (its keys) and ``run(recipe, resume, ...)``.

To add a method, write its file and name it here; the command line, recipes and runs then know it.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from types import ModuleType

from mlx_posttrain.errors import UserError

NAMES = ("sft", "reward", "ppo", "distill", "pipeline", "pretrain", "report")


def get(name: str) -> ModuleType:
    """The module of a method. Raises UserError for an unknown name, naming the nearest."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        raise UserError(
            "unknown method "
            f"{name!r}; " + (f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(NAMES)}")
        )
    return import_module("mlx_posttrain.pipeline" if name == "pipeline" else f"mlx_posttrain.methods.{name}")
