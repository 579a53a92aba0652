"""What a KL leash needs of its frozen reference, computed once: the hidden states at the trained positions of
every row.

The loss compares whole distributions. They are too large to keep, [V] numbers a position, but the hidden
states that they come from are [width]: of GPT-2 3 KB. With them the reference's blocks never run again; its
head still does, a chunk of positions at a time (engines/fused.py).

The states are computed before the first step, in batches that depend on rows and settings alone, and no
checkpoint holds them: a resumed run computes the same ones, and so has the losses of one that was not
interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_posttrain.console import say
from mlx_posttrain.data import batches
from mlx_posttrain.data.dataset import Data
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import REFERENCE_HIDDEN, Model

GB = 2**30


class Share(NamedTuple):
    """The rows whose states are kept, what they take in GB, and GB of those that would have paid but do not
    fit.
    """

    training: bool = False
    held_out: bool = False
    gb: float = 0.0
    beyond: float = 0.0


def share(data: Data, width: int, limit: float) -> Share:
    """What to keep within ``limit`` GB. Held-out rows come first: every evaluation meets them. Training rows
    pay from the second epoch on.
    """
    wanted = _gb(data.held_out, width), _gb(data.train, width) if data.steps > data.steps_per_epoch else 0.0
    held_out = 0 < wanted[0] <= limit
    training = 0 < wanted[1] <= limit - wanted[0] * held_out
    gb = wanted[0] * held_out + wanted[1] * training
    return Share(training, held_out, gb, sum(wanted) - gb)


def remember(model: Model, data: Data, limit: float) -> None:
    """Let ``data``'s batches carry the hidden states of ``model``'s reference, as far as they fit ``limit``
    GB; says what does not fit.

    Does nothing for a model whose head takes none, see ``Model.reference_width``, and at a limit of 0.
    """
    width = model.reference_width
    if not limit or width is None:
        return
    found = share(data, width, limit)
    if found.beyond:
        say(
            f"reference: {found.beyond:.3g} GB of hidden states are beyond kl.cache_gb={limit:g} and are "
            "computed anew each time"
        )
    if found.gb:
        say(f"reference: {found.gb:.3g} GB of hidden states are computed once and kept")
    if found.held_out:
        data.held_out_figures = {REFERENCE_HIDDEN: hidden_states(model, data.held_out, data)}
    if found.training:
        data.figures = {REFERENCE_HIDDEN: hidden_states(model, data.train, data)}


def hidden_states(model: Model, examples: Sequence[Example], data: Data) -> list[np.ndarray]:
    """For each example [trained tokens, width] float32 hidden states of the reference, from batches of
    similar length.
    """
    found = [np.empty(0, np.float32)] * len(examples)
    settings = data.settings
    for rows in batches.for_evaluation(
        [len(e.tokens) for e in examples], settings.batch_size, settings.token_budget
    ):
        batch = batches.collate([examples[i] for i in rows], data.context)
        for i, states in zip(rows, batches.by_row(batch, model.reference_hidden(batch)), strict=True):
            found[i] = states
    return found


def _gb(examples: Sequence[Example], width: int) -> float:
    return 4 * width * sum(sum(e.trained[1:]) for e in examples) / GB
