"""Measure what findings are drawn from: models, weights, training rows and logs of any set of runs."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import runs
from mlx_posttrain.config import DataSection
from mlx_posttrain.console import lines_once, log
from mlx_posttrain.convert import arrays, hub, names
from mlx_posttrain.data import batches, encode, mixture, templates
from mlx_posttrain.data.read import read_conversations, row_dataset
from mlx_posttrain.data.split import read_parts
from mlx_posttrain.data.types import Conversation, Example
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import charts, completions, findings, likelihood
from mlx_posttrain.evaluation.best_of import BestOf
from mlx_posttrain.evaluation.comparison import Comparison
from mlx_posttrain.evaluation.findings import Finding
from mlx_posttrain.evaluation.saturation import check_saturation
from mlx_posttrain.evaluation.suite import SuiteSection, compare, model_labels, read_base_texts, text_loss
from mlx_posttrain.methods import METHODS, sft
from mlx_posttrain.models.merge import write_merged
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source, locate, saves_language_model, starting_model

SHIFT_ROWS = 96  # training rows read for the shift of the data
GRADIENT_ROWS = 64  # training rows read for the gradients of templates
GRADIENT_PARTS = 16  # parts that those rows are divided into
CACHE_TOKENS = 48  # tokens of the answers that are decoded with the cache and without
# coordinates of a gradient that are kept: cosines over a random half million equal those over all to about
# .0014
MAX_COORDINATES = 500_000


def is_language_model(name: str | Path) -> bool:
    """Whether a run is a language model rather than a reward model."""
    final = Path(name) / "final"
    return not (runs.is_run(name) and final.is_dir()) or saves_language_model(final)


def add_base(names: Sequence[str], labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and labels with the model that the first run started from, labelled ``base``, unless present.

    It comes last, because the others are compared with the first; a single run is compared with the base. It
    is left out where no run is named and, with a message, where it can no longer be found.
    """
    first = next((name for name in names if runs.is_run(name)), None)
    if first is None or "base" in labels:
        return list(names), list(labels)
    try:
        base = starting_model(first)
        place = locate(base)
    except UserError as error:
        log(f"the base is left out: {error}")
        return list(names), list(labels)
    if _files(place) in [_files(locate(name)) for name in names]:
        return list(names), list(labels)
    return ([base, *names], ["base", *labels]) if len(names) == 1 else ([*names, base], [*labels, "base"])


def _files(source: Source) -> tuple[Path, Path | None]:
    """A model's folders, the same for every way to write their paths."""
    return source.folder.resolve(), source.adapter and source.adapter.resolve()


def comparison_findings(
    comparison: Comparison, logs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Finding]:
    """Findings from a comparison and the runs' logs, for which no model is loaded.

    logs: {label: records of metrics.jsonl}.
    """
    results = [
        findings.forgetting(comparison),
        findings.repetition(comparison),
        check_saturation(comparison),
        findings.overfitting(logs),
        findings.loss_and_quality(comparison),
        findings.margin_source(logs),
        findings.better_or_longer(comparison, logs),
    ]
    return [finding for finding in results if finding is not None]


def read_logs(names: Sequence[str], labels: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Records of metrics.jsonl of the runs among ``names``, by label."""
    return {
        label: runs.Run(Path(name)).metrics()
        for name, label in zip(names, labels, strict=True)
        if runs.is_run(name)
    }


@lines_once()
def analyze(
    names: Sequence[str],
    suite: SuiteSection,
    engine: str = "auto",
    *,
    base: str | None = None,
    labels: Sequence[str] | None = None,
    not_asked: Sequence[str] = (),
    dtype: str | None = None,
    chosen: Mapping[str, BestOf] | None = None,
) -> tuple[Comparison, list[Finding]]:
    """Compare every run with the model that it started from, or all with ``base``, and derive the findings.

    A model that is no run is compared with the model that the first run started from. Of reward models, and
    of runs whose label is in ``not_asked``, only the training curves are used. dtype: of every model; None:
    its own. chosen: as compare. Raises UserError where no other run is left.
    """
    names = [str(name) for name in names]
    labels = list(labels) if labels else model_labels(names)
    compared = [
        (n, label)
        for n, label in zip(names, labels, strict=True)
        if is_language_model(n) and label not in not_asked
    ]
    if not compared:
        left = " but those of not_asked" if any(is_language_model(n) for n in names) else ""
        raise UserError(f"none of these runs{left} writes text: give a run of a language model")
    first = starting_model(next((n for n, _ in compared if runs.is_run(n)), compared[0][0]))
    starts = {label: base or (starting_model(n) if runs.is_run(n) else first) for n, label in compared}
    bases = {
        start: "base" if not place else f"base of {next(label for label in starts if starts[label] == start)}"
        for place, start in enumerate(dict.fromkeys(starts.values()))
    }
    best = [label for name, one in (chosen or {}).items() for label in one.labels(name)]
    charts.SERIES_ORDER.set((*bases.values(), *labels, *best))
    places = [*range(len(bases)), *(list(bases).index(starts[label]) for _, label in compared)]
    comparison = compare(
        [*bases, *(n for n, _ in compared)],
        suite,
        engine,
        [*bases.values(), *(label for _, label in compared)],
        places,
        dtype,
        chosen,
    )
    results: list[Finding | None] = [*comparison_findings(comparison, read_logs(names, labels))]
    results.append(findings.drift({label: weight_changes(starts[label], n) for n, label in compared}))
    supervised: dict[str, str] = {}
    for n, label in compared:
        try:
            if _training_rows(n):
                supervised[label] = n
        except UserError as error:  # a missing file must cost its finding only, not the analysis
            log(f"the training rows of {label} are left out: {error}")
    results += starting_model_findings(supervised, starts, suite, engine, dtype)
    if supervised:
        try:
            results.append(compare_decoding(*next(iter(supervised.items())), engine, suite.seed, dtype))
        except UserError as error:  # a question that fills the context
            log(f"decoding without a cache is left out: {error}")
    return comparison, [finding for finding in results if finding is not None]


def starting_model_findings(
    supervised: Mapping[str, str],
    starts: Mapping[str, str],
    suite: SuiteSection,
    engine: str,
    dtype: str | None = None,
) -> list[Finding | None]:
    """Findings from runs' training rows under the models that the runs started from.

    These are whether the rows are foreign, and whether templates interfere on the rows of the first run.
    supervised: {label: run} with training rows that can be read; starts: {label: the model it started from}.
    """
    texts, _ = read_base_texts(suite)
    training: dict[str, likelihood.RowLoss] = {}
    plain: dict[str, likelihood.RowLoss] = {}
    interference: Finding | None = None
    for start in dict.fromkeys(starts[label] for label in supervised):
        model, tokenizer, source = open_model(start, engine, dtype)
        if texts:
            text = text_loss(model, tokenizer, texts, suite)
            losses = {
                label: _training_loss(model, tokenizer, n)
                for label, n in supervised.items()
                if starts[label] == start
            }
            training |= {label: loss for label, loss in losses.items() if len(loss.nll)}
            plain |= dict.fromkeys(losses, text)
        first = next(iter(supervised))
        if starts[first] == start and source.quantize is None:
            try:
                interference = template_interference(
                    model, tokenizer, _training_rows(supervised[first])[:GRADIENT_ROWS], suite.seed
                )
            except UserError as error:
                log(f"template interference is left out: {error}")
        del model
        gc.collect()
    return [findings.data_shift(training, plain, suite.seed), interference]


def compare_decoding(label: str, name: str, engine: str, seed: int = 0, dtype: str | None = None) -> Finding:
    """Decode a supervised run's training questions with the key/value cache and without.

    See :func:`findings.empty_cache`.
    """
    model, tokenizer, source = open_model(name, engine, dtype)
    options: dict[str, Any] = {"template": source.template, "max_tokens": CACHE_TOKENS}
    rows = _training_rows(name)[:GRADIENT_ROWS]
    cached = [a.tokens for a in completions.generate_answers(model, tokenizer, rows, **options)]
    uncached = completions.generate_without_cache(model, tokenizer, rows, **options)
    del model
    gc.collect()
    return findings.empty_cache(label, cached, uncached, seed)


def weight_changes(base: str, name: str) -> dict[str, float]:
    """|W - W0| / |W0| of every matrix that two models share, by its path in Hugging Face's names.

    An adapter counts as merged. A quantised run gives {}: its base is rounded, which is not drift. Nothing is
    written into a run's folder.
    """
    if locate(name).quantize:
        return {}
    before, after = (_merged_weights(n) for n in (base, name))
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


def _merged_weights(name: str) -> dict[str, np.ndarray]:
    """All weights of a model; an adapter is merged into its base."""
    source = locate(name)
    if source.adapter is None:
        return _read_weights(source.folder)
    with tempfile.TemporaryDirectory() as scratch:
        write_merged(source, Path(scratch))
        return _read_weights(Path(scratch))


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The float32 weights in a folder, by Hugging Face's names."""
    config = hub.check_config(folder)
    weights: dict[str, Any] = {}
    for file in files.weight_files(folder):
        weights.update(arrays.read_float32(folder / file))
    return names.hf_weights(weights, config)


def _training_rows(name: str) -> list[Conversation]:
    """The first templated training rows of a supervised run, at most SHIFT_ROWS; [] for anything else."""
    recipe = runs.reopen(name)[1] if runs.is_run(name) else {}
    method = METHODS.get(str(recipe.get("method")))
    if method is None or method.dataset is not row_dataset:
        return []
    data = DataSection(**recipe["data"])
    data = data.model_copy(update={"limit": min(SHIFT_ROWS, data.limit or SHIFT_ROWS)})
    rows = mixture.interleave(read_parts(data, recipe.get("seed", 0), read_conversations).values())
    return [row for row in rows if row.templated]


def _training_loss(model: Model, tokenizer: Any, name: str) -> likelihood.RowLoss:
    """Loss of a run's training rows under a model; without rows where none fits the model's context."""
    data = DataSection(**runs.reopen(name)[1]["data"])
    length = min(data.max_length, model.context or data.max_length)

    def encoded(rows: list[Conversation], part: DataSection, _: str) -> list[Example]:
        names = [part.template] if isinstance(part.template, str) else part.template
        return encode.encode_all(rows, tokenizer, templates=names, max_length=length)[0] if rows else []

    try:
        examples = mixture.encode_by_source(_training_rows(name), data, encoded)
    except UserError:  # none of them fits the base's context
        examples = []
    return likelihood.response_loss(model, examples)


def template_interference(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Conversation],
    seed: int = 0,
    names: Sequence[str] = templates.FIVE,
) -> Finding:
    """Whether the gradients of the supervised loss conflict between templates.

    See :func:`findings.interference`. Raises UserError for fewer than two rows per part.
    """
    if len(rows) < 2 * GRADIENT_PARTS:
        raise UserError(
            f"{len(rows)} training rows are too few to compare gradients; at least {2 * GRADIENT_PARTS} are "
            "needed"
        )
    log(f"computing gradients of {len(names)} templates on {len(rows)} rows")
    order = np.random.default_rng([seed, 0x9A27]).permutation(len(rows))
    parts = [[rows[i] for i in part] for part in np.array_split(order, GRADIENT_PARTS)]
    return findings.interference(names, gradient_products(model, tokenizer, parts, names, seed), seed)


def gradient_products(
    model: Model, tokenizer: Any, parts: Sequence[Sequence[Conversation]], names: Sequence[str], seed: int = 0
) -> np.ndarray:
    """[n, P, n, P] inner products of the gradients of n templates on P parts of the rows.

    Entry [i, p, j, q] is that of template i on part p with template j on part q. A part's gradient is that of
    its trained tokens' summed loss, so that the gradients of parts add up to that of their rows. At most
    MAX_COORDINATES coordinates are kept, the same random ones for all. Rows that do not fit 256 tokens or the
    context are truncated or dropped as in training.
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
            vector = np.concatenate([gradient[key].ravel() for key in sorted(gradient)])
            if chosen is None:
                chosen = (
                    rng.choice(len(vector), MAX_COORDINATES, replace=False)
                    if len(vector) > MAX_COORDINATES
                    else np.arange(len(vector))
                )
            # the loss is a mean over tokens, and gradients of sums add up
            flat.append(vector[chosen] * np.float32(report.trained_tokens))
    stacked = np.stack(flat)
    return (stacked @ stacked.T).astype(np.float64).reshape(len(names), len(parts), len(names), len(parts))
