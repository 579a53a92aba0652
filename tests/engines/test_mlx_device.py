"""What a run takes of a GPU's memory, with MLX's calls to Metal replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_posttrain.data import batches  # noqa: E402
from mlx_posttrain.engines import fused, probe, sizes  # noqa: E402
from mlx_posttrain.engines.base import AdamW  # noqa: E402
from mlx_posttrain.engines.mlx import device  # noqa: E402
from mlx_posttrain.engines.mlx.engine import MLXEngine  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from tests.engines.test_memory import batch  # noqa: E402
from tests.helpers import read_jsonl, run_recipe  # noqa: E402

GB = 2**30


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU with a working set of 48 GB; returns what was asked of MLX, in order."""
    calls: list[Any] = []
    limits = {"wired": 0}

    def wire(limit: int) -> int:
        calls.append(("wired", limit))
        limits["wired"], before = limit, limits["wired"]
        return before

    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(
        probe, "mlx_devices", lambda: probe.Devices({"max_recommended_working_set_size": 48 * GB}, "gpu")
    )
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: calls.append(("cache", limit)))
    monkeypatch.setattr(mx, "set_wired_limit", wire)
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append("clear"))
    monkeypatch.setattr(device, "_phase", "")
    monkeypatch.setattr(sizes, "_scale", 1)
    monkeypatch.setattr(batches, "_multiples", batches.FINE)
    return calls


def test_an_engine_fits_caches_chunks_and_padding_to_the_gpu(metal: list[Any]) -> None:
    chunk = fused.chunks(4096, 50257)[0].stop
    MLXEngine()
    assert metal == [("cache", 12 * GB)]
    assert sizes.scale() == 9  # of the 5.33 GB of a Mac with 8 GB
    assert fused.chunks(4096, 50257)[0].stop > 5 * chunk
    cached = fused.cached_positions(8192, 50257)
    assert 4800 < cached <= 9 * 128 * 2**20 / (4 * 50257)  # in whole chunks
    made = batch(33)
    assert made.tokens.shape == (2, 64) and made.index.shape == (256,)


def test_a_small_gpu_and_a_cpu_keep_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_scale", 1)
    sizes.fit(3 * GB)
    assert sizes.scale() == 1
    if not device.on_gpu():
        before = fused.chunks(4096, 50257)
        MLXEngine()
        assert device.working_set() == 0 and fused.chunks(4096, 50257) == before
        assert batch(33).tokens.shape == (2, 40)


def test_arrays_are_wired_meanwhile_and_never_longer(metal: list[Any]) -> None:
    with pytest.raises(KeyError), device.wired(), device.wired():
        assert metal == [("wired", 48 * GB)]
        raise KeyError
    assert metal == [("wired", 48 * GB), ("wired", 0)]


def test_nothing_is_wired_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("there is no Metal"))
    with device.wired():
        pass


def test_buffers_are_given_back_between_phases_only(metal: list[Any], random_gpt2: Path) -> None:
    engine = MLXEngine()
    model = engine.load(random_gpt2)
    trainer = engine.trainer(model, AdamW())
    row = batch(16, vocabulary=model.config["vocab_size"])
    metal.clear()
    for _ in range(3):
        trainer.step(sft.loss, [row], 1e-3)
    assert metal == ["clear"]  # what loading left
    model.evaluate(sft.loss, [row])
    model.token_logprobs([row])
    model.apply(lambda m, b: {"logprobs": m.logprobs(b)}, [row])
    assert metal == ["clear"] * 2
    model.generate([[5, 6]], max_tokens=3, stop=None)
    model.generate([[5, 6]], max_tokens=3, stop=None)
    wired = [("wired", 48 * GB), ("wired", 0)]
    assert metal == ["clear", "clear", "clear", *wired, *wired]
    trainer.step(sft.loss, [row], 1e-3)
    assert metal[-1] == "clear" and metal.count("clear") == 4


def test_a_run_is_wired_from_its_first_step_to_its_last(
    metal: list[Any], random_gpt2: Path, rows_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_recipe(
        "01_sft",
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        f"output={tmp_path / 'run'}",
        "engine=mlx",
        "train.steps=2",
        "train.batch_size=2",
        "sample.count=1",
        "sample.max_tokens=4",
    )
    wired = [call for call in metal if call[0] == "wired"]
    assert wired == [("wired", 48 * GB), ("wired", 0)]  # once, evaluations and samples included
    assert "of Metal's working set of 48 GB" in capfd.readouterr().err
    steps = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "lr" in row]
    assert len(steps) == 2 and all(row["peak_gb"] >= row["active_gb"] > 0 for row in steps)


def test_what_is_held_and_kept_is_reported() -> None:
    held = mx.ones((2**20,)) + 1
    mx.eval(held)
    found = MLXEngine().memory()
    assert found["peak_gb"] >= found["active_gb"] >= held.nbytes / GB and found["cache_gb"] >= 0
    assert np.isclose(found["active_gb"], mx.get_active_memory() / GB)
