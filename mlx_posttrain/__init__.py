"""Post-training of language models, written once and run on MLX and on PyTorch CPU.

    import mlx_posttrain as mp

    run = mp.train("01_sft", {"model": "tiny", "data.source": "embedded/tasks", "train.steps": 20})
    print(run.model().generate(["What is 2 + 2?"]))

See docs/api.md.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mlx_posttrain.errors import UserError

if TYPE_CHECKING:
    from mlx_posttrain.api import LoadedModel, Run, compare, evaluate, train

__all__ = ["LoadedModel", "Run", "UserError", "compare", "evaluate", "load", "train"]

try:
    __version__ = version("mlx-posttrain")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import the API when it is first used: ``mlx-posttrain --help`` must answer at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mlx_posttrain.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
