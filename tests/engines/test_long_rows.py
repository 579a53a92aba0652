"""Attention by chunks of queries against the stock attention: the same loss and gradients, less memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_posttrain import engines  # noqa: E402
from mlx_posttrain.data.batches import collate  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines import sizes  # noqa: E402
from mlx_posttrain.engines.base import AdamW, AdapterSpec  # noqa: E402
from mlx_posttrain.engines.mlx import lean, long_rows  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from tests.random_models import SMALL, random_model  # noqa: E402


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets from how many bytes on attention is chunked, and how small chunks are."""

    def choose(above: float, chunk: int = 1, queries: int = 8) -> None:
        monkeypatch.setattr(sizes, "ATTENTION_ABOVE", above)
        monkeypatch.setattr(sizes, "ATTENTION_CHUNK", chunk)
        monkeypatch.setattr(sizes, "QUERIES", queries)

    return choose


def test_chunks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # 12 heads of 1,024 x 1,024 weights are 48 MB; of 4,096 x 4,096 they are 768 MB, 24 chunks of 32 MB
    assert sizes.query_chunks(1, 12, 1024) == [slice(0, 1024)]
    found = sizes.query_chunks(1, 12, 4096)
    assert {part.stop - part.start for part in found[:-1]} == {192}  # 4,096 / 24, up to a multiple of 64
    assert found[0].start == 0 and found[-1].stop == 4096
    assert len(sizes.query_chunks(8, 32, 32_768)) == 32
    monkeypatch.setattr(sizes, "_scale", 6)  # a working set of 32 GB
    assert len(sizes.query_chunks(1, 12, 4096)) == 1 < len(sizes.query_chunks(1, 12, 8192))


@pytest.mark.parametrize("mask", ["causal", "window", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_equals_the_stock_one(mask: Any, dtype: str, chunks: Any) -> None:
    keys = [mx.random.key(i) for i in range(4)]
    q, weights = (mx.random.normal((2, 4, 45, 8), key=key) for key in keys[:2])
    k, v = (mx.random.normal((2, 2, 45, 8), key=key) for key in keys[2:])
    given = [a.astype(getattr(mx, dtype)) for a in (q, k, v)]
    if mask == "window":
        place = mx.arange(45)
        mask = (place[:, None] >= place) & (place[:, None] < place + 13)

    def total(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (long_rows.attention(q, k, v, 0.3, mask).astype(mx.float32) * weights).sum()

    found = []
    for above in (0, float("inf")):
        chunks(above)
        assert len(sizes.query_chunks(2, 4, 45)) == (6 if above == 0 else 1)
        found.append(mx.compile(mx.value_and_grad(total, argnums=(0, 1, 2)))(*given))
    (value, gradients), (wanted, others) = found
    near = 1e-5 if dtype == "float32" else 0.02
    assert abs(value.item() - wanted.item()) < 50 * near
    for one, other in zip(gradients, others, strict=True):
        assert one.dtype == other.dtype
        assert mx.abs(one - other).max().item() < near * mx.abs(other).max().item() + near


def batch(length: int, rows: int = 2) -> Any:
    rng = np.random.default_rng(0)
    return collate(
        [
            Example(tuple(rng.integers(1, 250, n).tolist()), (False,) + (True,) * (n - 1))
            for n in (length, *[length - 9] * (rows - 1))
        ]
    )


@pytest.fixture(scope="module")
def models(random_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "gpt2": random_gpt2,
        "qwen2": random_model(folder / "qwen2", SMALL),
        "llama": random_model(folder / "llama", {**SMALL, "model_type": "llama"}),
    }


def metrics_and_gradient(folder: Path, adapter: bool, **options: Any) -> tuple[dict[str, float], dict]:
    engine = engines.get("mlx")
    model = engine.load(folder, **options)
    if adapter:
        model.add_adapter(AdapterSpec(rank=2), seed=0)
        for i, (_, layer) in enumerate(model.adapted()):
            layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
    b = batch(62)
    gradient = model.gradient(sft.loss, [b])
    found = {f"held out {name}": value for name, value in model.evaluate(sft.loss, [b]).items()}
    return {**found, **engine.trainer(model, AdamW()).step(sft.loss, [b], 0.0)}, gradient


@pytest.mark.parametrize("how", ["full", "adapter", "checkpointed", "as on a GPU"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
def test_models_compute_the_same(
    kind: str,
    how: str,
    models: dict[str, Path],
    chunks: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "as on a GPU":
        request.getfixturevalue("gpu_paths")
    monkeypatch.setattr(lean, "LEAN_ABOVE", 0)
    options = {"gradient_checkpointing": True} if how == "checkpointed" else {}
    found = []
    for above in (0, float("inf")):
        chunks(above)
        found.append(metrics_and_gradient(models[kind], how == "adapter", **options))
    (metrics, gradient), (wanted, others) = found
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5), name
    for name, value in others.items():
        assert np.abs(gradient[name] - value).max() <= 2e-5 * np.abs(value).max() + 1e-7, name


def test_every_attention_of_a_network_is_reached(models: dict[str, Path], chunks: Any) -> None:
    """And that of another network of the same class is not."""
    from mlx_lm.utils import load_model

    ours, (theirs, _) = engines.get("mlx").load(models["llama"]).net, load_model(models["llama"])
    assert [type(layer.self_attn).__mro__[1] for layer in ours.layers] == [
        type(theirs.layers[0].self_attn)
    ] * 2
    assert type(theirs.layers[0].self_attn) is not type(ours.layers[0].self_attn)


def peak(folder: Path, length: int) -> int:
    gc.collect()
    engine = engines.get("mlx")
    model = engine.load(folder)
    model.add_adapter(AdapterSpec(rank=2), seed=0)
    trainer = engine.trainer(model, AdamW())
    trainer.step(sft.loss, [batch(length, 1)], 1e-4)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    trainer.step(sft.loss, [batch(length, 1)], 1e-4)
    return mx.get_peak_memory() - before


def test_no_array_of_all_pairs_is_held(models: dict[str, Path], chunks: Any) -> None:
    """At 1,024 tokens one of a block is 16 MB, and stock attention holds several."""
    chunks(2**20, 2**20, 64)
    pairs, chunked = 4 * 4 * 1024**2, peak(models["llama"], 1024)
    chunks(float("inf"))
    stock = peak(models["llama"], 1024)
    assert stock > chunked + 2.5 * pairs and chunked < 0.45 * stock, (chunked / pairs, stock / pairs)


def test_memory_does_not_grow_with_the_number_of_chunks(chunks: Any) -> None:
    """Of any number of chunks only the arrays of one exist at once: scores, weights, their gradients."""
    length, found = 2048, []
    q = mx.random.normal((1, 4, length, 8))
    k, v = mx.random.normal((1, 2, length, 8)), mx.random.normal((1, 2, length, 8))
    mx.eval(q, k, v)

    def total(*arrays: Any) -> Any:
        return long_rows.attention(*arrays, 0.3, "causal").sum()

    for count in (4, 32):
        chunks(0, 4 * 4 * length**2 // count)
        (size,) = {part.stop - part.start for part in sizes.query_chunks(1, 4, length)}
        assert size * count == length
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(total, argnums=(0, 1, 2))(q, k, v))
        found.append((mx.get_peak_memory() - before) / (4 * 4 * size * length))
    assert found[1] < 1.4 * found[0]
