"""The torch engine with what torch 2.2 has, the last release for Intel Macs."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.methods import sft

pytestmark = pytest.mark.skipif("torch" not in engines.available(), reason="needs torch")


def trained(folder) -> dict[str, np.ndarray]:
    engine = engines.get("torch")
    model = engine.load(folder)
    trainer = engine.trainer(model, AdamW())
    batch = collate([Example((5, 6, 7, 8), (False, True, True, True))], model.context)
    # One step only: after a second, rounding would have decided the sign of gradients that are zero.
    trainer.step(sft.loss, [batch], 1e-3)
    return dict(model.weights())


def test_adamw_where_a_cpu_has_no_fused_kernel(random_gpt2, monkeypatch):
    """The same weights; with ``fused=True`` the optimizer would raise."""
    from torch.optim import adamw, optimizer
    from torch.utils import _foreach_utils

    def as_in_2_2() -> list[str]:
        return ["cuda", "xpu", "privateuseone"]

    fused = trained(random_gpt2)
    for module in (_foreach_utils, optimizer, adamw):
        monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", as_in_2_2, raising=False)
    plain = trained(random_gpt2)
    assert all(np.allclose(plain[name], value, atol=1e-6) for name, value in fused.items())


def test_adamw_where_torch_does_not_say(random_gpt2, monkeypatch):
    from torch.utils import _foreach_utils

    monkeypatch.delattr(_foreach_utils, "_get_fused_kernels_supported_devices")
    assert trained(random_gpt2)
