"""Memory of training: no second copy of weights and moments in the update, and nothing that grows."""

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain.engines import process

mx = pytest.importorskip("mlx.core")

from mlx_posttrain.data.batches import collate  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines.base import AdamW  # noqa: E402
from mlx_posttrain.engines.mlx import trainer as mlx_trainer  # noqa: E402
from mlx_posttrain.engines.mlx.cpu import buffers  # noqa: E402
from mlx_posttrain.engines.mlx.engine import MLXEngine  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from mlx_posttrain.models.merge import base_folder  # noqa: E402


def batch(length: int, seed: int = 0, vocabulary: int = 4000) -> object:
    rng = np.random.default_rng(seed)
    row = Example(tuple(rng.integers(1, vocabulary, length).tolist()), (False,) + (True,) * (length - 1))
    return collate([row] * 2, 512)


def test_updates_in_groups_equal_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1, 2**40):
        monkeypatch.setattr(mlx_trainer, "UPDATE_BYTES", size)
        model = MLXEngine().load(base_folder("tiny"))
        trainer = MLXEngine().trainer(model, AdamW(weight_decay=0.1))
        for _ in range(3):
            trainer.step(sft.loss, [batch(40)], 1e-3)
        found.append(dict(model.weights()))
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name], err_msg=name)


def test_the_update_holds_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for size in (2**20, 2**40):
        gc.collect()  # a model and its compiled step refer to each other
        monkeypatch.setattr(mlx_trainer, "UPDATE_BYTES", size)
        model = MLXEngine().load(base_folder("tiny"))
        trainer = MLXEngine().trainer(model, AdamW())
        trainer.step(sft.loss, [batch(32)], 1e-3)
        mx.reset_peak_memory()
        trainer.step(sft.loss, [batch(32)], 1e-3)
        peaks.append(mx.get_peak_memory() / (4 * model.parameter_counts()[0]))
    assert peaks[0] < 0.6 * peaks[1], f"{peaks[0]:.2f} and {peaks[1]:.2f} times the weights"


def test_a_step_waits_for_what_is_logged_alone(monkeypatch: pytest.MonkeyPatch, random_gpt2: Path) -> None:
    model = MLXEngine().load(random_gpt2)
    trainer = MLXEngine().trainer(model, AdamW())
    before = model.weights()

    def refuse(*arrays: object) -> None:
        raise AssertionError("neither micro-batches nor the update are waited for")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", refuse)
        trainer.step(sft.loss, [batch(16, vocabulary=model.config["vocab_size"])] * 2, 1e-3)
    after = model.weights()
    assert all(not np.array_equal(before[name], after[name]) for name in before)


def growth(random_gpt2: Path, after: Callable[[], object]) -> tuple[int, int]:
    """Bytes by which memory after a round of steps, and a round's peak, grow.

    From the first ten rounds to the last ten. A round is a step of each of three lengths on a small model;
    ``after`` is called after every step.
    """
    model = MLXEngine().load(random_gpt2)
    trainer = MLXEngine().trainer(model, AdamW())
    batches = [batch(length, length, model.config["vocab_size"]) for length in (16, 40, 64)]
    active, peaks = [], []
    for _ in range(32):
        mx.reset_peak_memory()
        for b in batches:
            trainer.step(sft.loss, [b], 1e-4)
            after()
        active.append(mx.get_active_memory())
        peaks.append(mx.get_peak_memory())
    return max(active[-10:]) - max(active[2:12]), max(peaks[-10:]) - max(peaks[2:12])


def test_memory_stays_flat_over_many_steps(random_gpt2: Path) -> None:
    held, peak = growth(random_gpt2, lambda: None)
    assert held < 16 * 2**10
    assert peak < 2**19  # the order of MLX's work varies a little, and with it the peak


def test_a_kilobyte_kept_at_every_step_would_show(random_gpt2: Path) -> None:
    kept: list[object] = []

    def leak() -> None:
        kept.append(mx.zeros((256,)) + len(kept))
        mx.eval(kept[-1])

    held, _ = growth(random_gpt2, leak)
    assert held > 32 * 2**10


def test_unused_buffers_are_given_back() -> None:
    many = [mx.ones((2**16,)) + i for i in range(200)]
    mx.eval(many)
    del many
    before = mx.get_cache_memory()
    if before <= mx.get_active_memory():
        pytest.skip("this device keeps too few unused buffers to tell")
    buffers.release()
    assert mx.get_cache_memory() < before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_a_process_peak_is_its_own_and_can_be_forgotten() -> None:
    block = np.ones(2**26)  # half a gigabyte in the parent process
    code = "from mlx_posttrain.engines import process; print(process.process_peak())"
    child = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    assert child < 2**28 and process.process_peak() > block.nbytes
    before = process.process_peak()
    del block
    process.forget_process_peak()
    assert process.process_peak() < before - 2**28
