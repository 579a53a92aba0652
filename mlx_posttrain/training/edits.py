"""A recipe.yaml that was edited after a run's last checkpoint, so that the run would be a mixture."""

from __future__ import annotations

from typing import Any

from mlx_posttrain import config, runs
from mlx_posttrain.console import log
from mlx_posttrain.errors import UserError

#: Keys that say nothing of what is trained: a run may be moved, described and tracked anew.
_FREE = ("output", "description", "log")


def settled(recipe: config.Recipe) -> dict[str, Any]:
    """A recipe as a checkpoint keeps it."""
    return recipe.model_dump(mode="json", exclude=set(_FREE))


def check(run: runs.Run, recipe: config.Recipe, *, accept: bool) -> None:
    """Compare a recipe with that of the run's newest checkpoint.

    Raises UserError that lists the differences; with ``accept`` they are written into recipe.yaml instead,
    under ``changes``. A checkpoint of an earlier release keeps no recipe.
    """
    state = run.newest_state()
    before = state.get("recipe")
    if not isinstance(before, dict):
        return
    if before.get("method") == recipe.method:  # keys that came since have their defaults
        before = settled(config.parse(before, type(recipe), f"{run.checkpoints}: the recipe of a checkpoint"))
    found = config.differences(before, settled(recipe))
    if not found:
        return
    listed = config.listed(found)
    if not accept:
        raise UserError(
            f"{run.folder / 'recipe.yaml'} was edited after step {state['step']} ({listed}): the run would "
            "be a mixture; put it back, start anew with output=DIR, or add --accept-edits, which notes "
            "the changes in recipe.yaml"
        )
    run.note_changes({"step": state["step"], **{key: list(pair) for key, pair in found.items()}})
    log(f"{run.folder}: from step {state['step']} on with an edited recipe: {listed}")
