"""The array names that losses need, chosen by the library of the argument (after einops' dispatch on type).

A loss is written once against these names plus the operators and methods that all three libraries share, and
then runs on MLX arrays (training on Apple Silicon or Linux), torch tensors (training on any CPU) and NumPy
arrays (float64 truth in tests).

    xp = ops(logprobs)
    loss = -xp.sum(xp.log_sigmoid(logprobs))

Conventions: ``axis`` and ``keepdims`` as in NumPy; integer index arrays for ``take_along_axis`` have the same
number of dimensions as the data; ``stop_gradient`` is the identity where there are no gradients;
``segment_sum(values, segments, count)`` adds up the values [N] of each segment number [N] into [count].
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

#: Where each library's names are; a library is imported only once one of its arrays is there.
_MODULES = {
    "numpy": "mlx_posttrain.ops.numpy",
    "mlx": "mlx_posttrain.engines.mlx.ops",
    "torch": "mlx_posttrain.engines.torch.ops",
}


def ops(x: Any) -> SimpleNamespace:
    """Return the namespace for ``x``'s library.

    Raises TypeError for anything that is not an MLX array, a torch tensor or a NumPy array.
    """
    library = type(x).__module__.partition(".")[0]
    if library not in _MODULES:
        raise TypeError(f"expected an mlx, torch or numpy array, got {type(x).__module__}.{type(x).__name__}")
    return _namespace(library)


@cache
def _namespace(library: str) -> SimpleNamespace:
    return import_module(_MODULES[library]).NAMESPACE
