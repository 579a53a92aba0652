"""A random GPT-2 on both engines, for the tests of likelihood and of completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_posttrain import engines
from mlx_posttrain.methods.pretrain import PretrainSection, make_model
from mlx_posttrain.models.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The texts that the tokenizer is trained on."""
    return [
        "The cat sat on the mat, and the dog lay by the door.",
        "Rain fell on the roof all night. In the morning the sun came out.",
        "Anna gave the hens some corn; then she went to school.",
    ]


@pytest.fixture(scope="session")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 2 layers, width 32 and context 64, with weights so large that contexts matter."""
    from safetensors.numpy import load_file, save_file

    target = tmp_path_factory.mktemp("gpt2")
    make_model(
        target, texts, PretrainSection(vocab_size=320, layers=2, heads=2, width=32, context=64), seed=0
    )
    weights = {k: v * 8 if v.ndim > 1 else v for k, v in load_file(target / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(params=["mlx", "torch"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    if request.param not in engines.available():
        pytest.skip(f"{request.param} is not installed")
    return engines.get(request.param).load(folder)
