"""Quantised heads: losses by chunks equal those over all logits at once, and take less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_posttrain import engines  # noqa: E402
from mlx_posttrain.convert.weights import convert  # noqa: E402
from mlx_posttrain.data.batches import collate  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines import fused  # noqa: E402
from mlx_posttrain.engines.base import AdamW, AdapterSpec  # noqa: E402
from mlx_posttrain.engines.mlx.model import MLXModel  # noqa: E402
from mlx_posttrain.engines.mlx.packed_head import PackedHead  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from tests.random_models import SMALL, random_model  # noqa: E402

HEADS = {
    "tied": {},
    "own": {"tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=HEADS)
def packed(
    request: pytest.FixtureRequest, random_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model in 4 bits as mlx-lm's converter writes it: embedding and head are packed too."""
    folder = tmp_path_factory.mktemp("packed")
    plain = random_model(folder / "plain", {**SMALL, **HEADS[request.param]}, "bfloat16", random_gpt2)
    convert(plain, folder / "q4", quantize=4)
    return folder / "q4"


def adapted(folder: Path) -> MLXModel:
    """With an adapter that is not zero."""
    model = engines.get("mlx").load(folder)
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    for i, (_, layer) in enumerate(model.adapted()):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
    return model


def batch(rows: int = 3, length: int = 20, vocabulary: int = 400) -> Any:
    rng = np.random.default_rng(0)
    return collate(
        [
            Example(tuple(rng.integers(1, vocabulary, length).tolist()), (False,) + (True,) * (length - 1))
            for _ in range(rows)
        ]
    )


def terms(kind: str) -> Any:
    def loss(model: Any, b: Any) -> Any:
        if kind == "policy":
            logprobs, entropy, _ = model.policy_terms(b, 0.7)
            values = (logprobs, entropy)
        elif kind == "logprobs":
            values = (model.logprobs(b, 0.7), model.reference_logprobs(b))
        else:
            values = model.logprobs_and_kl(b, *(("forward", 0.3) if kind == "sum" else (kind, None)))
        # each position counts differently, but where the two are promised to be in one sum
        weights = mx.arange(1, values[0].shape[0] + 1) / 10
        first, second = (mx.sum(v * weights) for v in values)
        return 0.3 * second - first, {"first": first, "second": second}

    return loss


@pytest.mark.parametrize("kind", ["logprobs", "policy", "forward", "reverse", "sum"])
def test_chunks_equal_all_logits_at_once(kind: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK_BYTES", 4 * 400 * 8)
    monkeypatch.setattr(fused, "PANEL", 8)
    model, b, loss = adapted(packed), batch(), terms(kind)
    assert len(fused.chunks(len(b.index), 400)) > 4
    head = model._fused_head(model.net)
    assert head is not None and isinstance(head[0], PackedHead) and head[0].shape == (400, 64)
    values, gradients = [], []
    for chunked in (True, False):
        if not chunked:
            monkeypatch.setattr(MLXModel, "_fused_head", lambda self, net: None)
        values.append(model.evaluate(loss, [b]))
        gradients.append(model.gradient(loss, [b]))
        trainer = engines.get("mlx").trainer(adapted(packed), AdamW(clip=None))
        values[-1]["norm"] = trainer.step(loss, [b], 0.0)["grad_norm"]  # streamed
    for name, value in values[0].items():
        assert value == pytest.approx(values[1][name], rel=2e-5), name
    for name, value in gradients[0].items():
        wanted = gradients[1][name]
        assert np.abs(value - wanted).max() <= 2e-5 * np.abs(wanted).max() + 1e-9, name


def test_no_step_holds_all_logits(random_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = random_model(tmp_path / "plain", {**SMALL, "vocab_size": 8192}, "float16", random_gpt2)
    convert(plain, tmp_path / "q4", quantize=4)
    monkeypatch.setattr(fused, "CHUNK_BYTES", 2**20)
    b, peaks = batch(4, 128, 8192), []
    for chunked in (True, False):
        if not chunked:
            monkeypatch.setattr(MLXModel, "_fused_head", lambda self, net: None)
        trainer = engines.get("mlx").trainer(adapted(tmp_path / "q4"), AdamW())
        mx.reset_peak_memory()
        trainer.step(sft.loss, [b], 1e-3)
        peaks.append(mx.get_peak_memory())
    assert peaks[0] < peaks[1] - 1.5 * 4 * len(b.index) * 8192, peaks
