"""Number formats: which one a model is held in."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from mlx_posttrain.errors import UserError

#: What weights can be held in, most exact first.
DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str | None) -> str | None:
    """A number format's name as it is given. Raises UserError for an unknown one, with the nearest."""
    if name is not None and name not in DTYPES:
        near = difflib.get_close_matches(str(name), DTYPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(DTYPES)}"
        raise UserError(f"unknown dtype {name!r}; {hint}")
    return name


def model_dtype(asked: str | None, *, gpu: bool, trained: bool, stored: Callable[[], str]) -> str:
    """The number format in which a model's weights are held.

    asked: by a recipe or an option, and then it holds. gpu: whether a GPU computes, which half precision
    halves the memory traffic of; CPUs compute it more slowly than float32. trained: whether all weights are
    trained: most updates would be rounded away. stored: gives the format of the checkpoint, and is called
    only where it decides.
    """
    if asked is not None:
        return str(check_dtype(asked))
    return stored() if gpu and not trained else "float32"
