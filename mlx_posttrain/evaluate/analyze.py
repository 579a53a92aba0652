"""Measure what the findings are drawn from (evaluate/findings.py): models, weights, training rows and logs of
any set of runs.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import runs
from mlx_posttrain.config import DataSection
from mlx_posttrain.console import say
from mlx_posttrain.convert import arrays, gpt2, hub
from mlx_posttrain.data import batches, encode, templates
from mlx_posttrain.data.read import read_conversations, row_dataset
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import ceilings, charts, findings, measure
from mlx_posttrain.evaluate.comparison import Comparison
from mlx_posttrain.evaluate.findings import Finding
from mlx_posttrain.evaluate.suite import SuiteSection, base_texts, compare, text_loss
from mlx_posttrain.evaluate.suite import labels_of as suite_labels
from mlx_posttrain.methods import METHODS, sft
from mlx_posttrain.models.merge import write_merged
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import last_language_model, locate, saves_language_model

ROWS = 96  # training rows read for a distribution's shift
GRADIENT_ROWS = 64  # and for the gradients of templates
PARTS = 16  # that those rows are cut into for gradients
ANSWER = 48  # tokens of the answers that are decoded with the cache and without
# of a gradient that are kept: cosines over a random half million are those over all to about .0014
COORDINATES = 500_000


def root(name: str | Path) -> str:
    """The model that a run's first ancestor started from; a name that is no run is its own root."""
    while runs.is_run(name):
        recipe = runs.reopen(name)[1]
        if "stages" in recipe:
            name = last_language_model(Path(name), list(recipe["stages"]))
            continue
        if "model" not in recipe:
            raise UserError(f"{name} is a report, not a model: give the runs that it is about")
        made = Path(name) / "start"  # pre-training makes its own
        if made.is_dir():
            return str(made)
        name = recipe["model"]
    return str(name)


def writes_text(name: str | Path) -> bool:
    """Whether a run is a language model rather than a reward model."""
    final = Path(name) / "final"
    return not (runs.is_run(name) and final.is_dir()) or saves_language_model(final)


def with_base(names: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and labels with the model that the first run started from, called ``base``, unless it is there
    already.

    It comes last, because the first is what the others are compared with; a single run is compared with it.
    It is left out with a line where it is no longer to be found, and where no run is named.
    """
    first = next((name for name in names if runs.is_run(name)), None)
    if first is None or "base" in labels:
        return list(names), list(labels)
    try:
        base = root(first)
        place = locate(base)
    except UserError as error:
        say(f"the base is left out: {error}")
        return list(names), list(labels)
    if place in [locate(name) for name in names]:
        return list(names), list(labels)
    return ([base, *names], ["base", *labels]) if len(names) == 1 else ([*names, base], [*labels, "base"])


def of_comparison(comparison: Comparison, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """What a comparison and the runs' logs show without a further look at any model. logs: {label: records of
    metrics.jsonl}.
    """
    found = [
        findings.forgetting(comparison),
        findings.repetition(comparison),
        ceilings.finding(comparison),
        findings.overfitting(logs),
        findings.loss_and_quality(comparison),
    ]
    return [f for f in found if f is not None]


def logs_of(names: Sequence[str], labels: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The records of the runs among ``names``, by label."""
    return {
        label: runs.Run(Path(name)).metrics()
        for name, label in zip(names, labels, strict=True)
        if runs.is_run(name)
    }


def analyze(
    names: Sequence[str],
    suite: SuiteSection,
    engine: str = "auto",
    *,
    base: str | None = None,
    labels: Sequence[str] | None = None,
    not_asked: Sequence[str] = (),
) -> tuple[Comparison, list[Finding]]:
    """Compare every run with the model that it started from, or all with ``base``, and say what it shows.

    A model that is no run is compared with what the first run started from. Runs of reward models, and those
    whose label is among ``not_asked``, take part with their curves only. Raises UserError where no run is
    left to ask.
    """
    names = [str(name) for name in names]
    labels = list(labels) if labels else suite_labels(names)
    writers = [
        (n, label)
        for n, label in zip(names, labels, strict=True)
        if writes_text(n) and label not in not_asked
    ]
    if not writers:
        left = " but those of not_asked" if any(writes_text(n) for n in names) else ""
        raise UserError(f"none of these runs{left} writes text: give a run of a language model")
    first = root(next((n for n, _ in writers if runs.is_run(n)), writers[0][0]))
    starts = {label: base or (root(n) if runs.is_run(n) else first) for n, label in writers}
    bases = {
        start: "base" if not place else f"base of {next(label for label in starts if starts[label] == start)}"
        for place, start in enumerate(dict.fromkeys(starts.values()))
    }
    charts.NAMED.set((*bases.values(), *labels))
    places = [*range(len(bases)), *(list(bases).index(starts[label]) for _, label in writers)]
    comparison = compare(
        [*bases, *(n for n, _ in writers)],
        suite,
        engine,
        [*bases.values(), *(label for _, label in writers)],
        places,
    )
    found: list[Finding | None] = [*of_comparison(comparison, logs_of(names, labels))]
    found.append(findings.drift({label: drift(starts[label], n) for n, label in writers}))
    trained: dict[str, str] = {}
    for n, label in writers:
        try:
            if _training_rows(n):
                trained[label] = n
        except UserError as error:  # a file that is gone costs its finding, not the whole analysis
            say(f"the training rows of {label} are left out: {error}")
    found += at_the_start(trained, starts, suite, engine)
    if trained:
        try:
            found.append(empty_cache(*next(iter(trained.items())), engine, suite.seed))
        except UserError as error:  # a question that fills the context
            say(f"decoding without a cache is left out: {error}")
    return comparison, [f for f in found if f is not None]


def at_the_start(
    trained: Mapping[str, str], starts: Mapping[str, str], suite: SuiteSection, engine: str
) -> list[Finding | None]:
    """What runs' training rows are to the models that the runs started from: foreign or not, and the first
    run's in different templates.

    trained: {label: run} with training rows that can be read; starts: {label: the model it started from}.
    """
    texts, _ = base_texts(suite)
    seen: dict[str, measure.RowLoss] = {}
    plain: dict[str, measure.RowLoss] = {}
    pulls: Finding | None = None
    for start in dict.fromkeys(starts[label] for label in trained):
        model, tokenizer, source = open_model(start, engine)
        if texts:
            own = text_loss(model, tokenizer, texts, suite)
            under = {
                label: _under(model, tokenizer, n) for label, n in trained.items() if starts[label] == start
            }
            seen |= {label: loss for label, loss in under.items() if len(loss.nll)}
            plain |= dict.fromkeys(under, own)
        first = next(iter(trained))
        if starts[first] == start and source.quantize is None:
            try:
                pulls = interference(
                    model, tokenizer, _training_rows(trained[first])[:GRADIENT_ROWS], suite.seed
                )
            except UserError as error:
                say(f"template interference is left out: {error}")
        del model
        gc.collect()
    return [findings.shift(seen, plain, suite.seed), pulls]


def empty_cache(label: str, name: str, engine: str, seed: int = 0) -> Finding:
    """Decode a supervised run's own questions with the key/value cache and without: see
    :func:`findings.empty_cache`.
    """
    model, tokenizer, source = open_model(name, engine)
    how: dict[str, Any] = {"template": source.template, "max_tokens": ANSWER}
    rows = _training_rows(name)[:GRADIENT_ROWS]
    proper = [a.tokens for a in measure.answers(model, tokenizer, rows, **how)]
    faulty = measure.answers_without_cache(model, tokenizer, rows, **how)
    del model
    gc.collect()
    return findings.empty_cache(label, proper, faulty, seed)


def drift(base: str, name: str) -> dict[str, float]:
    """|W - W0| / |W0| of every matrix that two models share, by its path in Hugging Face's names; an adapter
    counts as merged.

    A quantised run is left out ({}): its base is rounded, which is no drift. Nothing is written into a run's
    folder.
    """
    if locate(name).quantize:
        return {}
    before, after = (_whole(n) for n in (base, name))
    changed = {}
    for path, weight in after.items():
        start = before.get(path)
        if (
            start is not None
            and start.shape == weight.shape
            and weight.ndim == 2
            and np.linalg.norm(start) > 0
        ):
            changed[path] = float(np.linalg.norm(weight - start) / np.linalg.norm(start))
    return changed


def _whole(name: str) -> dict[str, np.ndarray]:
    """All matrices of a model, those of an adapter merged into its base."""
    source = locate(name)
    if source.adapter is None:
        return _matrices(source.folder)
    with tempfile.TemporaryDirectory() as scratch:
        write_merged(source, Path(scratch))
        return _matrices(Path(scratch))


def _matrices(folder: Path) -> dict[str, np.ndarray]:
    config = hub.check_config(folder)
    weights: dict[str, Any] = {}
    for file in files.weight_files(folder):
        weights.update(arrays.read_float32(folder / file))
    return (
        gpt2.mlx_to_hf(gpt2.hf_to_mlx(weights, config["n_layer"]))
        if config.get("model_type") == "gpt2"
        else weights
    )


def _training_rows(name: str) -> list[Conversation]:
    """The first training rows of a supervised run, [] for anything else."""
    recipe = runs.reopen(name)[1] if runs.is_run(name) else {}
    method = METHODS.get(str(recipe.get("method")))
    if method is None or method.dataset is not row_dataset:
        return []
    data = DataSection(**recipe["data"])
    rows = read_conversations(
        data, split=data.split, limit=min(ROWS, data.limit or ROWS), seed=recipe.get("seed", 0)
    )
    return [row for row in rows if row.templated]


def _under(model: Model, tokenizer: Any, name: str) -> measure.RowLoss:
    data = runs.reopen(name)[1]["data"]
    names = [data["template"]] if isinstance(data["template"], str) else data["template"]
    length = min(data["max_length"], model.context or data["max_length"])
    try:
        examples, _ = encode.encode_all(_training_rows(name), tokenizer, templates=names, max_length=length)
    except UserError:  # none of them fits the base's context
        examples = []
    return measure.response_loss(model, examples)


def interference(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Conversation],
    seed: int = 0,
    names: Sequence[str] = templates.FIVE,
) -> Finding:
    """Whether the gradients of the supervised loss in different templates pull against one another: see
    :func:`findings.interference`.

    Raises UserError for fewer than two rows a part.
    """
    if len(rows) < 2 * PARTS:
        raise UserError(
            f"{len(rows)} training rows are too few to compare gradients on; it takes {2 * PARTS}"
        )
    say(f"gradients of {len(names)} templates on {len(rows)} rows")
    order = np.random.default_rng([seed, 0x9A27]).permutation(len(rows))
    parts = [[rows[i] for i in part] for part in np.array_split(order, PARTS)]
    return findings.interference(names, gradient_products(model, tokenizer, parts, names, seed), seed)


def gradient_products(
    model: Model, tokenizer: Any, parts: Sequence[Sequence[Conversation]], names: Sequence[str], seed: int = 0
) -> np.ndarray:
    """[n, P, n, P] inner products of gradients: entry [i, p, j, q] of template i on part p with template j on
    part q.

    A part's gradient is that of its trained tokens' summed loss, so that those of parts add up to that of
    their rows. At most COORDINATES coordinates, the same random ones for all, are kept. Rows that do not fit
    256 tokens or the context are cut or dropped as in training.
    """
    rng = np.random.default_rng([seed, 0xC002])
    chosen: np.ndarray | None = None
    flat: list[np.ndarray] = []
    for name in names:
        for part in parts:
            examples, report = encode.encode_all(
                part, tokenizer, templates=[name], max_length=min(256, model.context or 256)
            )
            gradient = model.gradient(sft.loss, [batches.collate(examples, model.context)])
            whole = np.concatenate([gradient[key].ravel() for key in sorted(gradient)])
            if chosen is None:
                chosen = (
                    rng.choice(len(whole), COORDINATES, replace=False)
                    if len(whole) > COORDINATES
                    else np.arange(len(whole))
                )
            # the loss is a mean over tokens
            flat.append(whole[chosen] * np.float32(report.trained_tokens))
    stacked = np.stack(flat)
    return (stacked @ stacked.T).astype(np.float64).reshape(len(names), len(parts), len(names), len(parts))
