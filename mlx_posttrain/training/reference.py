"""What a loss needs of its frozen reference, computed once per row before the first step.

For a loss of log-probabilities that is one number for each trained token, of the model as the run starts from
it: no second model is ever in memory. The run keeps them, since a resumed run's model has moved on. A KL term
over whole distributions needs more: they are too large to keep ([V] numbers a position), but the hidden
states that they come from are [width], 3 KB for GPT-2. With them the reference's blocks never run again; its
head still does, a chunk of positions at a time (engines/fused.py).

Both are computed in batches that depend on rows and settings alone: a resumed run has the losses of one that
was not interrupted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_posttrain.console import log
from mlx_posttrain.convert.files import write_atomically
from mlx_posttrain.data import batches
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.data.dataset import Dataset
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import REFERENCE_HIDDEN, REFERENCE_LOGPROBS, Model

GB = 2**30
TELL_EVERY = 15  # seconds


class Share(NamedTuple):
    """Which rows' states are cached, their GB, and the GB of those that would pay but do not fit."""

    training: bool = False
    held_out: bool = False
    gb: float = 0.0
    beyond: float = 0.0


def share(dataset: Dataset, width: int, limit: float) -> Share:
    """What to cache within ``limit`` GB.

    Held-out rows come first: every evaluation meets them. Training rows pay from the second epoch on.
    """
    held_out_gb = _gb(_examples(dataset, dataset.held_out), width)
    again = dataset.steps > dataset.steps_per_epoch
    training_gb = _gb(_examples(dataset, dataset.train), width) if again else 0.0
    held_out = 0 < held_out_gb <= limit
    training = 0 < training_gb <= limit - held_out_gb * held_out
    gb = held_out_gb * held_out + training_gb * training
    return Share(training, held_out, gb, held_out_gb + training_gb - gb)


def cache_hidden_states(model: Model, dataset: Dataset, limit: float) -> None:
    """Let the dataset's batches carry the reference's hidden states, as far as they fit ``limit`` GB.

    Says what does not fit. Does nothing for a model whose head takes none (``Model.reference_width``), and at
    a limit of 0.
    """
    width = model.reference_width
    if not limit or width is None:
        return
    fits = share(dataset, width, limit)
    if fits.beyond:
        log(
            f"reference: {fits.beyond:.3g} GB of hidden states are beyond kl.cache_gb={limit:g} and are "
            "computed "
            "again each time"
        )
    if fits.gb:
        log(f"reference: {fits.gb:.3g} GB of hidden states are computed once and kept")
    cached: dict[Example, np.ndarray] = {}
    for wanted, items in ((fits.held_out, dataset.held_out), (fits.training, dataset.train)):
        if wanted:
            cached |= _per_example(_examples(dataset, items), dataset, model.reference_hidden)
    if cached:
        dataset.extra[REFERENCE_HIDDEN] = cached


def cache_logprobs(dataset: Dataset, path: Path, reference: str, model: Callable[[], Model]) -> float | None:
    """Let the dataset's batches carry the reference's log-probability of every trained token.

    path: the file that the run keeps them in. reference: a digest of the reference's weights, see
    :func:`digest`. model: the reference, loaded when the file is not there or is of another model or other
    rows. Returns the largest difference between an answer's log-probability as computed here and once more in
    a training batch, in nats, where it was computed.
    """
    examples = _examples(dataset, [*dataset.held_out, *dataset.train])
    key = hashlib.sha256(reference.encode())
    for example in examples:
        key.update(np.array([*example.tokens, -1, *example.trained], np.int32).tobytes())
    kept = _read(path, key.hexdigest(), examples)
    if kept is not None:
        dataset.extra[REFERENCE_LOGPROBS] = kept
        return None
    log(
        f"reference: the log-probabilities of {len(examples):,} answers are computed once and kept in the run"
    )
    policy = model()

    def logprobs(batch: Batch) -> np.ndarray:
        return policy.apply(lambda m, b: {"logprobs": m.logprobs(b)}, [batch])[0]["logprobs"]

    values = _per_example(examples, dataset, logprobs)
    dataset.extra[REFERENCE_LOGPROBS] = values
    flat = np.concatenate([values[example] for example in examples]).astype(np.float32)
    write_atomically(path, lambda to: save_file({"logprobs": flat}, to, metadata={"key": key.hexdigest()}))
    (first,) = dataset.micro_batches(dataset.rows(0)[:1])
    gaps = batches.by_row(first, logprobs(first) - first.extra[REFERENCE_LOGPROBS])
    return max(abs(float(gap.sum())) for gap in gaps)


def _read(path: Path, key: str, examples: list[Example]) -> dict[Example, np.ndarray] | None:
    """The log-probabilities in a run's file; None where there is none, or one of another model or rows."""
    if not path.exists():
        return None
    with safe_open(path, "numpy") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        flat = file.get_tensor("logprobs")
    ends = np.cumsum([sum(e.trained[1:]) for e in examples])
    return dict(zip(examples, np.split(flat, ends[:-1]), strict=True))


def digest(folders: Iterable[Path]) -> str:
    """A hash of the weights in some folders."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                while block := file.read(2**24):
                    found.update(block)
    return found.hexdigest()


def _examples(dataset: Dataset, items: Iterable[object]) -> list[Example]:
    """The distinct rows of some items, in order."""
    return list(dict.fromkeys(e for item in items for e in dataset.collate.examples(item)))


def _per_example(
    examples: list[Example], dataset: Dataset, function: Callable[[Batch], np.ndarray]
) -> dict[Example, np.ndarray]:
    """``function``'s values [N, ...] at each example's trained tokens, from batches of similar length.

    Says every TELL_EVERY seconds how far it is.
    """
    settings, values, told = dataset.settings, {}, time.monotonic()
    lengths = [len(e.tokens) for e in examples]
    for rows in batches.for_evaluation(lengths, settings.batch_size, settings.token_budget):
        batch = batches.collate([examples[i] for i in rows], dataset.context)
        for i, of_row in zip(rows, batches.by_row(batch, function(batch)), strict=True):
            values[examples[i]] = of_row
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            log(f"reference: {len(values):,} of {len(examples):,} rows")
    return values


def _gb(examples: Iterable[Example], width: int) -> float:
    return 4 * width * sum(sum(e.trained[1:]) for e in examples) / GB
