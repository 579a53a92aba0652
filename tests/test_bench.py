"""The benchmark: real processes that take turns, ratios that are refused, and what is written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_posttrain import bench, engines
from mlx_posttrain.bench import render, work
from mlx_posttrain.bench.material import Shape, model_folder, rows
from mlx_posttrain.cli import app
from mlx_posttrain.convert import hub
from mlx_posttrain.errors import UserError
from mlx_posttrain.plan import Size


def timing(engine: str, seconds: list[float], losses: list[float]) -> bench.Timing:
    return bench.Timing(engine, "sft", seconds=seconds, losses=losses, rows=8, tokens=100)


def test_ratio_is_the_median_of_pairs() -> None:
    found = [timing("mlx-cpu", [1.0, 2.0, 4.0], [3.0] * 3), timing("torch-cpu", [2.0, 2.0, 12.0], [3.0] * 3)]
    bench._compare(found)
    assert found[0].ratio is None and found[1].ratio == (2.0, 1.0, 3.0)


def test_no_ratio_where_losses_disagree() -> None:
    found = [timing("mlx-cpu", [1.0], [3.0]), timing("torch-cpu", [2.0], [3.03]), timing("mlx-lm", [2.0], [3.03])]
    bench._compare(found)
    assert found[1].ratio is None and found[1].disagreement == pytest.approx(0.01)
    assert found[2].ratio is not None  # a peer's masks and averages are its own
    assert "no ratio: losses differ by 1.0%" in render._ratio(vars(found[1]))


def test_no_ratio_where_a_loss_is_not_finite() -> None:
    found = [timing("mlx-cpu", [1.0, 1.0], [3.0, 3.0]), timing("torch-cpu", [2.0, 2.0], [3.0, float("nan")])]
    bench._compare(found)
    assert found[1].ratio is None and "not finite" in (found[1].error or "") and not found[1].losses and found[0].error is None


def test_rows_are_the_same_everywhere_and_as_long_as_said() -> None:
    shape = Shape(rows=64)
    assert rows(shape, 4096) == rows(shape, 4096)
    prompts, answers = zip(*((sum(not t for t in e.trained), sum(e.trained)) for e in rows(shape, 4096)), strict=True)
    assert min(prompts) >= 20 and max(prompts) <= 60 and min(answers) >= 10 and max(answers) <= 200
    assert {len(e.tokens) for e in rows(Shape(rows=4, length=40), 4096)} == {40}


def test_operations_by_hand() -> None:
    tiny = Size(1, 2, 8, 1, 10, 32, "gpt2", {"h.0.attn.c_attn.weight": (2, 6), "h.0.mlp.c_fc.weight": (2, 18), "wte.weight": (10, 2)})
    shape = Shape(rows=1, length=8)  # 1 prompt token, 7 trained
    attention = 2 * 2 * 2 * 64 / 2
    assert work.training_flops(tiny, "sft", shape) == 6 * (12 * 4 * 8 + 2 * 10 * 7) + 3 * attention
    assert work.training_flops(tiny, "kl-lora", shape) == 6 * (12 * 4 * 8 + 2 * 10 * 7) + 4 * attention


@pytest.mark.slow
def test_engines_take_turns_on_the_embedded_model(tmp_path: Path) -> None:
    have = bench.here()
    done = CliRunner().invoke(
        app, ["bench", "--model", "tiny", "--what", "sft,generate", "--units", "2", "--rows", "16", "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    timings = {(t["what"], t["engine"]): t for t in result["timings"]}
    assert set(timings) == {(w, e) for w in ("sft", "generate") for e in have}
    for t in timings.values():
        assert t["error"] is None and len(t["seconds"]) == 2 and min(t["seconds"]) > 0 and t["peak_gb"] > 0
    if len(have) > 1:
        assert timings["sft", have[1]]["ratio"] is not None, timings["sft", have[1]]["disagreement"]
        assert timings["generate", have[1]]["disagreement"] < 5e-3  # the same answers, sampled from the same numbers
    again = CliRunner().invoke(app, ["bench", "--model", "tiny", "--output", str(tmp_path / "out")])
    assert "holds a benchmark already" in str(again.exception)  # and nothing was measured for it
    text = (tmp_path / "out" / "bench.md").read_text()
    assert "- chip: " in text and "| sft | " in text
    assert all((tmp_path / "out" / f"bench.{ending}").stat().st_size > 1000 for ending in ("svg", "png"))


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_a_word(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mlx_posttrain",
        "bench",
        "--model",
        "tiny",
        "--what",
        "sft",
        "--units",
        "500",
        "--output",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    assert "unit 1 of 500" in process.stderr.readline()  # both engines are open and have warmed up
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 2 and rest.strip().splitlines()[-1] == "mlx-posttrain: interrupted"
    assert not (tmp_path / "out" / "bench.json").exists()


@pytest.mark.slow
def test_a_worker_that_fails_is_a_line() -> None:
    (found,) = bench._take_turns([{"engine": bench.here()[0], "what": "sft", "folder": "/nowhere", "shape": vars(Shape())}], 1)
    assert found.error and "nowhere" in found.error
    assert "nowhere" in render.table({"timings": [vars(found)]})


@pytest.mark.slow
def test_random_weights_of_a_named_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_posttrain.bench import material

    monkeypatch.setitem(material.SIZES, "gpt2", (1, 2, 8))
    folder = model_folder("gpt2", tmp_path)
    hub.check_folder(folder)
    model = engines.get("auto").load(folder)
    assert model.parameter_counts()[0] == 50257 * 8 + 1024 * 8 + 12 * 64 + (4 + 9) * 8 + 2 * 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--what", "sfd"], "sfd"),
        (["--engines", "cuda"], "mlx-gpu, mlx-cpu, torch-cpu"),
        (["--rows", "12"], "no multiple of --batch-size 8"),
        (["--what", "reward", "--rows", "9", "--batch-size", "3"], "give an even number"),
        (["--what", "ppo", "--rows", "10", "--batch-size", "5"], "give a number that divides them"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "--output", str(tmp_path), *arguments])
    assert isinstance(done.exception, UserError) and said in str(done.exception)
