"""Findings about training: weight drift, foreign data, template interference and overfitting."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.comparison import LEVEL, MIN_ROWS
from mlx_posttrain.evaluation.findings.base import Finding, Verdict
from mlx_posttrain.evaluation.likelihood import RowLoss
from mlx_posttrain.evaluation.metrics import Interval, bootstrap, jackknife

ROUNDING = 1e-6  # drift that writing and merging weights in float32 can cause
OVERFIT_RATIO = 1.02  # last held-out loss over the best one, from which on the loss is said to have risen
HALVINGS = 60  # random halves of the rows on which gradients are compared
# a cosine above -SLIGHT_COSINE counts as no conflict: it undoes at most a tenth of one template's step
SLIGHT_COSINE = 0.1


def drift(changes: Mapping[str, Mapping[str, float]]) -> Finding | None:
    """Where weights moved, by layer.

    changes: the relative change of each matrix, ``{model: {parameter path: |W - W0| / |W0|}}`` (Frobenius
    norms). A model without a matrix that can be compared with its base's ({}) is named; where no model has
    one, the verdict is "cannot say". None without models.
    """
    by_layer: dict[str, charts.Curve] = {}
    means = {}
    for name, change in changes.items():
        layers: dict[int, list[float]] = {}
        for path, value in change.items():
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            if numbers:
                layers.setdefault(numbers[0], []).append(value)
        if layers:
            by_layer[name] = (sorted(layers), [float(np.mean(layers[i])) for i in sorted(layers)])
            means[name] = float(np.mean(list(change.values())))
    unknown = [name for name in changes if name not in means]
    left_out = (
        f"No matrix of {', '.join(unknown)} can be compared with its base's (a quantised base is rounded)."
        if unknown
        else ""
    )
    if not by_layer:
        return Finding("Did the weights move, and where?", left_out, "cannot say") if unknown else None
    most = max(means, key=lambda n: means[n])
    layer = int(np.argmax(by_layer[most][1]))
    moved = means[most] > ROUNDING
    sentence = (
        f"{most} moved its weights most: by {means[most]:.2%} of a matrix's norm on average, and by "
        f"{by_layer[most][1][layer]:.2%} in layer {by_layer[most][0][layer]}, which moved most."
        if moved
        else f"No weight of {', '.join(means)} moved."
    )
    chart = charts.curves(
        by_layer, x="layer", y="|W - W0| / |W0|, mean of its matrices", title="Weight drift by layer"
    )
    return Finding(
        "Did the weights move, and where?",
        f"{sentence} {left_out}".strip(),
        "yes" if moved else "cannot say" if unknown else "no",
        {"mean": means},
        {"drift": chart},
    )


def data_shift(
    training: Mapping[str, RowLoss], plain: Mapping[str, RowLoss], seed: int = 0
) -> Finding | None:
    """Whether training answers are foreign to the model that a run started from.

    Compared is the perplexity of their trained tokens with that of base text, both under the run's starting
    model. training: {run: loss of its rows}; plain: {run: loss of base text}. Answers are foreign where the
    two intervals do not overlap, each at level 1 - LEVEL / runs, which is stricter than a test of the
    difference at LEVEL would be. With fewer than MIN_ROWS rows on either side the verdict is "cannot say".
    None without runs.
    """
    if not training:
        return None

    def perplexity(loss: RowLoss) -> Interval:
        level = 1 - LEVEL / len(training)
        return bootstrap(loss.per_token, weights=loss.tokens, transform=np.exp, seed=seed, level=level)

    answers, texts = ({name: perplexity(side[name]) for name in training} for side in (training, plain))
    few = [
        name
        for name in training
        if min((side[name].tokens > 0).sum() for side in (training, plain)) < MIN_ROWS
    ]
    foreign = [name for name in training if name not in few and answers[name].low > texts[name].high]
    most = max(foreign or training, key=lambda name: answers[name].mean / texts[name].mean)
    others = [name for name in foreign if name != most]
    sentence = (
        f"Under the model it started from, the answers that {most} was trained on have a perplexity of "
        f"{answers[most].mean:.1f} [{answers[most].low:.1f}, {answers[most].high:.1f}], and plain text "
        f"one of {texts[most].mean:.1f} [{texts[most].low:.1f}, {texts[most].high:.1f}]: "
        + (
            "the answers are further from what it knows."
            if foreign
            else f"there are too few rows ({MIN_ROWS} are needed)."
            if few
            else "the answers are not further from what it knows."
        )
        + (f" So are those of {', '.join(others)}." if others else "")
    )
    same = len(set(texts.values())) == 1
    bars = {("base text" if same else f"base text, {name}"): texts[name] for name in texts} | answers
    chart = charts.bars(
        bars, y="perplexity under the base", title="Training answers under the base", log=True
    )
    return Finding(
        "Are the training data foreign to the base?",
        sentence,
        "yes" if foreign else "cannot say" if few else "no",
        {"perplexity": answers, "base_text": texts},
        {"shift": chart},
    )


def half_cosines(products: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[n, n] cosines between template i's gradient on some parts of the rows and template j's on others.

    They are means over K ways to choose the parts. products: [n, P, n, P] inner products of the gradients of
    template i on part p and template j on part q, where the gradients of parts add up to that of their rows;
    first, second: [K, P], 1 where a part is in the half. The result is symmetric, because either half may be
    the first.
    """
    across = np.einsum("kp,ipjq,kq->kij", first, products, second, optimize=True)
    norms = [
        np.sqrt(np.einsum("kp,ipiq,kq->ki", half, products, half, optimize=True)) for half in (first, second)
    ]
    cosines = (across / (norms[0][:, :, None] * norms[1][:, None, :])).mean(0)
    return (cosines + cosines.T) / 2


def interference(templates: Sequence[str], products: np.ndarray, seed: int = 0) -> Finding:
    """Whether the gradients of templates conflict.

    For each pair of templates this is the cosine of their gradients on disjoint halves of the rows. products:
    [n, P, n, P], see ``half_cosines``, over P disjoint parts of the rows. The control is the cosine of one
    template with itself over the same halves, which shows the effect of different rows alone. Intervals leave
    out one part at a time (metrics.jackknife) and allow for their number (Bonferroni), so that all hold
    together in 95 of 100 analyses. Yes where a pair's interval lies below 0; no where all lie above
    -SLIGHT_COSINE; otherwise the data cannot say. Raises ValueError for fewer than 4 parts, because a half
    must remain when one part is left out.
    """
    n, parts = products.shape[:2]
    if parts < 4:
        raise ValueError(f"{parts} parts of the rows: a jackknife over halves takes at least 4")
    rng = np.random.default_rng([seed, 0x1F7E])
    first = np.stack([rng.permutation(parts) < parts // 2 for _ in range(HALVINGS)]).astype(np.float64)
    pairs = list(itertools.combinations(range(n), 2))

    def estimates(kept: np.ndarray) -> np.ndarray:
        """Cosines of the pairs, then the distance of each below the mean of its templates' controls."""
        cosines = half_cosines(products, first * kept, (1 - first) * kept)
        of_pairs = np.array([cosines[i, j] for i, j in pairs])
        return np.concatenate(
            [of_pairs, [(cosines[i, i] + cosines[j, j]) / 2 - cosines[i, j] for i, j in pairs]]
        )

    all_parts = estimates(np.ones(parts))
    low, high = jackknife(
        all_parts, np.stack([estimates(1.0 - row) for row in np.eye(parts)]), 1 - LEVEL / len(all_parts)
    )
    intervals = [Interval(*map(float, bounds)) for bounds in zip(all_parts, low, high, strict=True)]
    names = [f"{templates[i]} and {templates[j]}" for i, j in pairs]
    cosine, below = (
        dict(zip(names, part, strict=True)) for part in (intervals[: len(pairs)], intervals[len(pairs) :])
    )
    conflicting = [name for name, c in cosine.items() if c.high < 0]
    verdict: Verdict = (
        "yes"
        if conflicting
        else "no"
        if all(c.low > -SLIGHT_COSINE for c in cosine.values())
        else "cannot say"
    )
    lowest = min(cosine, key=lambda name: cosine[name].mean)
    mean = half_cosines(products, first, 1 - first)
    sentence = (
        "At the base, gradients of two templates on different rows have a cosine of "
        f"{all_parts[: len(pairs)].mean():.2f} on average; it is lowest for {lowest}, "
        f"{cosine[lowest].mean:.2f} [{cosine[lowest].low:.2f}, {cosine[lowest].high:.2f}], and "
        f"{np.diag(mean).mean():.2f} between halves of the rows in one template. "
    )
    if conflicting:
        sentence += f"These pull against each other: {', '.join(conflicting)}."
    elif verdict == "cannot say":
        sentence += "These rows cannot say whether any pull against each other."
    elif any(b.low > 0 for b in below.values()):
        sentence += "They agree less than the control but do not pull against each other."
    else:
        sentence += "They agree as well as random halves of one template do, as far as these rows can show."
    return Finding(
        "Do templates interfere with one another?",
        sentence,
        verdict,
        {"mean": mean.tolist(), "cosine": cosine, "below_control": below, "parts": parts},
        {
            "interference": charts.heatmap(
                mean, templates, templates, title="Cosine of gradients; diagonal: control"
            )
        },
    )


def overfitting(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Finding | None:
    """Whether held-out loss rose after its best evaluation while training went on.

    logs: {run: records of metrics.jsonl}. Logs keep the means of evaluations and not their rows, so there are
    no intervals: a rise is one of more than 2 % (OVERFIT_RATIO), a threshold and not a test. A run needs
    three evaluations for one after its best to exist at all; where no loss rose and a run has fewer, the data
    cannot say. Reward models, whose loss is per pair, have their own chart and gap. None without a run that
    logged a training loss.
    """
    drawn: dict[str, tuple[dict[str, charts.Curve], dict[str, charts.Curve]]] = {
        "per token": ({}, {}),
        "per pair": ({}, {}),
    }
    rose, few, stats = [], [], {}
    for name, records in logs.items():
        train = [(r["step"], r["nll"]) for r in records if "nll" in r and "step" in r]
        held_out = [(r["step"], r["eval/nll"]) for r in records if "eval/nll" in r]
        if not train:
            continue
        few += [name] if len(held_out) < 3 else []
        if len(held_out) < 2:
            continue
        unit = "per pair" if any("margin" in r for r in records) else "per token"
        means, (lines, marks) = smooth(train), drawn[unit]
        lines[name] = ([s for s, _ in means], [v for _, v in means])
        marks[name] = ([s for s, _ in held_out], [v for _, v in held_out])
        best, last = min(h for _, h in held_out), held_out[-1][1]
        train_last = float(np.mean([v for _, v in train[-max(1, len(train) // 10) :]]))
        stats[name] = {"best": best, "last": last, "train_last": train_last, "nats": unit}
        if last > best * OVERFIT_RATIO:
            rose.append(name)
    if not stats and not few:
        return None
    sentences = [
        f"Held-out loss rose by more than 2 % after its best in {', '.join(rose) or 'no run'} (a threshold: "
        "logs keep no rows to test)."
    ]
    if few and not rose:
        sentences.append(f"Evaluated fewer than three times: {', '.join(few)}.")
    for unit in drawn:
        gaps = {name: s["last"] - s["train_last"] for name, s in stats.items() if s["nats"] == unit}
        if gaps:
            widest = max(gaps, key=lambda n: gaps[n])
            ends = (
                f"{stats[widest]['train_last']:.2f} on training rows, {stats[widest]['last']:.2f} on "
                "held-out ones"
            )
            sentences.append(f"Widest gap at the end, in nats {unit}: {widest}, {ends}.")
    shown = {
        name: charts.curves(drawn[unit][0], points=drawn[unit][1], x="step", y=f"nats {unit}", title=title)
        for name, unit, title in (
            ("curves", "per token", "Training (lines) and held-out loss (dots)"),
            ("curves_pairs", "per pair", "The same for reward models"),
        )
        if drawn[unit][0]
    }
    return Finding(
        "Did a run learn its rows by heart?",
        " ".join(sentences),
        "yes" if rose else "cannot say" if few else "no",
        stats,
        shown,
    )


def smooth(points: Sequence[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means over stretches of equally many points, at most ``most`` of them.

    The last stretch begins within the one before it where the points do not divide: a shorter one would look
    less steady than the others.
    """
    values, width = np.asarray(points, np.float64), -(-len(points) // most)
    ends = [*range(width, len(values), width), len(values)]
    parts = [values[max(0, end - width) : end] for end in ends]
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]
