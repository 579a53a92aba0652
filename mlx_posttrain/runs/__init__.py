"""Run directories: what a run writes, who may write it, and the trackers that get a copy of its metrics."""

from mlx_posttrain.runs.directory import (
    REFERENCE,
    Checkpoint,
    Run,
    check_free,
    create,
    environment_info,
    is_run,
    reopen,
    replace_folder,
    write_text,
)
from mlx_posttrain.runs.lock import RunInUse

__all__ = [
    "REFERENCE",
    "Checkpoint",
    "Run",
    "RunInUse",
    "check_free",
    "create",
    "environment_info",
    "is_run",
    "reopen",
    "replace_folder",
    "write_text",
]
