"""What can be done with a run that has just ended."""

from __future__ import annotations

import shlex
from pathlib import Path

from mlx_posttrain import runs
from mlx_posttrain.models.source import saves_language_model


def next_steps(folder: Path) -> list[str]:
    """Return the commands that come next after a finished run.

    A folder below the working directory is named from there, so that a command can be copied.
    """
    folder = folder.absolute()
    here = Path.cwd()
    name = shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
    _, recipe = runs.reopen(folder)
    final, stages = folder / "final", list(recipe.get("stages") or ())
    if stages:
        finals = [folder / stage / "final" for stage in stages]
        pages = [f"open {name}/{one.parent.name}/final/report.html" for one in finals if _is_report(one)]
        return [*pages, *([f"mlx-posttrain chat {name}"] if any(map(saves_language_model, finals)) else [])]
    if _is_report(final):
        return [f"open {name}/final/report.html"]
    to = "peft" if (final / "adapter_config.json").is_file() else "hf"
    export = f"mlx-posttrain export {name} --to {to}"
    if not saves_language_model(final):
        return [f"mlx-posttrain run 07_ppo 'reward=[{{model: {name}}}]'", export]
    return [f"mlx-posttrain chat {name}", f"mlx-posttrain eval {name}", export]


def _is_report(final: Path) -> bool:
    return (final / "report.html").is_file()
