"""`mlx-posttrain doctor`: what this machine has for training, and what to fix.

Every check is one small function that returns `Check`s and may raise anything: a failing check becomes a line
of the report, never a traceback. Nothing leaves the machine, and of the hub token only its presence is
reported.
"""

from __future__ import annotations

import importlib.metadata
import json as _json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_posttrain.engines import probe
from mlx_posttrain.engines.precision import model_dtype
from mlx_posttrain.engines.process import command_output, memory

OK, WARN, FAIL = "ok", "warn", "fail"
_GIB = 1024**3
#: Tokens on which the engines are compared, and how far their logits may be apart: rounding gives 1e-5.
TOKENS, LOGITS_APART = 32, 1e-3


@dataclass(frozen=True)
class Check:
    """One line of the report; ``advice`` states what to do, or is empty."""

    name: str
    value: str
    status: str = OK
    advice: str = ""


def doctor(json: bool = False, model: str | None = None) -> int:
    """Print the report, as a table or as JSON, and return the exit code.

    It is 1 if something must be fixed before training works, else 0. model: one whose logits the two engines
    compute for comparison.
    """
    checks = collect()
    if model is not None:
        checks += compare_engines(model)
    if json:
        print(_json.dumps([asdict(check) for check in checks], indent=2))
    else:
        render(checks)
    return int(any(check.status == FAIL for check in checks))


def collect() -> list[Check]:
    """Run every check, in the order of the report.

    Takes a few seconds, mostly to import MLX and PyTorch.
    """
    machine = (_system, _python, _memory, _disk, _thermal)
    libraries = (_packages, _devices, _dtypes, _tf32, _blas, _compiler, _torch, _wired, _hub)
    return [found for check in (*machine, *libraries) for found in _safely(check)]


def compare_engines(model: str) -> list[Check]:
    """Compare the logits of a model or run on both engines, in float32 on 32 random tokens.

    Fails where the largest difference exceeds ``LOGITS_APART`` of the largest logit, or an engine refuses the
    model.
    """
    import numpy as np

    from mlx_posttrain import engines
    from mlx_posttrain.errors import UserError
    from mlx_posttrain.models.open import open_model

    found = {}
    for engine in engines.available():
        try:
            opened, _, _ = open_model(model, engine, "float32", scores=None)
        except UserError as error:
            return [Check("model", f"{model} on {engine}", FAIL, str(error))]
        length = min(TOKENS, opened.context or TOKENS)
        ids = np.random.default_rng(0).integers(0, opened.config["vocab_size"], (1, TOKENS))
        found[engine] = opened.full_logits(ids[:, :length])
        del opened  # the next one takes its memory
    if len(found) < 2:
        return [
            Check("model", f"{model}: {', '.join(found)} alone is installed, so nothing was compared", WARN)
        ]
    shared = min(logits.shape[1] for logits in found.values())
    ours, theirs = (logits[:, :shared] for logits in found.values())
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    value = f"{model}: logits on {' and '.join(found)} differ by {apart:.1e} of the largest"
    if not apart <= LOGITS_APART:  # nan is no agreement
        return [Check("model", value, FAIL, "mlx computes another model: use engine=torch")]
    return [Check("model", value)]


def render(checks: list[Check]) -> None:
    """Print the checks as a table, followed by what to fix, most urgent first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {OK: Text("ok", "green"), WARN: Text("warn", "yellow"), FAIL: Text("FAIL", "bold red")}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(marks[check.status], check.name, Text(check.value))
    console = Console()
    console.print(table)
    todo = [check for status in (FAIL, WARN) for check in checks if check.status == status and check.advice]
    console.print()
    if not todo:
        console.print("Nothing to fix.")
    for check in todo:
        console.print(Text.assemble(marks[check.status], f" {check.name}: {check.advice}"), soft_wrap=True)


# Checks


def _system() -> list[Check]:
    if sys.platform == "darwin":
        release = platform.mac_ver()[0]
        chip = command_output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
        checks = [Check("system", f"macOS {release}, {platform.machine()}")]
        if _apple_silicon() and int(release.partition(".")[0] or 0) < 14:
            checks = [Check("system", f"macOS {release}", FAIL, "MLX needs macOS 14 or newer: update macOS")]
    else:
        names = (
            platform.freedesktop_os_release()
            if hasattr(platform, "freedesktop_os_release") and sys.platform == "linux"
            else {}
        )
        chip = _cpu_model() or platform.processor() or platform.machine()
        checks = [
            Check(
                "system",
                f"{names.get('PRETTY_NAME', platform.system())}, {platform.machine()}, "
                f"kernel {platform.release()}",
            )
        ]
        if sys.platform != "linux":
            checks = [
                Check(
                    "system",
                    platform.platform(),
                    WARN,
                    "only macOS and Linux are supported (on Windows: WSL 2)",
                )
            ]
        elif platform.libc_ver()[0] != "glibc":
            checks.append(
                Check(
                    "C library",
                    "not glibc",
                    WARN,
                    "MLX and PyTorch publish wheels for glibc only: use another distribution",
                )
            )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [*checks, Check("chip", f"{chip}, {usable} cores")]


def _python() -> list[Check]:
    value = f"{platform.python_version()} {platform.machine()} ({sys.executable})"
    if _translated():
        advice = (
            "this Python runs under Rosetta and cannot use MLX: install an arm64 Python, remove .venv "
            "and run make again"
        )
        return [Check("Python", value + ", under Rosetta", FAIL, advice)]
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return [Check("Python", value, WARN, "tested with Python 3.10 to 3.13")]
    if sys.platform == "darwin" and platform.machine() == "x86_64" and sys.version_info >= (3, 13):
        return [
            Check("Python", value, FAIL, "PyTorch's last release for Intel Macs needs Python 3.10 to 3.12")
        ]
    return [Check("Python", value)]


def _memory() -> list[Check]:
    total, available = memory()
    value = f"{total / _GIB:.1f} GiB" + (f", {available / _GIB:.1f} GiB available" if available else "")
    if available and available < 2 * _GIB:
        return [
            Check(
                "memory",
                value,
                WARN,
                "close other programs: full fine-tuning of GPT-2 124M takes about 3 GiB",
            )
        ]
    return [Check("memory", value)]


def _disk() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    value = f"{free / _GIB:.1f} GiB free here"
    if free < 2 * _GIB:
        advice = (
            "a GPT-2 124M checkpoint with its optimizer takes 1.5 GiB: make room or set output=DIR elsewhere"
        )
        return [Check("disk", value, WARN, advice)]
    return [Check("disk", value)]


def _thermal() -> list[Check]:
    if sys.platform != "darwin":
        return []
    said = command_output("pmset", "-g", "therm")
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", said)
    level = re.search(r"(?i)warning level\s*[=:]\s*([1-9]\d*)", said)
    if level is None and (limit is None or int(limit[1]) >= 100):
        return [Check("temperature", "no limit recorded" if said else "not known")]
    value = f"warning level {level[1]}" if level else f"clocks limited to {limit and limit[1]} %"
    return [Check("temperature", value, WARN, "the machine is slowed down: let it cool before timing")]


def _packages() -> list[Check]:
    intel_mac = sys.platform == "darwin" and platform.machine() == "x86_64"
    needed = {
        "mlx": not intel_mac,
        "mlx-lm": not intel_mac,
        "torch": intel_mac,
        "peft": intel_mac,
        "transformers": True,
        "numpy": True,
    }
    checks = [Check("mlx-posttrain", _version("mlx-posttrain") or "not installed")]
    for name, required in needed.items():
        version = _version(name)
        if version:
            checks.append(Check(name, version))
        elif required:
            checks.append(
                Check(name, "missing", FAIL, "pip install -e . in the project's folder (or make demo)")
            )
        elif name in ("torch", "peft") and not intel_mac:
            checks.append(Check(name, 'not installed (optional: pip install -e ".[torch]")'))
        else:
            checks.append(Check(name, "not for this machine"))
    return checks


def _devices() -> list[Check]:
    if not _version("mlx"):
        return []
    devices = probe.mlx_devices()
    if devices.gpu is None:
        advice = (
            "Metal is not available to this process: run it in a session of the logged-in user"
            if _apple_silicon()
            else ""
        )
        return [Check("MLX devices", "cpu", WARN if advice else OK, advice)]
    budget = int(devices.gpu.get("max_recommended_working_set_size", 0)) / _GIB
    limit = f", working set {budget:.1f} GiB" if budget else ""
    value = f"gpu ({devices.gpu.get('device_name', 'unknown')}{limit}), cpu; default {devices.default}"
    checks = [Check("MLX devices", value)]
    if devices.default == "gpu":
        rate = probe.measure_gflops(size=4096)
        checks.append(Check("GPU", f"{rate:.0f} GFLOP/s (float32 matmul)"))
    return checks


def _dtypes() -> list[Check]:
    if not _version("mlx"):
        return []
    gpu, files = probe.mlx_devices().default == "gpu", "as its files have it"
    trained, frozen = (model_dtype(None, gpu=gpu, trained=t, stored=lambda: files) for t in (True, False))
    value = f"on MLX trained weights {trained}, a frozen model {frozen}; --dtype changes it"
    return [Check("number format", value)]


def _tf32() -> list[Check]:
    if not _apple_silicon() or not _version("mlx"):
        return []
    if os.environ.get("MLX_ENABLE_TF32", "1") == "0":
        return [Check("TF32", "off: float32 products are in full float32")]
    value = "on: from M5 on, float32 products keep 10 bits of mantissa"
    return [Check("TF32", f"{value}; MLX_ENABLE_TF32=0 in the environment switches it off")]


def _torch() -> list[Check]:
    if not _version("torch"):
        return []
    rate = probe.measure_gflops("torch")
    return [Check("PyTorch threads", f"{probe.torch_threads()}, {rate:.0f} GFLOP/s (float32 matmul)")]


def _blas() -> list[Check]:
    if not _version("mlx"):
        return []
    from mlx_posttrain.engines.mlx.cpu import blas

    info = blas.load(quiet=True)
    value = info.name or ("reference BLAS" if info.path else "unknown BLAS")
    if probe.mlx_devices().default == "cpu":
        value += f", {probe.measure_gflops():.0f} GFLOP/s (float32 matmul)"
    if sys.platform == "linux" and info.name is None:
        return [
            Check("MLX's BLAS", value, WARN, info.advice or f"{blas.ENV}=none is set: unset it for speed")
        ]
    return [Check("MLX's BLAS", value)]


def _compiler() -> list[Check]:
    if not _version("mlx"):
        return []
    from mlx_posttrain.engines.mlx.cpu.compile_check import compile_problem, fuses

    problem = compile_problem()
    if problem:
        return [Check("mx.compile", "does not work, steps run uncompiled", WARN, problem)]
    if not fuses():
        advice = "install g++ (Debian, Ubuntu: apt install g++), MLX uses it to fuse operations on the CPU"
        return [
            Check(
                "mx.compile",
                "no g++: operations run unfused, which is slower and needs more memory",
                WARN,
                advice,
            )
        ]
    return [Check("mx.compile", "works")]


def _wired() -> list[Check]:
    if sys.platform != "darwin" or not _apple_silicon():
        return []
    limit = int(command_output("sysctl", "-n", "iogpu.wired_limit_mb") or 0)
    if limit:
        advice = (
            "a raised limit can hang the machine when memory runs out: sudo sysctl "
            "iogpu.wired_limit_mb=0 restores the default"
        )
        return [Check("wired limit", f"{limit} MB", WARN, advice)]
    return [Check("wired limit", "system default; a run wires at most Metal's working set, for itself alone")]


def _hub() -> list[Check]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    size = (
        sum(f.stat().st_size for f in cache.rglob("*") if f.is_file() and not f.is_symlink())
        if cache.is_dir()
        else 0
    )
    parent = next(p for p in (cache, *cache.parents) if p.exists())
    writable = os.access(parent, os.W_OK)
    checks = [
        Check(
            "hub cache",
            f"{cache}, {size / _GIB:.2f} GiB" + ("" if writable else ", not writable"),
            OK if writable else WARN,
            "" if writable else "set HF_HOME to a folder you can write to",
        ),
        Check(
            "hub token", "present" if get_token() else "none (needed only for gated models and for --push)"
        ),
    ]
    if constants.HF_HUB_OFFLINE:
        checks.append(Check("hub access", "offline (HF_HUB_OFFLINE is set): only cached models and data"))
    return checks


# Helpers


def _safely(check: Callable[[], list[Check]]) -> list[Check]:
    try:
        return check()
    except Exception as error:  # a broken package is shown in the report instead of ending it
        name = check.__name__.strip("_")
        return [
            Check(
                name,
                "could not be checked",
                WARN,
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            )
        ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _apple_silicon() -> bool:
    """Return whether the machine is an Apple Silicon Mac, also for a Python under Rosetta."""
    return sys.platform == "darwin" and (platform.machine() == "arm64" or _translated())


def _translated() -> bool:
    """Return whether this Python runs under Rosetta."""
    return sys.platform == "darwin" and command_output("sysctl", "-n", "sysctl.proc_translated") == "1"


def _cpu_model() -> str:
    """Return the processor's name, or an empty string; ARM's cpuinfo has none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return ""
