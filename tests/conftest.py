"""What every test gets: no network, no telemetry, no user caches or tokens, and no more threads than its
share of the cores.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import gpu_paths as gpu_paths_module

# Before anything imports numpy, torch, transformers or datasets: they read these once.
_HOME = tempfile.mkdtemp(prefix="mlx-posttrain-hub-")
os.environ.update(
    HF_HOME=_HOME,  # nothing is read from or written to the user's cache
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_DATASETS_CACHE",
):
    os.environ.pop(_name, None)

# Workers side by side: threads that wait for each other on busy cores are many times slower than one thread
# each.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    _THREADS = str(max(1, (os.cpu_count() or 1) // _WORKERS))
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, _THREADS)

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-paths", action="store_true", help="run MLX as on a GPU: tests/gpu_paths.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu-paths"):
        os.environ[gpu_paths_module.CHOSEN] = "1"
        gpu_paths_module.switch_off()


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture
def gpu_paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLX as on a GPU; models must be loaded within the test."""
    mx = pytest.importorskip("mlx.core")
    before = mx.set_cache_limit(0)
    gpu_paths_module.switch_off(monkeypatch.setattr)
    yield
    mx.set_cache_limit(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project with data and reference figures; tests that need it are skipped without
    it.
    """
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "A small dog ran over the hill to find its ball, and then it ran home again.",
    "Numbers such as 1, 2, 3, 10 and 42 are useful; so are words: left, right, up, down!",
    "Once upon a time there was a king who liked apples more than gold.",
] * 6


@pytest.fixture(scope="session")
def random_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder with a trained tokenizer and random weights: 2 layers of width 64, context 64."""
    from mlx_posttrain.methods.pretrain import PretrainSection, make_model

    folder = tmp_path_factory.mktemp("random-gpt2")
    make_model(
        folder, SENTENCES, PretrainSection(vocab_size=400, layers=2, heads=2, width=64, context=64), seed=1
    )
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty Alpaca rows of different lengths in a JSONL file."""
    import json

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as f:
        for i in range(40):
            words = " ".join(SENTENCES[i % 4].split()[: 2 + i % 9])
            f.write(
                json.dumps(
                    {
                        "instruction": f"Repeat number {i}.",
                        "input": words if i % 2 else "",
                        "output": f"{words} {i}",
                    }
                )
                + "\n"
            )
    return path
