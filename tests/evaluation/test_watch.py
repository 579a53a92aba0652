"""A page that is written anew while a run goes on: when, with what, and how it ends."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_posttrain import engines, jsonl
from mlx_posttrain.evaluation import watch
from tests.helpers import cli, command, refused, wait_for

RELOADS = f'<meta http-equiv="refresh" content="{watch.SECONDS}">'


class Run:
    """A run's records, and the lock of the process that writes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        recipe = {"method": "sft", "model": "tiny", "train": {"steps": 40}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.lock = (folder / ".lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.log(step=0, **{"eval/loss": 5.25})

    def log(self, **record: Any) -> None:
        jsonl.append(self.folder / "metrics.jsonl", [record])

    def end(self, finished: bool = True) -> None:
        if finished:
            (self.folder / "final").mkdir()
        self.lock.close()


@pytest.fixture
def run(tmp_path) -> Iterator[Run]:
    found = Run(tmp_path / "run")
    yield found
    found.lock.close()


@pytest.fixture
def clock(monkeypatch) -> Callable[..., list[float]]:
    """Do one thing in each rest of the watch; returns how long the rests were meant to be."""

    def set_up(*happenings: Callable[[], object]) -> list[float]:
        rests: list[float] = []
        following = iter(happenings)

        def sleep(seconds: float) -> None:
            rests.append(seconds)
            next(following)()

        monkeypatch.setattr(watch, "sleep", sleep)
        return rests

    return set_up


def test_the_page_follows_the_records_and_the_last_one_stays(run, clock, tmp_path, monkeypatch, capfd):
    page = tmp_path / "page.html"
    seen: list[str] = []

    def look(then: Callable[[], object]) -> Callable[[], object]:
        return lambda: (seen.append(page.read_text()), then())

    def grow() -> None:
        for step in (1, 2, 3):
            run.log(step=step, loss=5.0 - step / 8)

    def half_a_line() -> None:
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')

    writes = []
    save = watch.report.write
    monkeypatch.setattr(watch.report, "write", lambda *a, **k: (writes.append(a), save(*a, **k))[1])
    monkeypatch.setattr(engines, "get", lambda *a: pytest.fail("a model was loaded"))
    rests = clock(look(grow), look(lambda: None), look(half_a_line), look(run.end))
    assert cli("report", str(run.folder), "--watch", "--output", str(page)) == 0
    assert all(RELOADS in text for text in seen) and min(rests) >= watch.SECONDS
    assert "run: step 0 of 40, held-out loss 5.25" in seen[0] and "<svg" not in seen[0]
    assert "run: step 3 of 40, loss 4.625, held-out loss 5.25" in seen[1] and "<svg" in seen[1]
    assert seen[2] == seen[1]  # nothing had changed, so nothing was written
    assert "run: step 3 of 40" in seen[3]
    assert len(writes) == 4  # at the beginning, two changes, the end
    last = page.read_text()
    assert "refresh" not in last and "step 3 of 40" not in last and "<h2" in last
    assert not list(tmp_path.glob(".*")), "a temporary file was left"
    errors = capfd.readouterr().err.splitlines()
    assert errors[-2:] == [f"{run.folder} is finished", str(page)]


def test_a_run_that_was_cut_off_ends_the_watch(run, clock, tmp_path, capfd):
    clock(lambda: run.end(finished=False))
    assert cli("report", str(run.folder), "--watch", "--output", str(tmp_path / "page.html")) == 0
    assert f"is unfinished and no process writes it: `mlx-posttrain run --resume {run.folder}`" in (
        capfd.readouterr().err
    )
    assert "refresh" not in (tmp_path / "page.html").read_text()


def test_ctrl_c_ends_with_a_line_and_a_page_that_is_still(run, clock, tmp_path, capfd):
    def interrupt() -> None:
        raise KeyboardInterrupt

    clock(interrupt)
    assert cli("report", str(run.folder), "--watch", "--output", str(tmp_path / "page.html")) == 0
    errors = capfd.readouterr().err
    assert "no longer written anew; the run goes on" in errors and "Traceback" not in errors
    assert "refresh" not in (tmp_path / "page.html").read_text()


def test_what_cannot_be_watched_is_one_line(tmp_path, capfd):
    assert "not a run" in refused(capfd, "report", "tiny", "--watch", "--output", str(tmp_path / "p.html"))
    folder = tmp_path / "journey"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"method": "pipeline", "stages": {"sft": {}}}))
    line = refused(capfd, "report", str(folder), "--watch", "--output", str(tmp_path / "p.html"))
    assert f"is a pipeline: watch its stages, of which there are {folder / 'sft'}" in line


@pytest.mark.exhaustive
def test_a_real_run_is_watched_to_its_end(tmp_path, monkeypatch):
    folder, page = tmp_path / "run", tmp_path / "page.html"
    settings = ["model=tiny", "data.source=embedded/tasks", "data.limit=64", "data.eval_limit=8"]
    settings += ["train.steps=12", "train.batch_size=4", "train.eval_every=4", f"output={folder}"]
    process = subprocess.Popen(
        command("run", "01_sft", *settings, "sample.max_tokens=8"), stderr=subprocess.PIPE, text=True
    )
    wait_for((folder / "recipe.yaml").is_file, process)
    pages = []
    monkeypatch.setattr(watch, "SECONDS", 0.2)
    monkeypatch.setattr(watch, "REST", 1)
    write = watch._write_live
    monkeypatch.setattr(watch, "_write_live", lambda *a: (write(*a), pages.append(page.read_text())))
    assert cli("report", str(folder), "--watch", "--output", str(page)) == 0
    assert process.wait(120) == 0, process.communicate()
    assert pages and all("http-equiv" in text for text in pages)
    assert any("of 12, loss" in text for text in pages)
    last = page.read_text()
    assert "http-equiv" not in last and "Did a run learn its rows by heart?" in last
