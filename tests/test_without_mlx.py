"""Machines without MLX (Intel Macs): what torch can do works, and what needs MLX says so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_posttrain import engines
from tests.helpers import run_recipe

pytestmark = pytest.mark.skipif("torch" not in engines.available(), reason="needs torch")
WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(['mlx', 'mlx_lm'])); from mlx_posttrain.cli import "
    "main; main()"
)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in which MLX cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


@pytest.fixture(scope="module")
def packed(random_gpt2, tmp_path_factory) -> Path:
    """A model folder that MLX has quantised."""
    pytest.importorskip("mlx_lm")
    from mlx_posttrain.convert.weights import convert

    folder = tmp_path_factory.mktemp("packed") / "model"
    convert(random_gpt2, folder, quantize=4)
    return folder


def test_number_formats_are_converted(random_gpt2, tmp_path):
    from safetensors.torch import load_file

    done = command("convert", random_gpt2, tmp_path / "half", "--to", "hf", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    done = command("convert", tmp_path / "half", tmp_path / "back", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    first, half, back = (
        load_file(folder / "model.safetensors")
        for folder in (random_gpt2, tmp_path / "half", tmp_path / "back")
    )
    assert {str(t.dtype) for t in half.values()} == {"torch.float16"} and {
        str(t.dtype) for t in back.values()
    } == {"torch.float32"}
    assert (first["transformer.wte.weight"].half().float() == back["model.wte.weight"]).all()


def test_values_beyond_float16(random_gpt2, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(random_gpt2, tmp_path / "large")
    tensors = load_file(random_gpt2 / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = 1e6
    save_file(tensors, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    refused(
        command("convert", tmp_path / "large", tmp_path / "out", "--dtype", "float16"),
        "beyond float16's range",
    )


def test_what_needs_mlx_says_so(random_gpt2, packed, tmp_path):
    refused(
        command("convert", random_gpt2, tmp_path / "out", "--quantize", "4"),
        "quantising needs MLX, which is not installed",
    )
    refused(
        command("convert", packed, tmp_path / "out", "--to", "hf", "--dtype", "float32"),
        "dequantising needs MLX",
    )
    assert not (tmp_path / "out").exists()


def test_another_architecture_needs_mlx(random_gpt2, tmp_path):
    (tmp_path / "llama").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "llama" / name).write_bytes((random_gpt2 / name).read_bytes())
    (tmp_path / "llama" / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    refused(command("convert", tmp_path / "llama", tmp_path / "out"), "converting llama needs MLX")


def test_a_qlora_run_is_exported_as_far_as_that_goes(random_gpt2, rows_file, tmp_path):
    pytest.importorskip("mlx_lm")
    run = tmp_path / "run"
    run_recipe(
        "01_sft",
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        f"output={run}",
        "engine=mlx",
        "train.steps=1",
        "sample.count=0",
        "adapter.rank=2",
        "adapter.quantize=4",
    )
    refused(command("export", run, "--to", "hf", "--merge"), "dequantising needs MLX")
    refused(command("export", run, "--to", "mlx-lm", "--merge"), "merging into a quantised base needs MLX")
    done = command("export", run, "--to", "peft")
    assert done.returncode == 0 and "how much was not measured, as MLX is not installed" in done.stdout, (
        done.stderr
    )
