"""Measure what the findings are drawn from (evaluate/findings.py): models, weights, training rows and logs of any set of runs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import loading, runs, supervised
from mlx_posttrain.convert import arrays, gpt2, hub
from mlx_posttrain.data import batches, encode, templates
from mlx_posttrain.data.types import Conversation
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate import charts, findings, measure
from mlx_posttrain.evaluate.findings import Finding
from mlx_posttrain.evaluate.suite import Comparison, SuiteSection, compare, read_texts
from mlx_posttrain.evaluate.suite import labels_of as suite_labels
from mlx_posttrain.methods import sft
from mlx_posttrain.progress import say
from mlx_posttrain.recipe import DataSection

ROWS = 96  # training rows read for a distribution's shift
GRADIENT_ROWS = 64  # and for the gradients of templates
PARTS = 8  # that those rows are cut into for gradients
SPLITS = 20  # random halvings of the parts
ANSWER = 48  # tokens of the answers that are decoded with the cache and without
COORDINATES = 1_000_000  # of a gradient that are kept: cosines over a random million are those over all to about a thousandth


def root(name: str | Path) -> str:
    """The model that a run's first ancestor started from; a name that is no run is its own root."""
    while runs.is_run(name):
        recipe = runs.reopen(name)[1]
        if recipe.get("method") == "pipeline":
            from mlx_posttrain.methods.pipeline import language_model

            name = language_model(name)
            continue
        if recipe.get("method") == "report":
            raise UserError(f"{name} is a report, not a model: give the runs that it is about")
        made = Path(name) / "start"  # pretrain makes its own
        if recipe["method"] == "pretrain" and made.is_dir():
            return str(made)
        name = recipe["model"]
    return str(name)


def writes_text(name: str | Path) -> bool:
    """Whether a run is a language model rather than a reward model."""
    return not runs.is_run(name) or runs.reopen(name)[1].get("method") != "reward"


def analyze(
    names: Sequence[str], suite: SuiteSection, engine: str = "auto", *, base: str | None = None, labels: Sequence[str] | None = None
) -> tuple[Comparison, list[Finding]]:
    """Compare runs with the model that they started from (``base``, by default the first run's root) and say what it shows.

    Runs of reward models take part with their curves only. Raises UserError where no run writes text.
    """
    names = [str(name) for name in names]
    labels = list(labels) if labels else suite_labels(names)
    writers = [(n, label) for n, label in zip(names, labels, strict=True) if writes_text(n)]
    if not writers:
        raise UserError("none of these runs writes text: give a run of a language model")
    base = base or root(writers[0][0])
    charts.NAMED.set(("base", *labels))
    comparison = compare([base, *(n for n, _ in writers)], suite, engine, ["base", *(label for _, label in writers)])
    found: list[Finding | None] = [findings.forgetting(comparison)]
    found.append(findings.drift({label: drift(base, n) for n, label in writers}))
    model, tokenizer, source = loading.open_model(base, engine)
    trained: dict[str, str] = {}
    for n, label in writers:
        try:
            if _training_rows(n):
                trained[label] = n
        except UserError as error:  # a file that is gone costs its finding, not the whole analysis
            say(f"the training rows of {label} are left out: {error}")
    texts = read_texts(suite.texts, suite.text_limit) if suite.texts else []
    if texts:
        plain = measure.base_text_loss(model, tokenizer, texts, window=suite.window, stride=suite.stride)
        seen = {label: _under(model, tokenizer, n) for label, n in trained.items()}
        found.append(findings.shift({k: (v.nll, v.tokens) for k, v in seen.items() if len(v.nll)}, (plain.nll, plain.tokens)))
        found.append(findings.repetition({m.name: m.continuations for m in comparison.models}))
    if trained and source.quantize is None:
        rows = _training_rows(next(iter(trained.values())))[:GRADIENT_ROWS]
        try:
            found.append(interference(model, tokenizer, rows, suite.seed))
        except UserError as error:
            say(f"template interference is left out: {error}")
    del model
    gc.collect()
    if trained:
        try:
            found.append(empty_cache(*next(iter(trained.items())), engine))
        except UserError as error:  # a question that fills the context
            say(f"decoding without a cache is left out: {error}")
    found.append(
        findings.overfitting({label: runs.Run(Path(n)).metrics() for n, label in zip(names, labels, strict=True) if runs.is_run(n)})
    )
    found.append(findings.loss_and_quality(comparison))
    return comparison, [f for f in found if f is not None]


def empty_cache(label: str, name: str, engine: str) -> Finding:
    """Decode a supervised run's own questions with the key/value cache and without: see :func:`findings.empty_cache`."""
    model, tokenizer, source = loading.open_model(name, engine)
    how: dict[str, Any] = {"template": source.template, "max_tokens": ANSWER}
    rows = _training_rows(name)[:GRADIENT_ROWS]
    proper = [a.tokens for a in measure.answers(model, tokenizer, rows, **how)]
    faulty = measure.answers_without_cache(model, tokenizer, rows, **how)
    del model
    gc.collect()
    return findings.empty_cache(label, proper, faulty)


def drift(base: str, name: str) -> dict[str, float]:
    """|W - W0| / |W0| of every matrix that two models share, by its path in Hugging Face's names; an adapter counts as merged.

    A quantised run is left out ({}): its base is rounded, which is no drift.
    """
    if loading.locate(name).quantize:
        return {}
    before, after = (_matrices(loading.base_folder(n)) for n in (base, name))
    changed = {}
    for path, weight in after.items():
        start = before.get(path)
        if start is not None and start.shape == weight.shape and weight.ndim == 2 and np.linalg.norm(start) > 0:
            changed[path] = float(np.linalg.norm(weight - start) / np.linalg.norm(start))
    return changed


def _matrices(folder: Path) -> dict[str, np.ndarray]:
    config = hub.check_config(folder)
    weights: dict[str, Any] = {}
    for file in files.weight_files(folder):
        weights.update(arrays.read_float32(folder / file))
    return gpt2.mlx_to_hf(gpt2.hf_to_mlx(weights, config["n_layer"])) if config.get("model_type") == "gpt2" else weights


def _training_rows(name: str) -> list[Conversation]:
    """The first training rows of a supervised run, [] for anything else."""
    recipe = runs.reopen(name)[1] if runs.is_run(name) else {}
    if recipe.get("method") not in ("sft", "distill"):
        return []
    data = DataSection(**recipe["data"])
    rows = supervised.read_conversations(data, split=data.split, limit=min(ROWS, data.limit or ROWS), seed=recipe.get("seed", 0))
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
    model: Model, tokenizer: Any, rows: Sequence[Conversation], seed: int = 0, names: Sequence[str] = templates.FIVE
) -> Finding:
    """Cosines between the gradients of the supervised loss in different templates, and in one template on different rows.

    The rows are cut into ``PARTS`` parts, each of which has one gradient in each template; the parts are halved at random ``SPLITS`` times,
    and every entry compares two different halves, so that entries differ in templates alone.
    """
    if len(rows) < 2 * PARTS:
        raise UserError(f"{len(rows)} training rows are too few to compare gradients on; it takes {2 * PARTS}")
    say(f"gradients of {len(names)} templates on {len(rows)} rows")
    rng = np.random.default_rng([seed, 0x1F7E])
    parts = [[rows[i] for i in part] for part in np.array_split(rng.permutation(len(rows)), PARTS)]
    chosen: np.ndarray | None = None
    gradients: list[list[np.ndarray]] = []
    tokens = np.zeros((len(names), PARTS))
    for n, name in enumerate(names):
        gradients.append([])
        for p, part in enumerate(parts):
            examples, report = encode.encode_all(part, tokenizer, templates=[name], max_length=min(256, model.context or 256))
            gradient = model.gradient(sft.loss, [batches.collate(examples, model.context)])
            flat = np.concatenate([gradient[key].ravel() for key in sorted(gradient)])
            if chosen is None:
                chosen = rng.choice(len(flat), COORDINATES, replace=False) if len(flat) > COORDINATES else np.arange(len(flat))
            gradients[-1].append(flat[chosen])
            tokens[n, p] = report.trained_tokens
    stacked = np.stack([np.stack(g) for g in gradients]) * tokens[..., None].astype(np.float32)
    cosines = np.empty((SPLITS, len(names), len(names)))
    for split in range(SPLITS):
        order = rng.permutation(PARTS)
        halves = [stacked[:, half].sum(1, dtype=np.float64) for half in np.array_split(order, 2)]
        a, b = (h / np.linalg.norm(h, axis=1, keepdims=True) for h in halves)
        cosines[split] = a @ b.T
    return findings.interference(names, cosines)
