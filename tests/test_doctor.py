"""doctor, the BLAS that MLX uses, and the check of mx.compile.

Tests that change the state of a process run in their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from mlx_posttrain import doctor
from mlx_posttrain.engines import process

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX brings a fast BLAS elsewhere")


def python(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# doctor


def test_every_check_reports():
    checks = doctor.collect()
    names = [check.name for check in checks]
    for name in (
        "system",
        "chip",
        "Python",
        "memory",
        "disk",
        "transformers",
        "numpy",
        "hub cache",
        "hub token",
    ):
        assert name in names
    assert {check.status for check in checks} <= {doctor.OK, doctor.WARN, doctor.FAIL}
    assert not [check for check in checks if check.value == "could not be checked"]
    assert all(check.advice for check in checks if check.status == doctor.FAIL)


def test_json_parses_and_the_exit_code_tells_whether_something_must_be_fixed(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "collect", lambda: [doctor.Check("a", "1"), doctor.Check("b", "2", doctor.WARN, "do b")]
    )
    assert doctor.doctor(json=True) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["a", "b"]
    monkeypatch.setattr(doctor, "collect", lambda: [doctor.Check("c", "3", doctor.FAIL, "do c")])
    assert doctor.doctor() == 1
    assert "do c" in capsys.readouterr().out


def test_a_models_logits_are_compared(random_gpt2, capsys, monkeypatch):
    from mlx_posttrain import engines
    from mlx_posttrain.engines.torch.model import TorchModel

    if len(engines.available()) < 2:
        pytest.skip("needs both engines")
    monkeypatch.setattr(doctor, "collect", list)
    assert doctor.doctor(model=str(random_gpt2)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "logits on mlx and torch differ by" in said and "e-0" in said
    logits = TorchModel.full_logits
    monkeypatch.setattr(TorchModel, "full_logits", lambda self, ids: logits(self, ids) * 1.01)
    assert doctor.doctor(model=str(random_gpt2)) == 1
    assert "use engine=torch" in capsys.readouterr().out
    monkeypatch.setattr(engines, "available", lambda: ["mlx"])
    (check,) = doctor.compare_engines(str(random_gpt2))
    assert check.status == doctor.WARN and "nothing was compared" in check.value


def test_a_model_that_an_engine_refuses_is_a_line(tmp_path):
    (check,) = doctor.compare_engines(str(tmp_path))
    assert check.status == doctor.FAIL and "no config.json" in check.advice


def test_a_token_does_not_leak(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Sentinel0" * 4)
    checks = doctor.collect()
    assert doctor.Check("hub token", "present") in checks
    monkeypatch.setattr(doctor, "collect", lambda: checks)
    for as_json in (True, False):
        doctor.doctor(json=as_json)
        out = capsys.readouterr().out
        assert "hub token" in out
        assert "Sentinel" not in out


def test_missing_and_broken_packages_are_lines_of_the_report():
    out = python(
        """
        import importlib.metadata as metadata, json, sys
        real = metadata.version
        def version(name):
            if name in ("mlx", "mlx-lm", "peft"):
                raise metadata.PackageNotFoundError(name)
            return real(name)
        metadata.version = version
        sys.modules["huggingface_hub"] = None  # importing it raises
        sys.modules["torch"] = None
        from mlx_posttrain.doctor import doctor
        doctor(json=True)
        """
    )
    checks = {check["name"]: check for check in json.loads(out)}
    assert checks["hub"]["status"] == "warn"
    assert "huggingface_hub" in checks["hub"]["advice"]
    if sys.platform.startswith("linux"):
        assert checks["mlx"]["status"] == "fail"


def test_rosetta_is_recognised(monkeypatch):
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(
        doctor, "command_output", lambda *words: "1" if words[-1] == "sysctl.proc_translated" else ""
    )
    (check,) = doctor._python()
    assert check.status == doctor.FAIL
    assert "Rosetta" in check.value
    assert "arm64" in check.advice


@pytest.mark.parametrize(
    ("release", "status"), [("13.6", doctor.FAIL), ("14.0", doctor.OK), ("26.1", doctor.OK)]
)
def test_mlx_needs_macos_14(monkeypatch, release, status):
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(doctor.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(doctor.platform, "mac_ver", lambda: (release, ("", "", ""), "arm64"))
    monkeypatch.setattr(doctor, "command_output", lambda *words: "Apple M3" if "brand" in words[-1] else "")
    system, chip = doctor._system()
    assert system.status == status
    assert chip.value.startswith("Apple M3")


@pytest.mark.parametrize(("given", "state"), [(None, "on"), ("1", "on"), ("0", "off")])
def test_a_mac_is_told_of_tf32_and_its_working_set(monkeypatch, given, state):
    monkeypatch.setattr(doctor, "_apple_silicon", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda package: "1")
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if given is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", given)
    (tf32,) = doctor._tf32()
    assert tf32.value.startswith(f"{state}: ") and ("=0" in tf32.value) == (state == "on")
    facts = {"device_name": "Apple M3", "max_recommended_working_set_size": 12 * 2**30}
    monkeypatch.setattr(doctor.probe, "mlx_devices", lambda: doctor.probe.Devices(facts, "gpu"))
    monkeypatch.setattr(doctor.probe, "measure_gflops", lambda engine="mlx", size=1024: 3000.0)
    devices, rate = doctor._devices()
    assert rate.value == "3000 GFLOP/s (float32 matmul)"
    assert devices.value == "gpu (Apple M3, working set 12.0 GiB), cpu; default gpu"
    monkeypatch.setattr(doctor, "_apple_silicon", lambda: False)
    assert doctor._tf32() == []


@pytest.mark.parametrize(
    ("said", "value", "status"),
    [
        ("Note: No thermal warning level has been recorded\nNote: No performance warning level has been "
         "recorded\nCPU_Speed_Limit \t= 100", "no limit recorded", doctor.OK),
        ("CPU_Scheduler_Limit = 100\nCPU_Available_CPUs = 8\nCPU_Speed_Limit \t= 67",
         "clocks limited to 67 %", doctor.WARN),
        ("Thermal Warning Level = 2", "warning level 2", doctor.WARN),
        ("", "not known", doctor.OK),
    ],
)  # fmt: skip
def test_a_hot_mac_is_told(monkeypatch, said, value, status):
    monkeypatch.setattr(doctor, "command_output", lambda *words: said if words[0] == "pmset" else "")
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert doctor._thermal() == []
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    (check,) = doctor._thermal()
    assert (check.value, check.status) == (value, status) and bool(check.advice) == (status == doctor.WARN)


def test_a_gpus_rate_is_not_its_blas(monkeypatch):
    pytest.importorskip("mlx")
    monkeypatch.setattr(doctor.probe, "measure_gflops", lambda engine="mlx", size=1024: float(size))
    facts = {"device_name": "Apple M3"}
    for gpu, default in ((facts, "gpu"), (None, "cpu")):
        found = doctor.probe.Devices(gpu, default)
        monkeypatch.setattr(doctor.probe, "mlx_devices", lambda found=found: found)
        rates = {c.name: "GFLOP/s" in c.value for c in doctor._devices() + doctor._blas()}
        wanted = {"MLX devices": False, "GPU": True, "MLX's BLAS": False}
        assert rates == (wanted if gpu else {"MLX devices": False, "MLX's BLAS": True})


def test_chained_products_keep_their_size_and_the_rate_is_per_product(monkeypatch):
    """A clock on which each product takes a second: 2 n^3 in a second, however many are chained."""
    mx = pytest.importorskip("mlx.core")
    from mlx_posttrain.engines import probe

    clock, last = [0.0], []
    evaluate = mx.eval

    class Counted:
        def __init__(self, value):
            self.value = value

        def __matmul__(self, other):
            clock[0] += 1
            return Counted(self.value @ other.value)

    uniform = mx.random.uniform
    monkeypatch.setattr(mx.random, "uniform", lambda **sizes: Counted(uniform(**sizes)))
    monkeypatch.setattr(mx, "eval", lambda x: (evaluate(x.value), last.append(x.value)))
    monkeypatch.setattr(probe.time, "perf_counter", lambda: clock[0])
    assert probe.measure_gflops("mlx", 64, seconds=1000) == pytest.approx(2 * 64**3 / 1e9)
    assert 0.1 < float(mx.mean(last[-1])) * 64 < 10  # and not 1e18 or 0 after 64 of them


def test_memory_on_a_mac_is_read_from_its_own_tools(monkeypatch):
    vm_stat = (
        "Mach Virtual Memory Statistics:\nPages free:   1000.\nPages inactive:   500.\nPages active:  7.\n"
    )
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(
        process, "command_output", lambda *words: vm_stat if words[0] == "vm_stat" else str(16 * 1024**3)
    )
    assert process.memory() == (16 * 1024**3, 1500 * os.sysconf("SC_PAGE_SIZE"))


# BLAS

RATE = """
    from mlx_posttrain.engines.mlx.cpu import blas
    info = blas.load()
    from mlx_posttrain.engines.probe import measure_gflops
    print(max(measure_gflops(size=512) for _ in range(3)))
    print(info.name)
"""


@linux
def test_mlx_is_at_least_five_times_faster_with_the_blas_found():
    pytest.importorskip("mlx")
    if "mlx_cpu" not in python(
        "from mlx_posttrain.engines.mlx.cpu import blas; print(blas.load().path)", MLX_POSTTRAIN_BLAS="none"
    ):
        pytest.skip("this MLX was not built with the reference BLAS")
    # one thread, so that the load of other tests does not matter
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    slow, name = python(RATE, MLX_POSTTRAIN_BLAS="none", **one).split("\n")[:2]
    assert name == "None"
    fast, name = python(RATE, MLX_POSTTRAIN_BLAS="", **one).split("\n")[:2]
    assert name.startswith("OpenBLAS")
    assert "1 thread)" in name  # the variable is respected
    assert float(fast) >= 5 * float(slow)


@linux
@pytest.mark.parametrize("first", ["blas", "mlx"])
def test_results_are_right_and_the_order_of_imports_does_not_matter(first):
    pytest.importorskip("mlx")
    out = python(
        f"""
        if {first == "mlx"}:
            import mlx.core
        from mlx_posttrain.engines.mlx.cpu import blas
        info = blas.load()
        assert blas.load() is info
        import mlx.core as mx, numpy as np
        mx.set_default_device(mx.cpu)
        rng = np.random.default_rng(0)
        for m, n, k in ((1, 5, 7), (33, 128, 65), (300, 200, 100)):
            a, b = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(k, n)).astype(np.float32)
            for got in (mx.array(a) @ mx.array(b), mx.array(a.T.copy()).T @ mx.array(b.T.copy()).T):
                np.testing.assert_allclose(np.array(got), a.astype(np.float64) @ b, rtol=1e-4, atol=1e-4)
        print(info.name)
        """,
        MLX_POSTTRAIN_BLAS="",
    )
    assert out.startswith("OpenBLAS")


@linux
def test_only_mlx_gets_it():
    """A global OpenBLAS would give PyTorch wrong complex dot products and take its matmul from MKL.

    The dot products would be wrong because of a different calling convention.
    """
    pytest.importorskip("mlx")
    pytest.importorskip("torch")
    python(
        """
        from mlx_posttrain.engines.mlx.cpu import blas
        assert blas.load().name
        import ctypes, torch
        assert not hasattr(ctypes.CDLL(None), "scipy_cblas_sgemm")
        a, b = torch.randn(1000, dtype=torch.complex64), torch.randn(1000, dtype=torch.complex64)
        assert abs(torch.dot(a, b) - (a * b).sum()) < 1e-2
        """,
        MLX_POSTTRAIN_BLAS="",
    )


@linux
def test_a_library_that_cannot_be_used_is_one_line_and_mlx_still_works(tmp_path):
    pytest.importorskip("mlx")
    nothing = tmp_path / "libnothing.so"
    nothing.write_bytes(b"not a library")
    code = """
        import sys
        sys.stderr = sys.stdout
        from mlx_posttrain.engines.mlx.cpu import blas
        info = blas.load()
        import mlx.core as mx
        assert (mx.ones((3, 4)) @ mx.ones((4, 2))).sum().item() == 24
        assert info.name is None
    """
    for path in (str(nothing), "/missing/libopenblas.so", "libm.so.6"):
        lines = python(code, MLX_POSTTRAIN_BLAS=path).splitlines()
        assert len(lines) == 1
        assert path in lines[0]
        assert lines[0].startswith("MLX_POSTTRAIN_BLAS: ")
    assert python(code, MLX_POSTTRAIN_BLAS="none") == ""


@linux
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            "blas._protection = lambda address: 1; blas._protect = refuse",
            "cannot be changed here ([Errno 13] mprotect: Permission denied)",
        ),
        ("blas._protection = refuse", "cannot be changed here"),  # no /proc
        ("blas._FUNCTION_RELOCATIONS = {}", "could not be checked (unknown processor"),
        (
            "ctypes.CDLL = lambda *given, **named: object()",
            "could not be checked (this C library does not tell",
        ),
        (
            "blas._import_slots = lambda *given: real('libnowhere.so', *given[1:])",
            "could not be checked (libnowhere.so is not among",
        ),
    ],
    ids=["mprotect fails", "no /proc", "unknown processor", "missing symbol", "library under another name"],
)
def test_if_mlx_cannot_be_redirected_one_line_tells_why_and_it_still_works(broken, message):
    pytest.importorskip("mlx")
    out = python(
        f"""
        import ctypes, sys
        sys.stderr = sys.stdout
        import mlx.core as mx
        from mlx_posttrain.engines.mlx.cpu import blas
        def refuse(*given):
            raise PermissionError(13, "mprotect: Permission denied")
        real = blas._import_slots
        {broken}
        info = blas.load()
        assert info.name is None and (mx.ones((3, 4)) @ mx.ones((4, 2))).sum().item() == 24
        """,
        MLX_POSTTRAIN_BLAS="",
    )
    (line,) = out.splitlines()
    assert message in line and ("engine=torch" in line or "doctor" in line)


@linux
@pytest.mark.parametrize("bits", [1, 3], ids=["read-only", "writable"])
def test_a_page_is_as_writable_after_a_redirection_as_before(bits):
    import ctypes
    import mmap

    from mlx_posttrain.engines.mlx.cpu import blas

    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page)) + 16
    blas._protect(address, bits)
    assert blas._protection(address) == bits
    slot = blas._Slot(address)
    slot.redirect(77)
    assert slot.value == 77 and blas._protection(address) == bits
    blas._protect(address, 3)


def test_a_library_that_multiplies_wrongly_is_refused():
    from mlx_posttrain.engines.mlx.cpu import blas

    class Sgemm:
        """A cblas_sgemm that leaves the output as it was."""

        def __call__(self, *_arguments):
            return None

    with pytest.raises(ArithmeticError, match="wrongly"):
        blas._self_test(Sgemm())


# mx.compile

PROBE = """
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    from mlx_posttrain.engines.mlx.cpu.compile_check import compile_problem, compile_works, fuses
    print(compile_works(), fuses(), compile_problem(), sep="|")
"""


@linux
def test_without_a_compiler_mlx_runs_unfused(tmp_path):
    pytest.importorskip("mlx")
    assert python(PROBE, PATH=str(tmp_path), TMPDIR=str(tmp_path)) == "True|False|None\n"


@linux
def test_a_broken_compiler_or_temporary_folder_is_noticed(tmp_path):
    pytest.importorskip("mlx")
    tools, scratch = tmp_path / "bin", tmp_path / "tmp"
    tools.mkdir(), scratch.mkdir()
    (tools / "g++").write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no headers; exit 1\n')
    (tools / "g++").chmod(0o755)
    works, _, problem = python(PROBE, PATH=f"{tools}:/usr/bin:/bin", TMPDIR=str(scratch)).split("|")
    assert works == "False"
    assert "Failed to compile" in problem
    works, _, problem = python(PROBE, PATH=f"{tools}:/usr/bin:/bin", TMPDIR=str(tmp_path / "missing")).split(
        "|"
    )
    assert works == "False"
