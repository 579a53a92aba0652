"""Every method computes what it computed when golden.json was written, bit for bit (tests/golden.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_posttrain import engines

GOLDEN = Path(__file__).with_name("golden.py")


@pytest.mark.exhaustive
@pytest.mark.skipif(len(engines.available()) < 2, reason="the list is of both engines")
def test_losses_and_weights_are_those_of_the_list():
    """In a process of its own, with all the machine's threads: how sums are cut depends on their number."""
    sys.path.insert(0, str(GOLDEN.parent))
    try:
        import golden
    finally:
        sys.path.pop(0)
    if json.loads(golden.LIST.read_text())["environment"] != golden.environment():
        pytest.skip("the list was written on another processor or with other libraries")
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    every = {key: value for key, value in os.environ.items() if key not in threads}
    done = subprocess.run(
        [sys.executable, str(GOLDEN)], capture_output=True, text=True, timeout=3000, env=every
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
