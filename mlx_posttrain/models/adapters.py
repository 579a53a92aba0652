"""Which adapter a recipe asks for."""

from __future__ import annotations

from mlx_posttrain.config import AdapterSection
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdapterSpec
from mlx_posttrain.models.source import adapter_folder


def adapter_spec(adapter: AdapterSection) -> AdapterSpec:
    """The adapter that a recipe asks for; with ``adapter.path`` that of the adapter to start from."""
    if adapter.path is not None:
        return files.spec_of(adapter_folder(adapter.path), adapter.dropout)
    given = adapter.targets
    targets = (given,) if isinstance(given, str) else tuple(given) if given else None
    return AdapterSpec(adapter.kind, adapter.rank, adapter.alpha, adapter.dropout, adapter.rslora, targets)
