"""The number format of a model: by device, by what is trained, by its run, and as it is asked for."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mlx_posttrain import doctor, engines, load, methods
from mlx_posttrain.convert import checks, hub
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.engines.precision import DTYPES, model_dtype
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model
from mlx_posttrain.rewards.scorer import score_rows
from tests.helpers import cli, refused, run_recipe

ENGINES = engines.available()


def test_the_device_and_what_is_trained_decide_where_nobody_asks():
    def decide(asked: str | None, gpu: bool, trained: bool, stored: str) -> str:
        return model_dtype(asked, gpu=gpu, trained=trained, stored=lambda: stored)

    for stored in DTYPES:
        assert decide(None, True, False, stored) == stored
        for gpu, trained in ((True, True), (False, True), (False, False)):
            assert decide(None, gpu, trained, stored) == "float32"
        for gpu, trained, asked in itertools.product((True, False), (True, False), DTYPES):
            assert decide(asked, gpu, trained, stored) == asked
    with pytest.raises(UserError, match="unknown dtype 'bfloat61'; did you mean bfloat16"):
        decide("bfloat61", True, False, "float32")

    def unread() -> str:
        raise AssertionError("the files were read needlessly")

    assert model_dtype(None, gpu=False, trained=False, stored=unread) == "float32"


def half_folder(source: Path, folder: Path, dtype: str = "bfloat16") -> Path:
    convert(source, folder, to="hf", dtype=dtype)
    return folder


def test_the_files_say_in_which_format_they_are(random_gpt2, tmp_path):
    folders = {dtype: half_folder(random_gpt2, tmp_path / dtype, dtype) for dtype in DTYPES}
    for dtype, folder in folders.items():
        assert checks.stored_dtype(folder, hub.weight_files(folder)) == dtype
    if "mlx" in ENGINES:
        convert(random_gpt2, tmp_path / "packed", quantize=4, dtype="float16")
        assert checks.stored_dtype(tmp_path / "packed", hub.weight_files(tmp_path / "packed")) == "float16"


@pytest.fixture(params=ENGINES)
def loaded(request, monkeypatch) -> tuple[str, list[str]]:
    """An engine by name, said to compute on a GPU, and the formats in which it is asked for models."""
    kind, found = type(engines.get(request.param)), []
    original = kind.load
    monkeypatch.setattr(kind, "gpu", True)

    def recorded(self: Any, folder: Path, **settings: Any) -> Any:
        found.append(settings["dtype"])
        return original(self, folder, **settings)

    monkeypatch.setattr(kind, "load", recorded)
    return request.param, found


def formats(model: Any) -> dict[str, set[str]]:
    """The number formats of a model's weights: {"base", "adapter"}."""
    if hasattr(model.net, "named_parameters"):
        named = list(model.net.named_parameters())
    else:
        from mlx.utils import tree_flatten

        named = tree_flatten(model.net.parameters())
    found: dict[str, set[str]] = defaultdict(set)
    for name, value in named:
        found["adapter" if "lora" in name else "base"].add(str(value.dtype).rpartition(".")[2])
    return dict(found)


def settings(engine: str, model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    return [
        f"engine={engine}",
        f"model={model}",
        f"data.source={rows}",
        f"output={output}",
        "train.steps=2",
        "sample.count=1",
        *more,
    ]


def test_a_frozen_base_keeps_its_half_precision_on_a_gpu(loaded, random_gpt2, rows_file, tmp_path, capsys):
    engine, asked = loaded
    half = half_folder(random_gpt2, tmp_path / "half")
    lora = settings(engine, half, rows_file, tmp_path / "lora", "adapter.rank=2")
    (planned,) = methods.plan(methods.load_recipe("01_sft", lora))
    assert planned.dtype == "bfloat16" and f"on {engine} in bfloat16: " in planned.text()
    run_recipe("01_sft", *lora)
    assert yaml.safe_load((tmp_path / "lora" / "recipe.yaml").read_text())["dtype"] == "bfloat16"
    assert asked == ["bfloat16"]
    run_recipe("01_sft", *settings(engine, half, rows_file, tmp_path / "full"))
    assert yaml.safe_load((tmp_path / "full" / "recipe.yaml").read_text())["dtype"] == "float32"

    del asked[:]
    answer = ["--engine", engine, "--prompt", "The cat", "--max-tokens", "2"]
    for name, more in (("lora", []), ("full", []), ("half", []), ("lora", ["--dtype", "float32"])):
        cli("generate", str(tmp_path / name), *answer, *more)
    assert asked == ["bfloat16", "float32", "bfloat16", "float32"]
    opened = open_model(tmp_path / "lora", engine)[0]
    assert formats(opened) == {"base": {"bfloat16"}, "adapter": {"float32"}}


def test_commands_load_a_runs_own_format_and_take_another(loaded, random_gpt2, rows_file, tmp_path, capsys):
    engine, asked = loaded
    output = tmp_path / "run"
    run_recipe("01_sft", *settings(engine, random_gpt2, rows_file, output, "adapter.rank=2", "dtype=float16"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    suite = [f"rows={rows_file}", "limit=2", "texts=null", "samples=0", "max_tokens=4"]
    on = ["--engine", engine]
    short = ["--samples", "1", "--max-tokens", "4"]
    commands = {
        "eval": ["eval", str(output), *suite, *on],
        "compare": ["compare", str(output), *suite, *on],
        "synthesize": [
            *("synthesize", str(tmp_path / "made.jsonl"), "--teacher", str(output)),
            *("--prompts", str(questions), *short, *on),
        ],
    }
    for words in commands.values():
        del asked[:]
        assert cli(*words) == 0
        assert "float16" in asked and set(asked) <= {"float16", "float32"}, words
        del asked[:]
        (tmp_path / "made.jsonl").unlink(missing_ok=True)
        assert cli(*words, "--dtype", "bfloat16") == 0
        assert "bfloat16" in asked and "float16" not in asked, words


@pytest.mark.parametrize("command", [["chat", "tiny"], ["eval", "tiny"], ["convert", "tiny", "somewhere"]])
def test_an_unknown_format_is_refused_at_once(command, capfd):
    assert "unknown dtype 'half'" in refused(capfd, *command, "--dtype", "half")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reward_model_scores_in_its_own_format(engine, random_gpt2, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    sides = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in sides))
    given = settings(engine, random_gpt2, rows, tmp_path / "run", "adapter.rank=2", "dtype=bfloat16")
    run_recipe("07_reward", *given, "sample.count=0")
    half, _, _ = open_model(tmp_path / "run", engine, scores=True)
    whole, _, _ = open_model(tmp_path / "run", engine, "float32", scores=True)
    assert formats(half)["base"] == {"bfloat16", "float32"}  # its head is float32
    tokens = [list(range(3, 3 + n)) for n in (5, 9, 12)]
    scores, exact = score_rows(half, tokens, 0), score_rows(whole, tokens, 0)
    assert 0 < np.abs(scores - exact).max() < 0.05
    assert load(tmp_path / "run", engine).score(["a"], ["b"])[0] == pytest.approx(
        load(tmp_path / "run", engine, "float32").score(["a"], ["b"])[0], abs=0.05
    )


def test_doctor_says_which_format_is_used(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1")
    for default, words in (("gpu", "a frozen model as its files have it"), ("cpu", "a frozen model float32")):
        monkeypatch.setattr(doctor.probe, "mlx_devices", lambda d=default: doctor.probe.Devices({}, d))
        (found,) = doctor._dtypes()
        assert words in found.value and found.status == doctor.OK
