"""What several test files share: the command line, run folders, small files, and arrays of each library."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import gpu_paths

#: Fields of metrics.jsonl that tell of clock and memory, and differ between two runs that are the same.
CLOCK = ("seconds", "seconds/rollout", "peak_gb", "active_gb", "cache_gb")


# files


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[Any]:
    """The values of a file with one JSON value a line."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


# rewards


def reward_scores(
    name: str, texts: list[str], args: dict[str, Any] | None = None, **columns: list[Any]
) -> list[float | None]:
    """What the recipe's entry ``{function: name, args: args}`` gives, None where it has no score."""
    from mlx_posttrain.rewards import functions

    bound = functions.bind(functions.load(name), args or {}, name)
    found = functions.call(bound, ["p"] * len(texts), texts, columns, name)
    return [None if np.isnan(one) else float(one) for one in found]


# the command line


def cli(*arguments: str) -> int:
    """Run the command line in this process; returns its exit code."""
    from mlx_posttrain.cli import main

    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line on standard error of a command that must end with exit code 2 and no traceback."""
    code = cli(*arguments)
    errors = capfd.readouterr().err
    assert code == 2 and "Traceback" not in errors, errors
    return errors.strip().splitlines()[-1]


def command(*arguments: object) -> list[str]:
    """The command line as a process of its own, which runs MLX as this session does."""
    start = [gpu_paths.__file__] if gpu_paths.chosen() else ["-m", "mlx_posttrain"]
    return [sys.executable, *start, *map(str, arguments)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until ``condition`` holds; fails if the process ends or the time is over before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.005)


@contextmanager
def mlx_lm_server(folder: Path) -> Iterator[str]:
    """The address of mlx-lm's own server with the model of ``folder``, a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens, server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


# runs


def run_recipe(name: str, *overrides: str) -> dict[str, Any]:
    """Run a recipe in this process; returns its figures."""
    from mlx_posttrain import methods

    return methods.run(methods.load_recipe(name, list(overrides)))


def resume_run(folder: Path) -> dict[str, Any]:
    """Continue an unfinished run in this process; returns its figures."""
    from mlx_posttrain import methods, runs

    _, raw = runs.reopen(folder)
    chosen = methods.parse_recipe(raw | {"output": str(folder)}, "recipe.yaml")
    return methods.run(chosen, resume=True)


def records(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl without clock and memory."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def final_weights(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a finished run's ``final/``: of the model, or of the adapter."""
    from safetensors.numpy import load_file

    (file,) = (folder / "final").glob("*.safetensors")
    return load_file(file)


def same_weights(ours: Path, theirs: Path) -> bool:
    """Whether two finished runs have the same tensors, bit for bit."""
    a, b = final_weights(ours), final_weights(theirs)
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def reward_model(folder: Path, target: Path, seed: int = 5) -> Path:
    """A reward model: a language model of width 64 with a random head, as a sequence classifier."""
    from mlx_posttrain import engines
    from mlx_posttrain.engines.base import initial_head

    model = engines.get(engines.available()[0]).load(folder)
    model.add_head(initial_head(64, seed))
    model.save_classifier(target, 0)
    return target


# losses in three libraries


def libraries() -> list[str]:
    """NumPy, and of MLX and torch those that are installed."""
    from mlx_posttrain import engines

    return ["numpy", *engines.available()]


def array(library: str, values: Any) -> Any:
    """Numbers as a library's array, in the widest floats that it has: float32 in MLX, else float64."""
    if library == "mlx":
        import mlx.core as mx

        return mx.array(np.asarray(values, np.float32))
    if library == "torch":
        import torch

        return torch.tensor(np.asarray(values, np.float64))
    return np.asarray(values, np.float64)


def indices(library: str, values: Any) -> Any:
    """Whole numbers as a library's array: int64 in torch and NumPy, int32 in MLX."""
    if library == "mlx":
        import mlx.core as mx

        return mx.array(np.asarray(values, np.int32))
    if library == "torch":
        import torch

        return torch.tensor(np.asarray(values, np.int64))
    return np.asarray(values, np.int64)


def numbers(x: Any) -> np.ndarray:
    """A library's array as NumPy's."""
    return x.detach().numpy() if hasattr(x, "detach") else np.array(x)


def gradient(library: str, function: Callable[[Any], Any], x: Any) -> np.ndarray:
    """d sum(function(x)) / dx, by central differences where the library has no gradients."""
    if library == "mlx":
        import mlx.core as mx

        return np.array(mx.grad(lambda v: function(v).sum())(array("mlx", x)))
    if library == "torch":
        v = array("torch", x).requires_grad_()
        function(v).sum().backward()
        return v.grad.numpy()
    x = np.asarray(x, np.float64)
    found = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        found[i] = (function(x + step).sum() - function(x - step).sum()) / 2e-6
    return found
