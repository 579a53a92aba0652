"""Run directories: what a run leaves, who may write it, and where its figures are copied to."""

from mlx_posttrain.runs.directory import (
    Checkpoint,
    Run,
    environment_info,
    is_run,
    read_jsonl,
    reopen,
    replace_folder,
    start,
    write_text,
)

__all__ = [
    "Checkpoint",
    "Run",
    "environment_info",
    "is_run",
    "read_jsonl",
    "reopen",
    "replace_folder",
    "start",
    "write_text",
]
