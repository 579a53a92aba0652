"""Folders of rows: which files are of which split, and what ``datasets`` saved."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_posttrain.console import log
from mlx_posttrain.data.files import EXTENSIONS
from mlx_posttrain.errors import UserError

if TYPE_CHECKING:
    import datasets

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval", "evaluation", "holdout", "heldout"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
#: What may follow the name of a split in one word, as in testset.jsonl.
_ENDINGS = ("set", "data", "split")
#: What ``datasets`` writes beside rows.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


def split_of(name: str) -> str | None:
    """Return the split that a name says (``valid-0001.jsonl``: validation, ``testset``: test), or None."""
    words = re.split(r"[\W\d_]+", re.sub(r"held[-_ ]out|hold[-_ ]out", "heldout", name.lower()))
    for word in words:
        for ending in ("", *_ENDINGS):
            if word.endswith(ending) and (found := _SPLITS.get(word.removesuffix(ending))):
                return found
    return None


def named(split: str) -> str:
    """Return our name of a split that is asked for: ``dev`` is validation, others are as they stand."""
    return (split_of(split) if split.isalpha() else None) or split


def files(folder: Path, split: str, split_key: str) -> list[Path]:
    """Return a folder's files of one split, or those of its folder ``data``, as on the hub.

    Files whose names say no split belong to train where no other file does; else they are left out, which is
    printed. Raises UserError where there are none, or where a numbered one is missing.
    """
    found = _data_files(folder) or _data_files(folder / "data")
    if not found:
        raise UserError(f"{folder}: no data file in this folder (looked for {', '.join(EXTENSIONS)})")
    splits = {path: split_of(path.name) for path in found}
    wanted = named(split)
    chosen = [path for path in found if wanted in (splits[path], re.split("[-.]", path.name)[0])]
    unnamed = [path for path in found if splits[path] is None]
    if wanted == "train" and not chosen:
        chosen = unnamed
    elif wanted == "train" and unnamed:
        names = ", ".join(path.name for path in unnamed[:5]) + (", …" if len(unnamed) > 5 else "")
        log(f"{folder}: left out {names}: the name says no split, and that of {chosen[0].name} says train")
    if not chosen:
        there = sorted({name or "train" for name in splits.values()})
        raise UserError(f"{folder}: no split {split!r} ({split_key}); its file names give {', '.join(there)}")
    _check_shards(chosen)
    return chosen


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, in order; none of a folder that is not there."""
    try:
        return sorted(
            path
            for path in (folder.iterdir() if folder.is_dir() else ())
            if not path.name.startswith(".")
            and path.name.lower().endswith(EXTENSIONS)
            and path.name not in _ABOUT
            and path.is_file()
        )
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({e.strerror or e})") from e


def _check_shards(paths: list[Path]) -> None:
    """Raise UserError where a file numbered as ``-00001-of-00003`` is missing. Numbers start at 0 or 1."""
    shards: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for path in paths:
        if match := _SHARD.fullmatch(path.name):
            shards[match[1], match[3], match[4]].add(int(match[2]))
    for (before, of, after), numbers in shards.items():
        start = int(0 not in numbers and int(of) in numbers)
        lacks = next((n for n in range(start, start + int(of)) if n not in numbers), None)
        if lacks is not None:
            raise UserError(
                f"{paths[0].parent}: {before}{lacks:0{len(of)}}-of-{of}{after} is missing; download it, "
                "or name one file to read that alone"
            )


def is_saved(path: Path) -> bool:
    """Return whether ``save_to_disk`` of ``datasets`` wrote a folder."""
    try:
        return (path / "dataset_dict.json").is_file() or (
            (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
        )
    except OSError:
        return False


def saved(path: Path, split: str, split_key: str) -> datasets.Dataset:
    """Return one split of what ``save_to_disk`` wrote. Raises UserError for one that it does not have."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    # Exceptions differ between versions of datasets, and a damaged file may raise any of Arrow's.
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: not a data set that save_to_disk wrote in full ({reason})") from e
    if isinstance(found, datasets.Dataset):
        found = datasets.DatasetDict(train=found)
    wanted = named(split)
    name = split if split in found else next((n for n in found if split_of(n) == wanted), None)
    if name is None:
        raise UserError(f"{path}: no split {split!r} ({split_key}); it has {', '.join(found)}")
    return found[name]
