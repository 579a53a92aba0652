"""Memory of this machine and of this process."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

from mlx_posttrain.engines import heap


def memory() -> tuple[int, int]:
    """Total and available memory in bytes, within the container's limit if there is one.

    Available is 0 where it is not known.
    """
    if sys.platform == "darwin":
        total = int(command_output("sysctl", "-n", "hw.memsize") or 0)
        pages: dict[str, int] = {}
        for line in command_output("vm_stat").splitlines():
            name, _, count = line.partition(":")
            if count.strip(" .").isdigit():
                pages[name] = int(count.strip(" ."))
        free = sum(pages.get(f"Pages {kind}", 0) for kind in ("free", "inactive", "speculative", "purgeable"))
        return total, free * os.sysconf("SC_PAGE_SIZE")
    info = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        info[name] = int(rest.split()[0]) * 1024
    total, available = info["MemTotal"], info.get("MemAvailable", 0)
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit and limit < total:
        total, available = limit, min(available, max(0, limit - (used or 0)))
    return total, available


def process_peak() -> int:
    """The most memory that this process has held, in bytes; on Linux since ``forget_process_peak``."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    # On Linux getrusage has two faults: it begins with the parent's memory, and it cannot be reset.
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def forget_process_peak() -> None:
    """Reset the peak of ``process_peak`` to the present, where the system allows it."""
    heap.release()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def command_output(*words: str) -> str:
    """What a command prints, stripped; '' where it is missing or takes longer than 5 s."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
