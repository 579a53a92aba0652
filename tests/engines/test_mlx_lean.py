"""The lean block against mlx-lm's own: the same loss and gradients, less memory."""

import gc

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_posttrain.data.batches import collate  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines import base  # noqa: E402
from mlx_posttrain.engines.base import AdamW, AdapterSpec  # noqa: E402
from mlx_posttrain.engines.mlx import lean as mlx_lean  # noqa: E402
from mlx_posttrain.engines.mlx.cpu import attention as mlx_attention  # noqa: E402
from mlx_posttrain.engines.mlx.engine import MLXEngine  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from mlx_posttrain.models.merge import base_folder  # noqa: E402


def rows(count: int, length: int) -> list:
    rng = np.random.default_rng(0)
    return [
        Example(tuple(rng.integers(1, 4000, length).tolist()), (False,) * 4 + (True,) * (length - 4))
        for _ in range(count)
    ]


def steps(above: float, adapter: bool, count: int = 3) -> tuple[list[dict], dict, float]:
    """Metrics of a few optimizer steps, the weights after them, and the peak in GB.

    above: bytes from which blocks are lean.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlx_lean, "LEAN_ABOVE", above)
        if above == float("inf"):  # mlx-lm's own block, with its attention
            patch.setattr(mlx_attention, "use_in", lambda net: None)
        return _steps(adapter, count)


def _steps(adapter: bool, count: int) -> tuple[list[dict], dict, float]:
    gc.collect()  # arrays of earlier tests would count
    engine = MLXEngine()
    model = engine.load(base_folder("tiny"))
    if adapter:
        model.add_adapter(AdapterSpec(rank=4), seed=0)
    trainer = engine.trainer(model, AdamW())
    batch = collate(rows(8, 256), model.context)
    trainer.step(sft.loss, [batch], 1e-3)
    engine.reset_memory()
    found = [trainer.step(sft.loss, [batch], 1e-3) for _ in range(count)]
    return found, dict(model.weights()), engine.memory()["peak_gb"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_same_metrics_with_less_memory(adapter: bool) -> None:
    stock, lean = steps(float("inf"), adapter), steps(0, adapter)
    for a, b in zip(stock[0], lean[0], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert stock[1].keys() == lean[1].keys()
    for name, value in stock[1].items():
        np.testing.assert_allclose(lean[1][name].mean(), value.mean(), atol=1e-4, err_msg=name)
    assert lean[2] < 0.75 * stock[2], f"{lean[2]:.3f} GB against {stock[2]:.3f}"


def test_small_batches_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    stock = mlx_lean._recomputed
    monkeypatch.setattr(mlx_lean, "_recomputed", lambda *given: (calls.append(1), stock(*given))[1])
    size = base.block_bytes(8, 256, 192, 6)
    assert size < base.LEAN_ABOVE
    for above, recomputes in ((base.LEAN_ABOVE, False), (size - 1, True)):
        monkeypatch.setattr(mlx_lean, "LEAN_ABOVE", above)
        _steps(False, 1)
        assert bool(calls) is recomputes


def test_blocks_are_lean_unless_an_adapter_drops_out() -> None:
    model = MLXEngine().load(base_folder("tiny"))
    assert all(type(layer) is mlx_lean.LeanBlock for layer in model.net.layers)
    model.add_adapter(AdapterSpec(rank=4, dropout=0.1), seed=0)  # a mask must not be drawn twice
    assert not any(isinstance(layer, mlx_lean.LeanBlock) for layer in model.net.layers)


def test_whole_blocks_are_recomputed_once() -> None:
    model = MLXEngine().load(base_folder("tiny"), gradient_checkpointing=True)
    assert not any(isinstance(layer, mlx_lean.LeanBlock) for layer in model.net.layers)
