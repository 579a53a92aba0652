"""What loading takes of memory beside its result, and that it loads what a load all at once does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core")

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_posttrain import engines  # noqa: E402
from mlx_posttrain.errors import UserError  # noqa: E402
from tests.random_models import QWEN_HALF, SMALL, random_model  # noqa: E402

#: Small, and wide enough for a tensor to be little beside all of them.
SIZES = {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 4096}
MEASURE = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_posttrain import engines
from mlx_posttrain.engines.process import forget_process_peak, process_peak

engine, dtype = engines.get("mlx"), sys.argv[3]
engine.load(Path(sys.argv[2]), quantize=4, group_size=32)  # what is imported late is there now
resident = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0] * 1024
forget_process_peak()
mx.reset_peak_memory()
active = mx.get_active_memory()
model = engine.load(Path(sys.argv[1]), dtype=dtype, quantize=4)
arrays, process = mx.get_peak_memory() - active, process_peak() - resident
print(json.dumps({
    "result": sum(v.nbytes for _, v in tree_flatten(model.net.parameters())),
    "arrays": arrays,
    "process": process,
}))
"""


def file_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_quantised_load_holds_little_beside_its_result(stored: str, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "qwen2", SIZES, stored)
    engine = engines.get("mlx")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = engine.load(folder, quantize=4)
    peak = mx.get_peak_memory() - before
    result = sum(value.nbytes for _, value in tree_flatten(model.net.parameters()))
    assert peak < 1.2 * max(file_bytes(folder), result), (peak, file_bytes(folder), result)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_so_does_the_process_with_half_a_billion_parameters(
    dtype: str, random_gpt2: Path, tmp_path: Path
) -> None:
    folder = random_model(tmp_path / "qwen2", QWEN_HALF, "bfloat16")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(random_gpt2), dtype], capture_output=True, text=True
    )
    most = 1.2 * file_bytes(folder)
    (folder / "model.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(found["arrays"], found["process"]) < most, (found, most)


@pytest.mark.parametrize("quantize", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_a_load_all_at_once(
    quantize: int | None, dtype: str, tmp_path: Path
) -> None:
    from mlx_lm.utils import load_model

    folder = random_model(tmp_path / "qwen2", SMALL, "bfloat16")
    net, _ = load_model(folder)
    net.set_dtype(getattr(mx, dtype))
    mx.eval(net.parameters())
    if quantize:
        nn.quantize(net, 64, quantize, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    expected = dict(tree_flatten(net.parameters()))
    found = dict(
        tree_flatten(engines.get("mlx").load(folder, dtype=dtype, quantize=quantize).net.parameters())
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert mx.array_equal(found[name], value), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_lie_in_rows_however_the_file_holds_them(dtype: str, random_gpt2: Path) -> None:
    model = engines.get("mlx").load(random_gpt2, dtype=dtype)
    for loaded in ("first", "again"):
        matrices = [(name, w) for name, w in tree_flatten(model.net.parameters()) if w.ndim == 2]
        assert len(matrices) > 8
        for name, weight in matrices:
            assert memoryview(weight.view(mx.uint16 if dtype == "bfloat16" else mx.uint32)).c_contiguous, (
                loaded,
                name,
            )
        model.load_trained(random_gpt2)


def test_a_file_that_ends_early_is_said(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "qwen2", SMALL, "bfloat16")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="qwen2"):
        engines.get("mlx").load(folder)
