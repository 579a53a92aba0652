"""Whether a checkpoint is what was written: ``state.json`` names its files with their sizes and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain.convert.files import parse_json
from mlx_posttrain.convert.hub import check_tensors
from mlx_posttrain.errors import UserError


class Checkpoint(NamedTuple):
    """A complete checkpoint: its folder, and the state and random states saved with it."""

    folder: Path
    state: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Damaged(Exception):
    """What is wrong with a checkpoint."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return a checkpoint whose files are those that were written. Raises Damaged for any other."""
    state = read_state(folder)
    for name, known in state["files"].items():
        path = folder.parent / name
        # of earlier releases the size alone
        size, digest = known if isinstance(known, list) and len(known) == 2 else (known, None)
        if not os.path.isfile(path):  # a name that is too long is none either
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size:,} bytes, not {size}")
        if digest is not None and _sha256(path) != digest:
            raise Damaged(f"{name} is not what was written")
        if path.suffix == ".safetensors":
            try:
                check_tensors(path)
            except UserError:
                raise Damaged(f"{name} is not a safetensors file") from None
    try:
        with np.load(folder / "random.npz", allow_pickle=False) as arrays:
            return Checkpoint(folder, state, dict(arrays))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        raise Damaged("random.npz cannot be read") from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json. Raises Damaged where it is not what was written."""
    if not (checkpoint / "state.json").is_file():  # a pipe would be waited for
        raise Damaged("state.json cannot be read")
    try:
        state = parse_json((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Damaged("state.json cannot be read") from None
    damaged = Damaged("state.json is not what was written")
    if not isinstance(state, dict):
        raise damaged
    written = state.pop("sha256", None)
    if written is not None and written != _state_hash(state):
        raise damaged
    if (
        not isinstance(state.get("step"), int)
        or not isinstance(state.get("files"), dict)
        or not isinstance(state.get("best"), str | None)
    ):
        raise damaged
    return state


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint's state.json, with a hash of itself."""
    read_back = json.loads(json.dumps(state))
    text = json.dumps({**read_back, "sha256": _state_hash(read_back)})
    (checkpoint / "state.json").write_text(text, encoding="utf-8")


def _state_hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_hashes(folder: Path, name: str) -> dict[str, list[Any]]:
    """Return [size in bytes, SHA-256] of every file in a folder.

    Keys are paths from the folder's future parent, in which it has ``name``.
    """
    return {
        f"{name}/{p.relative_to(folder).as_posix()}": [p.stat().st_size, _sha256(p)]
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
