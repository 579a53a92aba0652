"""Mixed precision: float32 weights, of which blocks compute with copies in bfloat16.

After Micikevicius et al. 2018, "Mixed Precision Training", section 3.1. The loss is not scaled (section 3.2):
bfloat16 has float32's exponents. Embeddings, and with them heads, have no copy: the gradient of an
embedding's row is a sum over all places of its token, which bfloat16 would round again and again.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

HALF = mx.bfloat16
#: Layers that give logits or scores, which are float32 everywhere.
_HEADS = ("lm_head", "score")


def use_in(net: nn.Module) -> dict[str, mx.array]:
    """Make the blocks of a float32 network compute in bfloat16; returns the weights that have copies now."""
    whole: set[str] = set()
    rounding: dict[type, type] = {}
    for path, module in net.named_modules():
        if isinstance(module, nn.Embedding):
            kind = type(module)
            module.__class__ = rounding.setdefault(kind, _rounding(kind))
        if isinstance(module, nn.Embedding) or path in _HEADS:
            whole |= {f"{path}.{name}" for name, _ in tree_flatten(module.parameters())}
    weights = {n: v for n, v in tree_flatten(net.parameters()) if n not in whole and v.dtype == mx.float32}
    place(net, weights)
    return weights


def place(net: nn.Module, weights: Mapping[str, mx.array]) -> list[mx.array]:
    """Put copies of float32 weights into a network; returns the copies."""
    copies = [(name, value.astype(HALF)) for name, value in weights.items()]
    if copies:
        net.update(tree_unflatten(copies))
    return [copy for _, copy in copies]


def _rounding(kind: type) -> type:
    """A class of embedding whose rows come in bfloat16; as a head it is as before."""

    class Rounding(kind):  # type: ignore[valid-type,misc]
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x).astype(HALF)

    Rounding.__name__ = kind.__name__
    return Rounding
