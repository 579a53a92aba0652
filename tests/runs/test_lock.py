"""Two processes never write the same run.

The second is told which process has it; a process that died leaves the run free.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlx_posttrain import methods, runs
from mlx_posttrain.cli import main
from mlx_posttrain.errors import UserError
from mlx_posttrain.runs import lock

STAGES = {"stages": {"a": {"recipe": "01_sft"}}, "method": "pipeline"}

WRITER = """
import sys
from mlx_posttrain import methods, runs
run = runs.create(sys.argv[2], methods.load_recipe(sys.argv[1], [f"output={sys.argv[2]}"]))
print("writing", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """Start a process that writes a run in the folder; it is killed when the test ends."""
    started = []

    def call(what: str, folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, what, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


def refused(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        main([*arguments])
    assert exit.value.code == 2
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_a_run_in_progress_is_neither_resumed_nor_started_over(writer, tmp_path, capfd):
    folder = tmp_path / "live"
    process = writer("01_sft", folder)
    for arguments in (["--resume", str(folder)], ["01_sft", "model=tiny", f"output={folder}"]):
        line = refused(capfd, "run", *arguments)
        assert f"{folder} is in use by process {process.pid}" in line and "--resume" not in line
    assert (folder / "recipe.yaml").is_file()  # the refusal removed nothing
    runs.reopen(folder)  # reading stays possible
    process.send_signal(signal.SIGKILL)
    process.wait()
    run, _ = runs.reopen(folder, write=True)
    run.close()
    assert not (folder / lock.NAME).exists()
    with pytest.raises(UserError, match="holds an unfinished run: continue it with --resume"):
        runs.create(folder, methods.load_recipe("01_sft"))


def test_a_pipeline_in_progress_is_not_resumed(writer, tmp_path, capfd):
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(STAGES))
    folder = tmp_path / "live"
    process = writer(str(tmp_path / "two.yaml"), folder)
    assert f"in use by process {process.pid}" in refused(capfd, "run", "--resume", str(folder))
    with pytest.raises(lock.RunInUse):
        methods.run(methods.load_recipe(str(tmp_path / "two.yaml"), [f"output={folder}"]))


def test_a_stage_that_another_process_resumed_is_left_alone(writer, tmp_path, capfd):
    """The error does not advise deleting it: nothing is wrong with it."""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(STAGES))
    folder = tmp_path / "whole"
    runs.create(folder, methods.load_recipe(str(tmp_path / "two.yaml"), [f"output={folder}"])).close()
    process = writer("01_sft", folder / "a")
    line = refused(capfd, "run", "--resume", str(folder))
    assert (
        line.startswith("mlx-posttrain: stage a: ")
        and f"process {process.pid}" in line
        and "delete" not in line
    )


def test_of_two_that_start_at_once_one_is_refused(writer, tmp_path, monkeypatch):
    """Both found the folder empty before either wrote to it."""
    folder = tmp_path / "live"
    writer("01_sft", folder)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(lock.RunInUse):
        runs.create(folder, methods.load_recipe("01_sft"))


def test_a_failed_run_can_be_resumed_in_the_same_process(tmp_path):
    run = runs.create(tmp_path / "run", methods.load_recipe("01_sft"))
    again, _ = runs.reopen(run.folder, write=True)
    again.close()
    assert (run.folder / lock.NAME).is_file()  # the first still has it
    run.close()
    assert not (run.folder / lock.NAME).exists()


def test_a_run_taken_away_leaves_no_lock(tmp_path):
    run = runs.create(tmp_path / "run", methods.load_recipe("01_sft"))
    run.discard()
    assert not run.folder.exists()
    run = runs.create(tmp_path / "run", methods.load_recipe("01_sft"))
    run.close()
