"""A fast BLAS for MLX on Linux.

MLX's Linux wheel links the reference BLAS, which multiplies matrices at about 5 GFLOP/s on a machine capable
of 170. This module finds an OpenBLAS and makes MLX's library, and nothing else in the process, call it: the
addresses of ``cblas_?gemm`` in libmlx's own import table (the GOT slots that the loader filled) are replaced
by OpenBLAS's.

Why not simply load OpenBLAS with RTLD_GLOBAL before MLX? Because every library loaded later would bind to it
as well, including PyTorch: its matrix products would leave MKL (training 1.5 times slower, so no fair
comparison), and its complex dot products would be wrong, because the two libraries return complex numbers by
different conventions. Redirecting one library affects nothing else, does not depend on the order of imports,
and works with any symbol prefix.

OpenBLAS is looked for in this order:

1. ``MLX_POSTTRAIN_BLAS``: the path of a library, or ``none`` to leave MLX unchanged;
2. SciPy's wheel, which contains a current OpenBLAS for every processor and is installed with this package;
3. a system library (Debian and Ubuntu: libopenblas0-pthread).

``OPENBLAS_NUM_THREADS`` and ``OMP_NUM_THREADS`` are respected. One thread is faster while other programs keep
the cores busy, because threads that wait for each other then wait for whole time slices (256 x 256: 64
GFLOP/s with one thread, 11 with more, on two busy cores). On macOS, MLX uses Accelerate or the GPU and this
module does nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ENV = "MLX_POSTTRAIN_BLAS"
ADVICE = (
    "MLX uses the slow reference BLAS on this machine: install SciPy's wheel (pip install scipy) or an "
    "OpenBLAS "
    "(Debian, Ubuntu: apt install libopenblas0-pthread; Fedora: dnf install openblas-threads)"
)
UNCHECKED = "the BLAS that MLX uses could not be checked ({}): `mlx-posttrain doctor` measures its speed"
UNCHANGED = (
    "MLX keeps the slow reference BLAS, since its import table cannot be changed here ({}): use an "
    "MLX built with a fast one, or engine=torch"
)

# The routines that libmlx calls in every forward and backward pass. LAPACK (mx.linalg) stays with the library
# that MLX was built with.
_ROUTINES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_PREFIXES = ("scipy_", "")  # SciPy's wheels rename all symbols, system libraries do not
_SYSTEM_NAMES = (
    "libopenblasp.so.0",  # Fedora: threaded, while its libopenblas.so.0 is serial
    "libopenblas.so.0",  # Debian, Arch: threaded
    "libopenblas.so",
)


@dataclass(frozen=True)
class BlasInfo:
    """The library that multiplies MLX's matrices on the CPU.

    ``name`` is None if it is not known to be fast; ``advice`` then states what to do, and is None if there is
    nothing to do.
    """

    name: str | None
    path: str | None = None
    advice: str | None = None


@cache
def load(quiet: bool = False) -> BlasInfo:
    """Give MLX an OpenBLAS if it needs one.

    May be called any number of times, before or after MLX is first imported. If MLX stays slow, one line on
    stderr states what to install, unless ``quiet``; otherwise nothing is printed.
    """
    info = _load()
    if info.advice and not quiet:
        print(info.advice, file=sys.stderr)
    return info


def _load() -> BlasInfo:
    if sys.platform == "darwin":
        return BlasInfo("Accelerate")
    if not sys.platform.startswith("linux") or importlib.util.find_spec("mlx") is None:
        return BlasInfo(None)
    import mlx.core  # noqa: F401  maps libmlx into the process

    try:
        slots = _import_slots("libmlx.so", _ROUTINES)
    except LookupError as error:
        return BlasInfo(None, advice=UNCHECKED.format(error.args[0]))
    if "cblas_sgemm" not in slots:
        return BlasInfo("built into MLX")
    current = _library_of(slots["cblas_sgemm"].value)
    requested = os.environ.get(ENV, "").strip()
    if requested.lower() == "none":
        return BlasInfo(None, current)
    fast = ("openblas", "mkl", "blis", "armpl", "nvpl")
    if not requested and any(name in Path(current).name for name in fast):
        return BlasInfo(Path(current).name, current)  # an MLX built by a distribution

    problem = "no OpenBLAS found"
    for path in [requested] if requested else _candidates():
        try:
            library, prefix = _open(path)
            _self_test(getattr(library, prefix + "cblas_sgemm"))
        except (OSError, ArithmeticError, LookupError) as error:
            problem = f"{path}: {error}"
            continue
        try:
            for routine, slot in slots.items():
                slot.redirect(_address(library, prefix + routine))
        except OSError as error:  # another library would fail in the same way
            return BlasInfo(None, current, UNCHANGED.format(error))
        return BlasInfo(_describe(library, prefix), _library_of(slots["cblas_sgemm"].value))
    return BlasInfo(None, current, f"{ENV}: {problem}" if requested else ADVICE)


# Finding an OpenBLAS


def _candidates() -> Iterator[str]:
    """Yield the libraries to try: SciPy's, one next to Python (conda), the system's.

    SciPy's is found by the package's folder, without importing the package.
    """
    spec = importlib.util.find_spec("scipy")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from sorted(
            str(p) for p in Path(folder).with_name("scipy.libs").glob("libscipy_openblas-*.so*")
        )
    for name in _SYSTEM_NAMES:
        next_to_python = Path(sys.prefix) / "lib" / name
        yield str(next_to_python) if next_to_python.exists() else name


def _open(path: str) -> tuple[ctypes.CDLL, str]:
    """Return a library, opened privately (RTLD_LOCAL), and the prefix of its symbols.

    Raises OSError if it cannot be opened, and LookupError if it lacks the routines.
    """
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL | os.RTLD_NOW)
    for prefix in _PREFIXES:
        if all(hasattr(library, prefix + routine) for routine in _ROUTINES):
            if "USE64BITINT" in _config(library, prefix):
                raise LookupError("built for 64-bit integers, MLX passes 32-bit ones")
            # OpenMP builds read OMP_NUM_THREADS only
            threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
            setter = prefix + "openblas_set_num_threads"
            if threads.isdigit() and int(threads) > 0 and hasattr(library, setter):
                getattr(library, setter)(int(threads))
            return library, prefix
    raise LookupError("has no cblas_sgemm with 32-bit integers")


def _config(library: ctypes.CDLL, prefix: str) -> str:
    """Return OpenBLAS's description of itself; '' for other libraries.

    For example 'OpenBLAS 0.3.30 DYNAMIC_ARCH Haswell MAX_THREADS=64'.
    """
    name = prefix + "openblas_get_config"
    if not hasattr(library, name):
        return ""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    return (function() or b"").decode(errors="replace")


def _describe(library: ctypes.CDLL, prefix: str) -> str:
    words = _config(library, prefix).split()
    if len(words) < 2:
        return "BLAS"
    core = getattr(library, prefix + "openblas_get_corename", None)
    if core is not None:
        core.restype = ctypes.c_char_p
    threads = getattr(library, prefix + "openblas_get_num_threads", lambda: 0)()
    kernel = core().decode(errors="replace") if core is not None else "unknown kernel"
    return f"{words[0]} {words[1]} ({kernel}, {threads} thread{'s' if threads != 1 else ''})"


def _self_test(sgemm: Any) -> None:
    """Raise ArithmeticError unless the routine multiplies correctly in the three forms that training uses.

    The matrices are small integers, whose product is exact in float32. Old OpenBLAS builds are known to
    compute wrong results on newer processors.
    """
    import numpy as np

    pointer, integer, real = ctypes.POINTER(ctypes.c_float), ctypes.c_int, ctypes.c_float
    sgemm.restype = None
    sgemm.argtypes = [integer] * 6 + [real, pointer, integer, pointer, integer, real, pointer, integer]
    row_major, plain, transposed = 101, 111, 112
    for m, n, k in ((1, 33, 65), (70, 257, 66), (130, 64, 129)):
        a = (np.arange(m * k, dtype=np.int64) * 7 % 11 - 5).reshape(m, k)
        b = (np.arange(k * n, dtype=np.int64) * 5 % 13 - 6).reshape(k, n)
        for flip_a, flip_b in ((False, False), (False, True), (True, False)):
            left = np.ascontiguousarray(a.T if flip_a else a, dtype=np.float32)
            right = np.ascontiguousarray(b.T if flip_b else b, dtype=np.float32)
            out = np.full((m, n), np.nan, dtype=np.float32)
            sgemm(
                row_major,
                transposed if flip_a else plain,
                transposed if flip_b else plain,
                m,
                n,
                k,
                1.0,
                left.ctypes.data_as(pointer),
                left.shape[1],
                right.ctypes.data_as(pointer),
                right.shape[1],
                0.0,
                out.ctypes.data_as(pointer),
                n,
            )
            if not np.array_equal(out, a @ b):
                raise ArithmeticError("multiplies wrongly on this processor")


# Redirecting one library's imports (ELF, 64 bit)

# Names and values as in elf.h and the processors' ABI supplements.
_PT_DYNAMIC = 2
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23
_FUNCTION_RELOCATIONS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}  # GLOB_DAT, JUMP_SLOT
_RELA_SIZE, _SYM_SIZE = 24, 24
_READ, _WRITE, _EXECUTE = 1, 2, 4  # mprotect(2)


class _ProgramHeader(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("vaddr", ctypes.c_uint64),
        ("paddr", ctypes.c_uint64),
        ("filesz", ctypes.c_uint64),
        ("memsz", ctypes.c_uint64),
        ("align", ctypes.c_uint64),
    ]


class _LoadedObject(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.POINTER(_ProgramHeader)),
        ("count", ctypes.c_uint16),
    ]


class _DynamicLibrary(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class _Slot:
    """One entry of a library's import table: the location of the address that it calls for one function."""

    address: int

    @property
    def value(self) -> int:
        return ctypes.c_uint64.from_address(self.address).value

    def redirect(self, target: int) -> None:
        """Write another function's address.

        It is one aligned word, so a concurrent call in another thread sees the old or the new address. The
        page's protection is restored afterwards. Raises OSError if the page may not be written.
        """
        before = _protection(self.address)
        if not before & _WRITE:
            _protect(self.address, before | _WRITE)
        ctypes.c_uint64.from_address(self.address).value = target
        if not before & _WRITE:
            _protect(self.address, before)


def _protection(address: int) -> int:
    """Return the protection of the page at ``address``, as mprotect's bits.

    Raises OSError if the system does not report it.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, rest = line.partition("-")
        end, letters = rest.split()[:2]
        if int(begin, 16) <= address < int(end, 16):
            return sum(
                bit for letter, bit in (("r", _READ), ("w", _WRITE), ("x", _EXECUTE)) if letter in letters
            )
    raise OSError(f"nothing is mapped at {address:#x}")


def _protect(address: int, bits: int) -> None:
    """Set the protection of the page at ``address``. Raises OSError."""
    page = os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address // page * page), ctypes.c_size_t(page), bits):
        number = ctypes.get_errno()
        raise OSError(number, f"mprotect: {os.strerror(number)}")


def _import_slots(library: str, routines: tuple[str, ...]) -> dict[str, _Slot]:
    """Return the slots in which the loaded ``library`` has the addresses of imported ``routines``.

    Routines that it does not import are left out. Raises LookupError, with the reason, if the slots cannot be
    determined.
    """
    machine = os.uname().machine
    kinds = _FUNCTION_RELOCATIONS.get(machine)
    if kinds is None:
        raise LookupError(f"unknown processor {machine}")
    walk = getattr(ctypes.CDLL(None), "dl_iterate_phdr", None)
    if walk is None:
        raise LookupError("this C library does not tell what is loaded")
    segments: list[tuple[int, int, int, int]] = []  # type, start, size, base

    def visit(info: Any, _size: int, _data: Any) -> int:
        loaded = info.contents
        if Path((loaded.name or b"").decode(errors="replace")).name == library:
            for header in loaded.headers[: loaded.count]:
                segments.append((header.type, loaded.base + header.vaddr, header.memsz, loaded.base))
            return 1
        return 0

    visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LoadedObject), ctypes.c_size_t, ctypes.c_void_p)
    walk(visitor(visit), None)
    dynamic = next((s for s in segments if s[0] == _PT_DYNAMIC), None)
    if dynamic is None:
        raise LookupError(f"{library} is not among the libraries loaded")
    _, start, size, base = dynamic
    words = (ctypes.c_uint64 * (size // 8)).from_address(start)
    table = {words[i]: words[i + 1] for i in range(0, len(words) - 1, 2) if words[i]}

    def pointer(tag: int) -> int:  # glibc has already added the base to these; other loaders may not
        return table[tag] if table[tag] >= base else base + table[tag]

    slots: dict[str, _Slot] = {}
    for where, length in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
        if where not in table or len(slots) == len(routines):
            continue
        entries = (ctypes.c_uint64 * (table[length] // 8)).from_address(pointer(where))
        for i in range(0, len(entries), _RELA_SIZE // 8):
            offset, kind, symbol = entries[i], entries[i + 1] & 0xFFFFFFFF, entries[i + 1] >> 32
            if kind not in kinds:
                continue
            name_at = ctypes.c_uint32.from_address(pointer(_DT_SYMTAB) + symbol * _SYM_SIZE).value
            name = ctypes.string_at(pointer(_DT_STRTAB) + name_at).decode(errors="replace")
            if name in routines:
                slots[name] = _Slot(base + offset)
    return slots


def _library_of(address: int) -> str:
    """Return the file that the code at ``address`` was loaded from, '' if unknown."""
    info = _DynamicLibrary()
    dladdr = getattr(ctypes.CDLL(None), "dladdr", None)
    known = dladdr is not None and dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    return (info.file or b"").decode(errors="replace") if known else ""


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
