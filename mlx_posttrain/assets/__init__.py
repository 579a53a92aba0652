"""The embedded model, and the texts that come with it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from mlx_posttrain import jsonl


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one of the files here."""
    return list(jsonl.read(Path(str(resources.files(__name__))) / name))
