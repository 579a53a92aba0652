"""The recipe key ``log``: TensorBoard and Weights & Biases get what metrics.jsonl holds, each step once.

Without ``log`` they get nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.errors import UserError
from mlx_posttrain.runs import trackers
from mlx_posttrain.training import setup
from tests.helpers import CLOCK

ENGINE = engines.available()[0]
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None, reason="needs tensorboardX"
)


def settings(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model={model}",
        f"data.source={rows}",
        "data.holdout=6",
        f"output={output}",
        f"engine={ENGINE}",
        "train.steps=8",
        "train.eval_every=4",
        "train.save_every=2",
        "train.lr=1e-3",
        "train.batch_size=3",
        "sample.count=0",
        *more,
    ]


def call(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, with ``path`` before the installed packages."""
    before = os.pathsep.join(str(p) for p in (path, os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        [sys.executable, "-m", "mlx_posttrain", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": before, **environment},
    )


def expected(run: Path) -> dict[tuple[str, int], np.float32]:
    """Return {(name, step): value} of every number in metrics.jsonl, as precise as TensorBoard keeps it."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [((k, r["step"]), np.float32(v)) for r in records for k, v in r.items() if k != "step"]
    assert len(dict(found)) == len(found)
    return dict(found)


def events(folder: Path) -> list[Any]:
    """Return every complete event in a folder's files, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):
                break
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def shown(folder: Path) -> tuple[dict[tuple[str, int], np.float32], list[str]]:
    """Return the (scalars, texts) that TensorBoard shows.

    A session start drops the earlier scalars from its step on.
    """
    scalars: dict[tuple[str, int], np.float32] = {}
    texts: list[str] = []
    for event in events(folder):
        if event.HasField("session_log"):
            scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts.append(value.tensor.string_val[0].decode())
            else:
                assert (value.tag, event.step) not in scalars, "TensorBoard would show this step twice"
                scalars[value.tag, event.step] = np.float32(value.simple_value)
    return scalars, texts


def check_with_tensorboard(folder: Path, wanted: dict[tuple[str, int], np.float32]) -> None:
    """Check the same with TensorBoard's own reader, where it is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = [
        ((tag, s.step), np.float32(s.value)) for tag in reader.Tags()["scalars"] for s in reader.Scalars(tag)
    ]
    assert sorted(found) == sorted(wanted.items())
    assert len(reader.Tensors("recipe/text_summary")) == 1


@needs_tensorboard
def test_event_files_hold_what_metrics_hold(random_gpt2, rows_file, tmp_path):
    chosen = methods.load_recipe(
        "01_sft", settings(random_gpt2, rows_file, tmp_path / "run", "log=[tensorboard]")
    )
    methods.run(chosen)
    scalars, texts = shown(tmp_path / "run" / "tensorboard")
    wanted = expected(tmp_path / "run")
    assert scalars == wanted
    assert {("loss", 1), ("lr", 8), ("eval/loss", 0), ("eval/loss", 8)} <= set(wanted)
    (text,) = texts
    assert "batch_size: 3" in text and f"model: {random_gpt2}" in text
    check_with_tensorboard(tmp_path / "run" / "tensorboard", wanted)


@needs_tensorboard
@pytest.mark.parametrize(
    "checkpoint",
    [
        pytest.param("step-000004", id="after a checkpoint"),
        pytest.param(None, id="before the first", marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_and_resumed_run_has_each_step_once(checkpoint, random_gpt2, rows_file, tmp_path):
    run = tmp_path / "run"
    more = [
        "log=[tensorboard]",
        "train.steps=40",
        "train.eval_every=10",
        f"train.save_every={4 if checkpoint else 1000}",
    ]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlx_posttrain",
            "run",
            "01_sft",
            *settings(random_gpt2, rows_file, run, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 120
    while (
        not (run / "checkpoints" / checkpoint).exists()
        if checkpoint
        else len(events(run / "tensorboard")) < 5
    ):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    process.kill()  # kill -9: nothing is closed
    process.communicate()
    before = len(events(run / "tensorboard"))
    if (run / "final").exists():
        pytest.skip("the run was over before the kill")
    (file,) = (run / "tensorboard").iterdir()
    with file.open("ab") as f:
        f.write(b"\x40")  # half an event
    done = call("--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert len(list((run / "tensorboard").iterdir())) == 2 and len(events(run / "tensorboard")) > before
    scalars, texts = shown(run / "tensorboard")
    assert scalars == expected(run) and len(texts) == 1
    assert [step for name, step in sorted(scalars) if name == "loss"] == list(range(1, 41))
    check_with_tensorboard(run / "tensorboard", scalars)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_and_leaves_nothing(name, package, random_gpt2, rows_file, tmp_path):
    """Also where a folder has the package's name, as W&B leaves them: Python finds a namespace package."""
    hide = tmp_path / "site"
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.machinery import ModuleSpec\nclass Hide:\n    def find_spec(self, name, "
        "path=None, target=None):\n"
        f"        return ModuleSpec(name, None) if name == {package!r} else None\nsys.meta_path.insert(0, "
        "Hide())\n"
    )
    done = call("01_sft", *settings(random_gpt2, rows_file, tmp_path / "run", f"log=[{name}]"), path=hide)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert f"pip install {package}" in line and name in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_named(random_gpt2, rows_file, tmp_path):
    with pytest.raises(UserError, match=r"log.*tensorboard.*wandb.*mlflow"):
        methods.load_recipe("01_sft", settings(random_gpt2, rows_file, tmp_path / "run", "log=[mlflow]"))


FAKE_WANDB = """
import json, os
class Error(Exception): pass
def _write(*record):
    with open(os.environ["FAKE_WANDB"], "a") as f:
        f.write(json.dumps(record) + "\\n")
def login(**settings):
    if os.environ.get("FAKE_WANDB_KEY") == "none":
        raise Error("no API key\\nconfigured")
    _write("login", settings)
class _Run:
    def __init__(self, id):
        lines = [json.loads(line) for line in open(os.environ["FAKE_WANDB"])]
        steps = [r[2] for r in lines if r[0] == "log"]
        self.resumed = bool(steps)
        self.step = steps[-1] + 1 if steps else 0
    def log(self, values, step):
        _write("log", values, step)
    def finish(self, exit_code):
        _write("finish", exit_code)
def init(**settings):
    run = _Run(settings["id"])
    _write("init", settings)
    return run
"""


@pytest.fixture
def fake_wandb(tmp_path: Path) -> tuple[Path, Path]:
    """Return (folder for the path, file of calls) of a module that records its calls and answers like W&B."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(FAKE_WANDB)
    (tmp_path / "calls").touch()
    return tmp_path / "site", tmp_path / "calls"


def test_wandb_is_called_as_it_should_be(fake_wandb, random_gpt2, rows_file, tmp_path):
    """A fake W&B: the run starts, stops at a non-finite loss after step 5, and is resumed."""
    site, calls = fake_wandb
    run = tmp_path / "run"
    (site / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('BREAK'):\n"
        f"    from mlx_posttrain.engines.{ENGINE} import trainer as e\n"
        "    cls = next(v for k, v in vars(e).items() if k.endswith('Trainer') and hasattr(v, 'step') and "
        "v.__module__ == e.__name__)\n"
        "    step, count = cls.step, []\n    def broken(self, *a):\n        count.append(1)\n"
        "        if len(count) > 5: raise FloatingPointError('loss is nan')\n        return step(self, "
        "*a)\n    cls.step = broken\n"
    )
    arguments = settings(random_gpt2, rows_file, run, "log=[wandb]")
    broken = call("01_sft", *arguments, path=site, FAKE_WANDB=str(calls), WANDB_MODE="online", BREAK="1")
    assert broken.returncode == 2 and "loss is nan" in broken.stderr
    first = [json.loads(line) for line in calls.read_text().splitlines()]
    # evaluations at 0 and 4, steps 1 to 5
    assert [r[0] for r in first] == ["login", "init", *["log"] * 7, "finish"]
    assert first[-1] == ["finish", 1]
    resumed = call("--resume", str(run), path=site, FAKE_WANDB=str(calls), WANDB_MODE="offline")
    assert resumed.returncode == 0, resumed.stderr
    second = [json.loads(line) for line in calls.read_text().splitlines()][len(first) :]
    # from checkpoint 4: W&B has step 5, so 6, 7, 8 and the evaluation
    assert [r[0] for r in second] == ["init", *["log"] * 4, "finish"]
    assert second[-1] == ["finish", 0]

    started, again = first[1][1], second[0][1]
    assert started == again and started["id"]
    assert (started["project"], started["name"], started["dir"]) == ("mlx-posttrain", "run", str(run))
    assert started["config"]["train"]["steps"] == 8 and started["resume"] == "allow"
    logged = [((k, r[2]), np.float32(v)) for r in first + second if r[0] == "log" for k, v in r[1].items()]
    wanted = expected(run)
    assert len(dict(logged)) == len(logged) and dict(logged).keys() == wanted.keys()
    assert all(dict(logged)[key] == value for key, value in wanted.items() if key[0] not in CLOCK)


def test_without_an_account_nothing_begins(fake_wandb, random_gpt2, rows_file, tmp_path):
    site, calls = fake_wandb
    arguments = settings(random_gpt2, rows_file, tmp_path / "run", "log=[wandb]")
    done = call(
        "01_sft", *arguments, path=site, FAKE_WANDB=str(calls), FAKE_WANDB_KEY="none", WANDB_MODE="online"
    )
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert "no API key configured" in line and "wandb login" in line and "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


def test_wandb_is_not_touched_without_log(fake_wandb, random_gpt2, rows_file, tmp_path):
    site, calls = fake_wandb
    done = call(
        "01_sft",
        *settings(random_gpt2, rows_file, tmp_path / "run", "train.steps=2"),
        path=site,
        FAKE_WANDB=str(calls),
    )
    assert done.returncode == 0 and calls.read_text() == ""
    assert not {"wandb", "tensorboard"} & {p.name for p in (tmp_path / "run").iterdir()}


def test_wandb_offline(random_gpt2, rows_file, tmp_path):
    """The real package, where installed: its own file holds every number of metrics.jsonl."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
    }
    done = call("01_sft", *settings(random_gpt2, rows_file, run, "log=[wandb]"), **environment)
    assert done.returncode == 0, done.stderr
    (folder,) = (run / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    name = (run / "wandb" / "id.txt").read_text()
    assert folder.name.endswith(name) and file.stat().st_size > 0
    assert _history(file) == expected(run)


def _history(file: Path) -> dict[tuple[str, int], np.float32]:
    """Return {(name, step): value} of W&B's own file: seven bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    found: dict[tuple[str, int], np.float32] = {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header at the end of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # whole, or the last part
            continue
        whole, record = Record.FromString(record), b""
        values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in whole.history.item}
        found |= {(k, values["_step"]): np.float32(v) for k, v in values.items() if not k.startswith("_")}
    return found


def test_a_garbage_collected_run_closes_its_trackers(random_gpt2, rows_file, tmp_path, monkeypatch):
    """Loops do not report failure: the run is closed as unfinished when nothing refers to it any more."""
    closed: list[bool] = []

    class Recorder:
        def log(self, record: Any) -> None:
            if record["step"] == 3:
                raise OSError(28, "No space left on device")

        def rewind(self, step: int) -> None: ...

        def close(self, finished: bool) -> None:
            closed.append(finished)

    monkeypatch.setattr(trackers, "make", lambda *_: [Recorder()])

    def fail() -> str:
        chosen = methods.load_recipe("01_sft", settings(random_gpt2, rows_file, tmp_path / "run"))
        try:
            methods.run(chosen)
        except UserError as error:
            return str(error)
        return ""

    assert "No space left" in fail()
    assert closed == [False]
    chosen = methods.load_recipe("01_sft", settings(random_gpt2, rows_file, tmp_path / "other"))
    _, run = setup.open_run(chosen, resume=False)
    run.close()
    assert closed == [False, True]
