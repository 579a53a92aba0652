"""What befalls a run from outside: damaged checkpoints, a full disk, other data under a resumed run, settings
that its rows cannot meet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, runs
from mlx_posttrain.errors import UserError
from mlx_posttrain.runs.checkpoints import Damaged, read_state
from tests.helpers import cli, command, read_jsonl, records, refused, resume_run, run_recipe, write_jsonl

ENGINES = engines.available()


def settings(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model={model}",
        f"data.source={rows}",
        "data.holdout=6",
        f"output={output}",
        f"engine={ENGINES[0]}",
        "train.steps=6",
        "train.eval_every=2",
        "train.save_every=2",
        "train.keep=3",
        "train.lr=1e-3",
        "train.batch_size=4",
        "sample.count=1",
        "sample.max_tokens=2",
        *more,
    ]


def train(*overrides: str) -> dict:
    return run_recipe("01_sft", *overrides)


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(random_gpt2, rows_file, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(*settings(random_gpt2, rows_file, folder))
    return folder


@pytest.fixture
def unfinished(whole, tmp_path) -> Path:
    """The same run as a kill just before its end would leave it."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


# damaged checkpoints


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def junk(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


DAMAGE = {
    "truncated optimizer": lambda c: half(c / "optimizer.safetensors"),
    "junk for weights": lambda c: junk(c / "weights" / "model.safetensors"),
    "no weights": lambda c: (c / "weights" / "model.safetensors").unlink(),
    "empty tokenizer": lambda c: (c / "weights" / "tokenizer.json").write_bytes(b""),
    "no config": lambda c: (c / "weights" / "config.json").unlink(),
    "empty random state": lambda c: (c / "random.npz").write_bytes(b""),
    "junk for the random state": lambda c: junk(c / "random.npz"),
    "junk for the state": lambda c: junk(c / "state.json"),
    "a list for the state": lambda c: (c / "state.json").write_text("[]"),
    "a state without a step": lambda c: (c / "state.json").write_text("{}"),
    "no state": lambda c: (c / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_gone_past(damage, whole, unfinished, capfd):
    DAMAGE[damage](unfinished / "checkpoints" / "step-000006")
    resume_run(unfinished)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "is damaged" in line]
    assert "step-000006 is damaged" in line and line.endswith("resuming from step-000004")
    assert records(unfinished) == records(whole) and weights(unfinished) == weights(whole)
    names = {p.name for p in (unfinished / "checkpoints").iterdir()}
    assert {"step-000004", "step-000006", "damaged-step-000006"} <= names
    if "random" in damage:
        assert "random.npz" in line


def test_without_a_sound_checkpoint_it_does_not_go_on(whole, unfinished):
    """Not even from step 0, which would throw away what was trained; that is for its owner to say."""
    log = (unfinished / "metrics.jsonl").read_bytes()
    for checkpoint in (unfinished / "checkpoints").glob("step-*"):
        half(checkpoint / "optimizer.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no sound checkpoint \(step-000006: .*from step 0"):
            resume_run(unfinished)
    assert len(list((unfinished / "checkpoints").glob("step-*"))) == 3
    assert (unfinished / "metrics.jsonl").read_bytes() == log
    shutil.rmtree(unfinished / "checkpoints")
    resume_run(unfinished)
    assert records(unfinished) == records(whole) and weights(unfinished) == weights(whole)


@pytest.mark.parametrize("name", ["weights/model.safetensors", "optimizer.safetensors", "state.json"])
def test_one_changed_bit_is_damage(name, whole, unfinished, capfd):
    """The size is as before, and the file opens."""
    file = unfinished / "checkpoints" / "step-000006" / name
    data = bytearray(file.read_bytes())
    if name == "state.json":
        at = data.index(b'"best_loss": ') + len('"best_loss": ') + 3
        data[at] = ord("7") if data[at] != ord("7") else ord("3")
    else:
        data[-5] ^= 1
    file.write_bytes(data)
    resume_run(unfinished)
    said = capfd.readouterr().err
    assert f"{name} is not what was written" in said and "resuming from step-000004" in said
    assert records(unfinished) == records(whole) and weights(unfinished) == weights(whole)


def test_a_changed_bit_in_the_best_weights_is_damage(whole, unfinished, capfd):
    state = json.loads((unfinished / "checkpoints" / "step-000006" / "state.json").read_text())
    file = unfinished / "checkpoints" / state["best"] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    resume_run(unfinished)
    assert f"{state['best']}/model.safetensors is not what was written" in capfd.readouterr().err
    assert weights(unfinished) == weights(whole)


def test_a_checkpoint_of_an_earlier_release_resumes(whole, unfinished):
    """It has the sizes of its files and no hashes."""
    for file in (unfinished / "checkpoints").glob("step-*/state.json"):
        state = json.loads(file.read_text())
        files = {name: size for name, (size, _) in state["files"].items()}
        old = {k: v for k, v in state.items() if k not in ("sha256", "recipe")}
        file.write_text(json.dumps(old | {"files": files}))
    resume_run(unfinished)
    assert records(unfinished) == records(whole) and weights(unfinished) == weights(whole)


# a recipe that is not that of before


def edit(folder: Path, **changes: tuple[str, str]) -> None:
    text = (folder / "recipe.yaml").read_text()
    for key, (old, new) in changes.items():
        assert f" {key}: {old}\n" in text
        text = text.replace(f" {key}: {old}\n", f" {key}: {new}\n")
    (folder / "recipe.yaml").write_text(text)


def test_an_edited_recipe_is_refused_or_noted(whole, unfinished, capfd):
    shutil.rmtree(unfinished / "checkpoints" / "step-000006")
    edit(unfinished, lr=("0.001", "0.002"), max_tokens=("2", "3"))
    log = (unfinished / "metrics.jsonl").read_bytes()
    listed = "sample.max_tokens: 2 -> 3"
    said = refused(capfd, "run", "--resume", str(unfinished))
    assert "recipe.yaml was edited after step 4 (train.lr: 0.001 -> 0.002, " in said and listed in said
    assert (unfinished / "metrics.jsonl").read_bytes() == log and "--accept-edits" in said
    assert cli("run", "--resume", str(unfinished), "--accept-edits") == 0
    assert listed in capfd.readouterr().err
    _, recipe = runs.reopen(unfinished)
    assert recipe["changes"] == [{"step": 4, "train.lr": [0.001, 0.002], "sample.max_tokens": [2, 3]}]
    assert recipe["train"]["lr"] == 0.002 and "changes" in (unfinished / "card.md").read_text()
    rates, before = ({r["step"]: r["lr"] for r in records(run) if "lr" in r} for run in (unfinished, whole))
    assert [rates[step] / before[step] for step in (4, 5)] == pytest.approx([1, 2])
    shutil.rmtree(unfinished / "final")
    resume_run(unfinished)  # step 6 was saved by the recipe as it is


def test_what_trains_nothing_may_be_edited(whole, unfinished, tmp_path):
    edited = (unfinished / "recipe.yaml").read_text().replace("description:", "description: mine #", 1)
    (unfinished / "recipe.yaml").write_text(edited)
    unfinished.rename(tmp_path / "moved")
    resume_run(tmp_path / "moved")
    assert weights(tmp_path / "moved") == weights(whole)


def test_an_edit_before_the_first_checkpoint_is_no_mixture(unfinished):
    shutil.rmtree(unfinished / "checkpoints")
    edit(unfinished, lr=("0.001", "0.002"))
    resume_run(unfinished)
    assert "changes" not in runs.reopen(unfinished)[1]


def test_lost_best_weights_count_as_damage(whole, unfinished, capfd):
    """They are what final/ would be made of, so that is noticed before training and not after it."""
    best = json.loads((unfinished / "checkpoints" / "step-000006" / "state.json").read_text())["best"]
    assert best == "best-000006"
    shutil.rmtree(unfinished / "checkpoints" / best)
    resume_run(unfinished)
    assert "best-000006/config.json is missing" in capfd.readouterr().err
    assert weights(unfinished) == weights(whole)


def test_the_first_evaluation_is_not_written_twice(whole, unfinished):
    """Killed after it and before the first checkpoint."""
    shutil.rmtree(unfinished / "checkpoints")
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 2, "lo')
    resume_run(unfinished)
    assert records(unfinished) == records(whole)
    assert [r["step"] for r in records(unfinished) if "eval/loss" in r] == [0, 2, 4, 6]
    samples = [row["step"] for row in read_jsonl(unfinished / "samples.jsonl")]
    assert samples == [0, 2, 4, 6]


def test_each_checkpoint_that_is_kept_keeps_its_best(random_gpt2, tmp_path):
    run = runs.Run(tmp_path / "run")

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("weights")

    def names() -> list[str]:
        return sorted(p.name for p in run.checkpoints.iterdir())

    for step in (2, 4):
        run.save_checkpoint(step, write, {"best": run.save_best(step, write)}, {"x": np.zeros(1)}, keep=2)
    assert names() == ["best-000002", "best-000004", "step-000002", "step-000004"]
    run.save_checkpoint(6, write, {"best": "best-000004"}, {"x": np.zeros(1)}, keep=2)
    assert names() == ["best-000004", "step-000004", "step-000006"]
    (run.checkpoints / ".step-000008.tmp").mkdir()  # what a kill in the middle of writing leaves
    newest = run.newest_checkpoint()
    assert newest is not None and newest.folder.name == "step-000006" and newest.state["step"] == 6
    assert ".step-000008.tmp" not in names()


def test_steps_are_ordered_as_numbers(tmp_path):
    run = runs.Run(tmp_path / "run")
    for step in (999_999, 1_000_000):
        run.save_checkpoint(step, lambda folder: None, {}, {}, keep=2)
    assert [p.name for p in run.list_checkpoints()] == ["step-999999", "step-1000000"]


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """A rename that reaches the disk before the data leaves an empty checkpoint after a power cut."""
    events: list[str] = []
    paths: dict[int, str] = {}
    opened, synced, renamed = os.open, os.fsync, os.replace

    def remember(path, flags, *rest, **more):
        handle = opened(path, flags, *rest, **more)
        paths[handle] = str(path)
        return handle

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(Path(paths[handle]).name), synced(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"rename {Path(b).name}"), renamed(a, b)))

    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "deep").write_text("x")
        (folder / "top").write_text("x")

    runs.replace_folder(tmp_path / "step-1", fill)
    at = events.index("rename step-1")
    assert sorted(events[:at]) == [".step-1.tmp", "deep", "inner", "top"]
    assert events[at + 1 :] == [tmp_path.name]


# a full disk


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint(engine, random_gpt2, rows_file, tmp_path):
    """A limit on the size of a file that the weights meet and the optimizer's moments do not, in a real
    process.
    """
    whole = tmp_path / "whole"
    train(*settings(random_gpt2, rows_file, whole, f"engine={engine}"))
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    size = (run / "checkpoints" / "step-000004" / "weights" / "model.safetensors").stat().st_size
    assert (run / "checkpoints" / "step-000004" / "optimizer.safetensors").stat().st_size > 1.5 * size
    before = {p: p.read_bytes() for p in (run / "checkpoints" / "step-000004").rglob("*") if p.is_file()}
    again = command("run", "--resume", run)
    limited = ["bash", "-c", f'ulimit -f {size * 5 // 4 // 1024}; exec "$@"', "-", *again]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        "step-000006 cannot be written" in done.stderr.splitlines()[-1]
        and "--resume" in done.stderr.splitlines()[-1]
    )
    assert {p: p.read_bytes() for p in before} == before
    assert not list((run / "checkpoints").glob(".*")), "half a checkpoint is left"
    done = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert records(run) == records(whole) and weights(run) == weights(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    run = runs.Run(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        UserError,
        match=r"metrics.jsonl cannot be written \(No space left on device; "
        r".*--resume",
    ):
        run.log({"step": 1})


def test_a_folder_that_is_gone_is_no_lack_of_room(tmp_path):
    """As a reward function leaves it that deletes the run or changes the working directory."""
    with pytest.raises(UserError, match=r"gone/metrics.jsonl cannot .*: .*/gone is gone: .* reward function"):
        runs.Run(tmp_path / "gone").log({"step": 1})
    run = runs.Run(tmp_path)
    run.checkpoints.write_text("")
    with pytest.raises(UserError, match=r"best-000001 cannot .*: .*/checkpoints is a file: move it away$"):
        run.save_best(1, lambda folder: None)


def test_a_pipe_in_place_of_a_state_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(Damaged, match=r"state\.json cannot be read"):
        read_state(tmp_path)


# data that are not those of before


def test_other_training_rows_are_refused(random_gpt2, rows_file, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = rows_file.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines))
    run = tmp_path / "run"
    train(
        *settings(
            random_gpt2,
            rows,
            run,
            "train.epochs=1",
            "train.steps=null",
            "train.eval_every=3",
            "train.save_every=3",
        )
    )
    shutil.rmtree(run / "final")
    log = (run / "metrics.jsonl").read_bytes()
    for changed, words in (
        ([*lines, lines[0]], r"training rows .* \(34 rows then, 35 now\)"),
        (
            [line.replace("Repeat", "Say") for line in lines],
            r"training rows .* \(34 rows as before, with "
            r"other content\)",
        ),
    ):
        rows.write_text("".join(changed))
        with pytest.raises(UserError, match=words):
            resume_run(run)
        assert (run / "metrics.jsonl").read_bytes() == log and not list(
            (run / "checkpoints").glob("damaged*")
        )
    rows.write_text("".join(lines))
    resume_run(run)


def test_other_held_out_rows_are_refused(random_gpt2, tmp_path):
    for split in ("train", "test"):
        rows = ({"instruction": f"{split} {i}", "output": "yes"} for i in range(8))
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    run = tmp_path / "run"
    train(*settings(random_gpt2, tmp_path, run, "data.eval_split=test", "train.steps=2"))
    shutil.rmtree(run / "final")
    (tmp_path / "test.jsonl").write_text((tmp_path / "test.jsonl").read_text().replace("yes", "no", 1))
    with pytest.raises(
        UserError,
        match=r"the held-out rows are not those .* \(8 rows as before, with other "
        r"content\)",
    ):
        resume_run(run)


# weights that blow up


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_that_is_not_finite_ends_the_run(engine, random_gpt2, rows_file, tmp_path):
    run = tmp_path / "run"
    more = ["train.steps=1", "train.lr=1e30", "train.warmup=0", "train.select=last", f"engine={engine}"]
    with pytest.raises(
        UserError,
        match=r"step 1: the held-out loss is nan: these weights are not saved; no "
        r"checkpoint .* lower train.lr",
    ):
        train(*settings(random_gpt2, rows_file, run, *more))
    assert not (run / "final").exists() and not list(run.glob("checkpoints/*-000001"))
    assert all(np.isfinite(r.get("eval/loss", 0.0)) for r in records(run))


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_blew_up_are_no_checkpoint(engine, random_gpt2, rows_file, tmp_path):
    """Finite, but so large that their loss is not, which without an evaluation only the next step would find
    out.
    """
    run = tmp_path / "run"
    more = [
        "train.steps=3",
        "train.lr=1e30",
        "train.warmup=0",
        "train.save_every=1",
        "train.eval_every=3",
        f"engine={engine}",
    ]
    with pytest.raises(
        UserError,
        match=r"step 1: the loss with the weights that it made is nan: .* no "
        r"checkpoint had been written",
    ):
        train(*settings(random_gpt2, rows_file, run, *more))
    assert not list(run.glob("checkpoints/step-*")) and not (run / "final").exists()


def test_a_model_that_is_broken_from_the_start(random_gpt2, rows_file, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "model"
    shutil.copytree(random_gpt2, broken)
    tensors = load_file(broken / "model.safetensors")
    wte = next(name for name in tensors if name.endswith("wte.weight"))
    tensors[wte][:] = 3e38
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match="before the first step the held-out loss is nan: the model that the run starts from is broken",
    ):
        train(*settings(broken, rows_file, tmp_path / "run"))
    assert not list(tmp_path.glob("run/checkpoints/*"))


# settings


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["train.warmup=6"], r"train.warmup=6 steps, and the run has 6"),
        (
            ["train.warmup=9", "train.steps=null", "train.epochs=1"],
            r"train.warmup=9 steps, and the run has "
            r"9",
        ),
        (["data.holdout=0", "train.early_stop=2"], r"train.early_stop needs held-out rows"),
        (
            ["train.token_budget=32"],
            r"train.token_budget=32 is too small: the longest row takes 64 padded tokens by itself; raise "
            r"it to 64",
        ),
        (["data.holdout=1.5"], r"data.*: holdout is a share below 1 or a whole number of rows, not 1.5"),
        (["data.families=[]"], r"data.*: families is empty"),
        (["adapter.targets=[]"], r"adapter.*: targets is empty"),
        (["adapter.targets=c_attn"], r"targets=c_attn: write a list, as \[c_attn\], or one of the words"),
    ],
)
def test_settings_that_the_rows_cannot_meet(more, words, random_gpt2, rows_file, tmp_path):
    with pytest.raises(UserError, match=words):
        train(*settings(random_gpt2, rows_file, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_settings_that_they_just_meet(random_gpt2, rows_file, tmp_path, capfd):
    train(
        *settings(
            random_gpt2,
            rows_file,
            tmp_path / "run",
            "train.warmup=5",
            "train.token_budget=64",
            "data.holdout=0",
        )
    )
    assert "final/ will hold those of the last step" in capfd.readouterr().err
