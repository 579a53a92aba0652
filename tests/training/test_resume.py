"""A run that is killed at any moment and resumed gives the losses and weights of one that was not. Real
processes, real kills.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from mlx_posttrain import engines
from mlx_posttrain.console import Interrupted, interruptible
from tests.helpers import command, records, resume_run, run_recipe, same_weights, wait_for

ENGINES = engines.available()


def settings(model: Path, rows: Path, output: Path, engine: str, *more: str) -> list[str]:
    return [
        "run",
        "01_sft",
        f"model={model}",
        f"data.source={rows}",
        "data.holdout=6",
        f"output={output}",
        f"engine={engine}",
        "train.steps=14",
        "train.eval_every=5",
        "train.save_every=3",
        "train.lr=1e-3",
        "train.batch_size=3",
        "train.grad_accumulation=2",
        "sample.count=1",
        "sample.max_tokens=4",
        *more,
    ]


FULL: list[str] = []
DROPOUT = ["adapter.rank=4", "adapter.dropout=0.2"]
KILLED = {
    "full-torch": ("torch", FULL, pytest.mark.exhaustive),
    "full-mlx": ("mlx", FULL, pytest.mark.exhaustive),
    "lora with dropout-torch": ("torch", DROPOUT, pytest.mark.exhaustive),
    "lora with dropout-mlx": ("mlx", DROPOUT, ()),
    **{
        f"{name}-{engine}": (engine, ["kl.beta=0.3", *more], pytest.mark.exhaustive)
        for name, more in (("kl", []), ("kl lora", ["adapter.rank=4"]))
        for engine in ("torch", "mlx")
    },
}


@pytest.mark.parametrize(
    "engine, adapter",
    [
        pytest.param(engine, adapter, id=name, marks=marks)
        for name, (engine, adapter, marks) in KILLED.items()
        if engine in ENGINES
    ],
)
def test_kill_and_resume_equals_an_uninterrupted_run(engine, adapter, random_gpt2, rows_file, tmp_path):
    whole = tmp_path / "whole"
    subprocess.run(
        command(*settings(random_gpt2, rows_file, whole, engine, *adapter)),
        check=True,
        capture_output=True,
        timeout=300,
    )

    broken = tmp_path / "broken"
    arguments = settings(random_gpt2, rows_file, broken, engine, *adapter)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (broken / "checkpoints" / "step-000006").is_dir(), process)
    process.kill()  # kill -9: no handler runs
    process.wait()
    killed_after = len(records(broken))
    assert not (broken / "final").exists()

    done = subprocess.run(
        command("run", "--resume", str(broken)), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert ("hidden states are computed once and kept" in done.stderr) == ("kl.beta=0.3" in adapter)
    assert killed_after < len(records(whole)), "the kill came too late to prove anything"
    assert records(broken) == records(whole)
    assert same_weights(broken, whole)

    again = subprocess.run(
        command("run", "--resume", str(broken)), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 2 and "finished" in again.stderr


KINDS = {
    "dora with dropout": ["adapter.rank=4", "adapter.kind=dora", "adapter.dropout=0.2"],
    "qlora": ["adapter.rank=4", "adapter.quantize=4"],
    "adapter to start from": ["adapter.path={adapter}"],
    "mixed precision": ["train.precision=mixed"],
    "recomputed activations": ["train.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_training_resumes(engine, kind, random_gpt2, rows_file, tmp_path):
    """From the checkpoint before the last one; in this process, as the kill itself is tested above."""
    if kind == "qlora" and engine != "mlx":
        pytest.skip("quantised training needs mlx")

    def train(output: Path, *more: str) -> Path:
        overrides = settings(
            random_gpt2,
            rows_file,
            output,
            engine,
            "train.steps=5",
            "train.save_every=2",
            "sample.count=0",
            *more,
        )[2:]
        run_recipe("01_sft", *overrides)
        return output

    if "{adapter}" in KINDS[kind][0]:
        train(tmp_path / "first", "adapter.rank=4")
    whole = train(
        tmp_path / "whole", *(setting.format(adapter=tmp_path / "first") for setting in KINDS[kind])
    )
    broken = shutil.copytree(whole, tmp_path / "broken")
    shutil.rmtree(broken / "final")
    shutil.rmtree(broken / "checkpoints" / "step-000005")
    resume_run(broken)
    assert [r["step"] for r in records(broken)] == [0, 1, 2, 3, 4, 5, 5]
    assert records(broken) == records(whole) and same_weights(broken, whole)


def test_ctrl_c_that_also_kills_the_compiler_of_mlx(tmp_path):
    """What MLX then raises is part of the interrupt; without one it keeps its traceback."""
    with (
        pytest.raises(
            Interrupted,
            match=r"interrupted \(SIGINT\) in the middle of a step: continue .* "
            r"--resume",
        ),
        interruptible(tmp_path),
    ):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("Could not load C++ shared library")
    with pytest.raises(RuntimeError, match="shared library"), interruptible(tmp_path):
        raise RuntimeError("Could not load C++ shared library")


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_killed_before_the_first_checkpoint(engine, random_gpt2, rows_file, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(*settings(random_gpt2, rows_file, run, engine, "train.save_every=100")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: (run / "metrics.jsonl").is_file(), process)
    process.kill()
    process.wait()
    if (run / "final").exists():
        pytest.skip("the run was over before the kill")
    done = subprocess.run(command("run", "--resume", str(run)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [r["step"] for r in records(run) if "loss" in r]
    assert steps == list(range(1, 15))


@pytest.mark.parametrize("engine", ENGINES[:1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(engine, number, random_gpt2, rows_file, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(
            *settings(
                random_gpt2,
                rows_file,
                run,
                engine,
                "train.steps=5000",
                "train.save_every=100000",
                "train.eval_every=100000",
                "train.batch_size=34",  # one shape: a signal while MLX compiles ends the step, see above
                "train.grad_accumulation=1",
            )
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (run / "metrics.jsonl").is_file() and len(records(run)) > 3, process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"--resume {run}" in errors.splitlines()[-1] and "Traceback" not in errors
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert json.loads((checkpoint / "state.json").read_text())["step"] == records(run)[-1]["step"]


def test_a_second_run_never_overwrites_the_first(random_gpt2, rows_file, tmp_path):
    arguments = settings(random_gpt2, rows_file, tmp_path / "run", ENGINES[0], "train.steps=1")
    subprocess.run(command(*arguments), check=True, capture_output=True, timeout=120)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    second = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and "finished run" in second.stderr and "output=DIR" in second.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
