"""Bases in few bits: folders that are quantised already, QLoRA on a base that is not, merges onto 16-bit
bases.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.export import _describe, export, is_export
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.models.open import open_model
from tests.helpers import cli, records, run_recipe
from tests.random_models import SMALL, random_model

pytestmark = pytest.mark.skipif("mlx" not in engines.available(), reason="needs mlx")
TOKENS = np.arange(3, 51)[None].repeat(2, 0)


def train(model: Path, rows: Path, output: Path, *more: str) -> Path:
    run_recipe(
        "01_sft",
        f"model={model}",
        f"data.source={rows}",
        f"output={output}",
        "engine=mlx",
        "train.steps=6",
        "train.lr=2e-2",
        "sample.count=0",
        "adapter.rank=4",
        "adapter.alpha=16",
        *more,
    )
    return output


def logits(name: Path) -> np.ndarray:
    return open_model(name, "mlx")[0].full_logits(TOKENS)


@pytest.fixture(scope="module")
def packed(random_gpt2, tmp_path_factory) -> Path:
    """The random model in 4 bits, its scales in float16, as most that are published."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    convert(random_gpt2, folder, quantize=4, dtype="float16")
    return folder


@pytest.fixture(scope="module")
def tuned(packed, rows_file, tmp_path_factory) -> Path:
    return train(packed, rows_file, tmp_path_factory.mktemp("tuned") / "run")


def test_a_quantised_model_computes_in_float32(packed, random_gpt2):
    """GPT-2's activation on MLX's CPU has constants beyond float16's range: its logits were nan."""
    found = logits(packed)
    assert np.isfinite(found).all() and np.abs(found - logits(random_gpt2)).max() < 0.3


def test_an_adapter_on_a_quantised_folder_is_merged(tuned, packed, tmp_path):
    assert np.abs(logits(tuned) - logits(packed)).max() > 1e-2  # the adapter does something
    for to in ("hf", "mlx-lm"):
        export(tuned, tmp_path / to, to, merged=True, force=True)
    assert "quantization" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert np.abs(logits(tmp_path / "hf") - logits(tuned)).max() < 1e-3
    own = json.loads((packed / "config.json").read_text())["quantization"]
    assert json.loads((tmp_path / "mlx-lm" / "config.json").read_text())["quantization"] == own
    assert 1e-3 < np.abs(logits(tmp_path / "mlx-lm") - logits(tuned)).max() < 1  # back on the grid


def test_and_is_a_new_runs_model(tuned, packed, rows_file, tmp_path, capfd):
    second = train(tuned, rows_file, tmp_path / "second", "train.steps=1", "train.lr=1e-9")
    assert np.abs(logits(second) - logits(tuned)).max() < 1e-3
    assert f"{packed} is quantised: the adapter {tuned / 'final'} is merged" in capfd.readouterr().err


def test_qlora_on_the_base_as_it_was_is_measured(random_gpt2, rows_file, tmp_path, capfd):
    """The exported adapter is loaded there by others, where it says something else than in training."""
    run = train(random_gpt2, rows_file, tmp_path / "run", "adapter.quantize=4")
    assert cli("export", str(run), "--output", str(tmp_path / "peft")) == 0
    assert (said := capfd.readouterr().out.splitlines()[0]) in (tmp_path / "peft" / "README.md").read_text()
    drift = export(run, tmp_path / "adapters", "mlx-lm")["drift"]
    assert (
        f"trained on a base quantised to 4 bits; on the unquantised base, {_describe(drift)}. Merging" in said
    )
    theirs, ours = open_model(tmp_path / "peft", "mlx")[0], open_model(run, "mlx")[0]
    probe = np.random.default_rng(0).integers(0, ours.config["vocab_size"], (4, 32))
    difference = np.abs(theirs.full_logits(probe) - ours.full_logits(probe)).max()
    assert drift["max_logit_difference"] == pytest.approx(difference, rel=1e-4) and difference > 1e-2
    assert is_export(tmp_path / "peft", run, "peft", False) and not is_export(
        tmp_path / "peft", run, "mlx-lm", False
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_merged_export_has_the_bases_format_and_a_further_run_starts_from_float32(
    dtype, random_gpt2, rows_file, tmp_path
):
    convert(random_gpt2, tmp_path / "half", to="hf", dtype=dtype)
    run = train(tmp_path / "half", rows_file, tmp_path / "run")
    for to in ("hf", "mlx-lm"):
        export(run, tmp_path / to, to, merged=True)
        assert json.loads((tmp_path / to / "config.json").read_text())["dtype"] == dtype
    # rounded once: float32's sums in 8 or 11 bits
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert np.abs(logits(tmp_path / "hf") - logits(run)).max() < 8 * rounding
    merged = base_folder(run)
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    assert np.abs(logits(merged) - logits(run)).max() < 2e-5


def test_qlora_of_a_quantised_folder_is_refused(packed, rows_file, tmp_path):
    with pytest.raises(UserError, match=r"is quantised already: leave out adapter\.quantize"):
        train(packed, rows_file, tmp_path / "run", "adapter.quantize=4")


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def community(request, random_gpt2, tmp_path_factory) -> Path:
    """A folder as those of mlx-community: embedding and head are packed as well; a Llama's are apart."""
    folder = tmp_path_factory.mktemp("community")
    sizes = {**SMALL, "model_type": request.param, "tie_word_embeddings": request.param == "qwen2"}
    random_model(folder / "plain", sizes, "bfloat16", random_gpt2)
    convert(folder / "plain", folder / "q4", quantize=4)
    return folder / "q4"


def test_a_folder_with_a_packed_head_trains_answers_and_merges(community, rows_file, tmp_path, capfd):
    run = train(community, rows_file, tmp_path / "run", "dtype=float32")
    losses = [record["loss"] for record in records(run) if "loss" in record]
    assert losses[-1] < losses[0] - 0.1
    assert cli("generate", str(run), "--prompt", "Say", "--max-tokens", "4") == 0 and capfd.readouterr().out
    own, base = logits(run), logits(community)
    assert np.abs(own - base).max() > 1e-2
    export(run, tmp_path / "hf", "hf", merged=True)
    assert "quantization" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (
        np.abs(logits(tmp_path / "hf") - own).max() < 0.1 * np.abs(own - base).max()
    )  # bfloat16, as the base
    export(run, tmp_path / "mlx-lm", "mlx-lm", merged=True)
    settings = json.loads((tmp_path / "mlx-lm" / "config.json").read_text())
    assert settings["quantization"]["bits"] == 4
    assert np.abs(logits(tmp_path / "mlx-lm") - own).max() < 0.5 * np.abs(own - base).max()
    adapter = export(run, tmp_path / "peft", "peft")
    assert adapter and (tmp_path / "peft" / "adapter_model.safetensors").is_file()
