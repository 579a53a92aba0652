"""What runs show, each finding a sentence with its figures, a chart, and a verdict: the data support it,
contradict it, or cannot say.

The questions are those that people ask after fine-tuning, and that this project's origin answered without
measuring: what was forgotten, where the weights moved, how foreign the training data are, where greedy
decoding loops, whether templates pull against one another, whether a run fits its rows by heart, and whether
a lower loss makes a better model.

A finding about several models or pairs asks several questions at once. Where it tests them, it does so by
metrics.sign_flip and Holm's correction, so that of twenty reports in which nothing differs one says "yes";
where it draws intervals, those allow for their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mlx_posttrain.evaluate import charts
from mlx_posttrain.evaluate.comparison import LEVEL, METRICS, MIN_ROWS, Comparison, Measured
from mlx_posttrain.evaluate.measure import RowLoss
from mlx_posttrain.evaluate.metrics import Interval, bootstrap, holm, jackknife, seq_rep_n, share, sign_flip

ROUNDING = 1e-6  # of a matrix's size: less is what writing and merging weights in float32 does
ROSE = 1.02  # times its best: what held-out loss must pass to have risen
HALVINGS = 60  # random halves of the rows that gradients are compared on
# a cosine nearer to 0 than this is taken for none: a tenth of one template's step is undone at most
SLIGHT = 0.1

Verdict = Literal["yes", "no", "cannot say"]


@dataclass
class Finding:
    """A question, what was found in one sentence, whether the data bear it out, the figures, and charts by
    name.
    """

    question: str
    sentence: str
    verdict: Verdict
    figures: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Without the charts, for JSON."""
        return {
            "question": self.question,
            "sentence": self.sentence,
            "verdict": self.verdict,
            "figures": self.figures,
        }


def forgetting(comparison: Comparison) -> Finding | None:
    """Perplexity of base text, every model against the one it is compared with (Holm over the models), and
    KL(base || model) on that text.

    None where no two models have a perplexity to compare.
    """
    gaps = {
        m.name: (m, d) for m in comparison.models if (d := comparison.difference("perplexity", m)) is not None
    }
    if not gaps:
        return None
    figures = {m.name: m.figure("perplexity") for m in comparison.models if "perplexity" in m.values}
    lost = [name for name, (m, d) in gaps.items() if d.mean > 0 and comparison.sure("perplexity", m)]
    worst = max(lost or gaps, key=lambda name: gaps[name][1].mean)
    least = min(gaps, key=lambda name: gaps[name][1].mean)

    def way(name: str) -> str:
        before = comparison.baseline(gaps[name][0]).name
        return f"from {figures[before].mean:.1f} ({before}) to {figures[name].mean:.1f}"

    sentence = f"{worst} forgot most" if lost else "No model is worse at base text beyond chance"
    sentence += f": perplexity {'went' if lost else f'of {worst}'} {way(worst)}" + (
        f"; {least} {way(least)}." if least != worst else "."
    )
    drawn = {"perplexity": charts.bars(figures, y="perplexity of base text", title="Forgetting", log=True)}
    kl = {m.name: m.figure("kl") for m in comparison.models if "kl" in m.values}
    if kl:
        drawn["kl"] = charts.bars(
            kl, y="KL(base || model), nats a token", title="Distance from the base on plain text"
        )
    enough = all(comparison.rows("perplexity", m) >= MIN_ROWS for m, _ in gaps.values())
    return Finding(
        "Was base text forgotten?",
        sentence,
        "yes" if lost else "no" if enough else "cannot say",
        {"perplexity": figures, "nats_minus_base": {name: d for name, (_, d) in gaps.items()}, "kl": kl},
        drawn,
    )


def drift(changes: Mapping[str, Mapping[str, float]]) -> Finding | None:
    """Where weights moved: relative change of each matrix, ``{model: {parameter path: |W - W0| / |W0|}}``
    (Frobenius).

    A model without a matrix that can be held against its base's ({}) is named; where no model has one, the
    data cannot say.
    """
    by_layer: dict[str, charts.Curve] = {}
    totals = {}
    for name, change in changes.items():
        layers: dict[int, list[float]] = {}
        for path, value in change.items():
            numbers = [int(part) for part in path.split(".") if part.isdigit()]
            if numbers:
                layers.setdefault(numbers[0], []).append(value)
        if layers:
            by_layer[name] = (sorted(layers), [float(np.mean(layers[i])) for i in sorted(layers)])
            totals[name] = float(np.mean(list(change.values())))
    unknown = [name for name in changes if name not in totals]
    left_out = (
        f"No matrix of {', '.join(unknown)} can be held against its base's (a quantised base is rounded)."
        if unknown
        else ""
    )
    if not by_layer:
        return Finding("Did the weights move, and where?", left_out, "cannot say") if unknown else None
    most = max(totals, key=lambda n: totals[n])
    layer = int(np.argmax(by_layer[most][1]))
    moved = totals[most] > ROUNDING
    sentence = (
        f"{most} moved its weights most, {totals[most]:.2%} of a matrix's size on average, and layer "
        f"{by_layer[most][0][layer]} "
        f"the most, {by_layer[most][1][layer]:.2%}."
        if moved
        else f"No weight of {', '.join(totals)} moved."
    )
    chart = charts.curves(
        by_layer, x="layer", y="|W - W0| / |W0|, mean of its matrices", title="Weight drift by layer"
    )
    return Finding(
        "Did the weights move, and where?",
        f"{sentence} {left_out}".strip(),
        "yes" if moved else "cannot say" if unknown else "no",
        {"mean": totals},
        {"drift": chart},
    )


def shift(training: Mapping[str, RowLoss], plain: Mapping[str, RowLoss], seed: int = 0) -> Finding | None:
    """How foreign training rows are: perplexity of their trained tokens under the model the run started from,
    beside that of base text.

    training: {run: loss of its rows}; plain: {run: loss of base text}, both under the run's own start. Rows
    are foreign where the two intervals have nothing in common, each at 1 - LEVEL / runs, which is stricter
    than a test of the difference at LEVEL would be. With fewer than MIN_ROWS rows on either side the data
    cannot say.
    """
    if not training:
        return None

    def perplexity(loss: RowLoss) -> Interval:
        level = 1 - LEVEL / len(training)
        return bootstrap(loss.per_token, weights=loss.tokens, of=np.exp, seed=seed, level=level)

    figures, texts = ({name: perplexity(side[name]) for name in training} for side in (training, plain))
    few = [
        name
        for name in training
        if min((side[name].tokens > 0).sum() for side in (training, plain)) < MIN_ROWS
    ]
    foreign = [name for name in training if name not in few and figures[name].low > texts[name].high]
    most = max(foreign or training, key=lambda name: figures[name].mean / texts[name].mean)
    others = [name for name in foreign if name != most]
    sentence = (
        f"To the model it started from, the answers that {most} was trained on have a perplexity of "
        f"{figures[most].mean:.1f} "
        f"[{figures[most].low:.1f}, {figures[most].high:.1f}], plain text {texts[most].mean:.1f} "
        f"[{texts[most].low:.1f}, {texts[most].high:.1f}]: "
        + (
            "they are further from what it knows."
            if foreign
            else f"too few rows ({MIN_ROWS} are needed)."
            if few
            else "they are not further from what it knows."
        )
        + (f" So are those of {', '.join(others)}." if others else "")
    )
    same = len(set(texts.values())) == 1
    bars = {("base text" if same else f"base text, {name}"): texts[name] for name in texts} | figures
    chart = charts.bars(
        bars, y="perplexity under the base", title="Training answers as the base sees them", log=True
    )
    return Finding(
        "Are the training data foreign to the base?",
        sentence,
        "yes" if foreign else "cannot say" if few else "no",
        {"perplexity": figures, "base_text": texts},
        {"shift": chart},
    )


def loop_start(tokens: Sequence[int], most: int = 16) -> tuple[int, int] | None:
    """(position from which a continuation repeats a block until its end, length of the block), or None.

    A loop has a block of at most ``most`` tokens and goes round at least three times; the shortest block is
    reported.
    """
    for period in range(1, min(most, len(tokens) // 3) + 1):
        same = len(tokens) - period
        begin = same
        while begin > 0 and tokens[begin - 1] == tokens[begin - 1 + period]:
            begin -= 1
        if len(tokens) - begin >= 3 * period:
            return begin, period
    return None


# texts without a loop that a start needs: if all of 5 begin to loop, that still has p = .06 by a sign-flip
# test
ROOM = 6


def repetition(comparison: Comparison) -> Finding | None:
    """Where greedy continuations fall into loops, every model against the one it is compared with (Holm over
    the models).

    The continuations are those of the table's repetition: all of one length, the end of text forbidden. None
    where there is none.
    """
    models = [m for m in comparison.models if m.continuations]
    if not models:
        return None
    loops = {m.name: [loop_start(tokens) for tokens in m.continuations] for m in models}
    looping = {
        name: share([float(f is not None) for f in found], seed=comparison.seed)
        for name, found in loops.items()
    }
    tuned = [
        m
        for m in models
        if comparison.baseline(m) is not m
        and len(m.continuations) == len(comparison.baseline(m).continuations)
    ]
    gaps = [
        np.array(
            [[f is not None for f in loops[n]] for n in (m.name, comparison.baseline(m).name)], np.float64
        )
        for m in tuned
    ]
    # A start that loops nearly everywhere leaves no room to be seen in: no count of texts could tell more
    # loops from chance.
    full = any(sum(f is None for f in loops[comparison.baseline(m).name]) < ROOM for m in tuned)
    enough = all(len(m.continuations) >= MIN_ROWS for m in models) and not full
    beyond = holm([sign_flip(*gap, seed=comparison.seed) for gap in gaps], LEVEL)
    worse = [
        m.name
        for m, gap, sure in zip(tuned, gaps, beyond, strict=True)
        if enough and sure and gap[0].sum() > gap[1].sum()
    ]
    first, *others = looping
    sentence = f"Continuing plain text greedily, {first} ends in a loop in {looping[first].mean:.0%} of texts"
    if others:
        most = max(worse or others, key=lambda n: looping[n].mean)
        sentence += f"; {most} in {looping[most].mean:.0%}" + (
            " (more than before, beyond chance)" if worse else ""
        )
        least = min(others, key=lambda n: looping[n].mean)
        sentence += f", {least} in {looping[least].mean:.0%}" if least != most else ""
    if full:
        sentence += (
            ". Nearly all of it loops before tuning, so more could not show: see the table's "
            "repetition of sampled text"
        )
    steps = list(range(max(len(tokens) for m in models for tokens in m.continuations) + 1))
    drawn = charts.curves(
        {
            n: (steps, [sum(f is not None and f[0] <= s for f in found) / len(found) for s in steps])
            for n, found in loops.items()
        },
        x="token of the continuation",
        y="share of texts in a loop",
        title="Where greedy decoding loops",
    )
    return Finding(
        "Did tuning make the model repeat itself?",
        sentence + ".",
        "yes" if worse else "no" if enough else "cannot say",
        {"looping": looping},
        {"loops": drawn},
    )


def empty_cache(
    name: str, proper: Sequence[Sequence[int]], faulty: Sequence[Sequence[int]], seed: int = 0
) -> Finding:
    """Greedy answers of one model with its key/value cache (``proper``) and without (``faulty``): how many
    end in a loop.

    The project's origin sampled in training mode with gradient checkpointing on, which empties the cache, and
    took the loops for an effect of tuning.
    """
    looping = [[float(loop_start(tokens) is not None) for tokens in texts] for texts in (proper, faulty)]
    repeated = [
        [seq_rep_n(tokens, 4) if len(tokens) >= 4 else 0.0 for tokens in texts] for texts in (proper, faulty)
    ]
    shares = [share(values, seed=seed) for values in looping]
    more = shares[1].mean > shares[0].mean and sign_flip(looping[1], looping[0], seed=seed) <= LEVEL
    figures = {
        kind: {"looping": s, "seq-rep-4": bootstrap(r, seed=seed)}
        for kind, s, r in zip(("with the cache", "without it"), shares, repeated, strict=True)
    }
    drawn = charts.bars(
        dict(zip(figures, shares, strict=True)),
        y="share of answers in a loop",
        title=f"{name}, decoded in two ways",
    )
    return Finding(
        "Would a fault of decoding look like a fault of the model?",
        f"The same weights ({name}) on the same {len(proper)} questions: {shares[0].mean:.0%} of greedy "
        "answers end in a loop, and "
        f"{shares[1].mean:.0%} where the cache is left empty, so that every token sees only the one before "
        "it.",
        "cannot say" if len(proper) < MIN_ROWS else "yes" if more else "no",
        figures,
        {"cache": drawn},
    )


def half_cosines(products: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[n, n] cosines between template i's gradient on some parts of the rows and template j's on others, mean
    over K ways to choose.

    products: [n, P, n, P] inner products of the gradients of template i on part p and template j on part q,
    whose sums over parts are those of their rows; first, second: [K, P], 1 where a part is in the half.
    Symmetric, because either half may be the first.
    """
    across = np.einsum("kp,ipjq,kq->kij", first, products, second, optimize=True)
    sizes = [
        np.sqrt(np.einsum("kp,ipiq,kq->ki", half, products, half, optimize=True)) for half in (first, second)
    ]
    cosines = (across / (sizes[0][:, :, None] * sizes[1][:, None, :])).mean(0)
    return (cosines + cosines.T) / 2


def interference(templates: Sequence[str], products: np.ndarray, seed: int = 0) -> Finding:
    """Whether templates pull against one another: for each pair the cosine of their gradients on disjoint
    halves of the rows.

    products: [n, P, n, P], see ``half_cosines``, over P disjoint parts of the rows. The control is the cosine
    of one template with itself, over the same halves: what another draw of rows does alone. Intervals leave
    out one part at a time (metrics.jackknife) and allow for their number (Bonferroni), so that all hold
    together in 95 of 100 analyses. Yes where a pair's interval lies below 0; no where all lie above -SLIGHT;
    else the data cannot say. Raises ValueError for fewer than 4 parts: a half must outlast the loss of one.
    """
    n, parts = products.shape[:2]
    if parts < 4:
        raise ValueError(f"{parts} parts of the rows: a jackknife over halves takes at least 4")
    rng = np.random.default_rng([seed, 0x1F7E])
    first = np.stack([rng.permutation(parts) < parts // 2 for _ in range(HALVINGS)]).astype(np.float64)
    pairs = list(itertools.combinations(range(n), 2))

    def figures(kept: np.ndarray) -> np.ndarray:
        """Cosines of the pairs, then how far each stays below its two templates' own."""
        cosines = half_cosines(products, first * kept, (1 - first) * kept)
        found = np.array([cosines[i, j] for i, j in pairs])
        return np.concatenate(
            [found, [(cosines[i, i] + cosines[j, j]) / 2 - cosines[i, j] for i, j in pairs]]
        )

    whole = figures(np.ones(parts))
    low, high = jackknife(
        whole, np.stack([figures(1.0 - row) for row in np.eye(parts)]), 1 - LEVEL / len(whole)
    )
    found = [Interval(*map(float, bounds)) for bounds in zip(whole, low, high, strict=True)]
    names = [f"{templates[i]} and {templates[j]}" for i, j in pairs]
    cosine, below = (
        dict(zip(names, part, strict=True)) for part in (found[: len(pairs)], found[len(pairs) :])
    )
    against = [name for name, c in cosine.items() if c.high < 0]
    verdict: Verdict = (
        "yes" if against else "no" if all(c.low > -SLIGHT for c in cosine.values()) else "cannot say"
    )
    lowest = min(cosine, key=lambda name: cosine[name].mean)
    mean = half_cosines(products, first, 1 - first)
    sentence = (
        "At the base, gradients of two templates on different rows have a cosine of "
        f"{whole[: len(pairs)].mean():.2f} on average, {lowest} "
        f"the lowest, {cosine[lowest].mean:.2f} [{cosine[lowest].low:.2f}, {cosine[lowest].high:.2f}]; two "
        f"halves of the rows in one template {np.diag(mean).mean():.2f}. "
    )
    if against:
        sentence += f"These pull against each other: {', '.join(against)}."
    elif verdict == "cannot say":
        sentence += "Whether any pull against each other these rows cannot say."
    elif any(b.low > 0 for b in below.values()):
        sentence += "They agree less than the control but do not pull against each other."
    else:
        sentence += "They agree as well as random halves of one template do, as far as these rows can tell."
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
    """Training against held-out loss: whether held-out loss rose after its best evaluation while training
    went on.

    logs: {run: records of metrics.jsonl}. Logs keep the means of evaluations and not their rows, so no
    interval can be had: a rise is one of more than 2 % (ROSE), a threshold and no test. A run needs three
    evaluations for one after its best to be seen at all; where none rose and a run has fewer, the data cannot
    say. Reward models, whose loss is per pair, have a chart and a gap of their own.
    """
    drawn: dict[str, tuple[dict[str, charts.Curve], dict[str, charts.Curve]]] = {
        "a token": ({}, {}),
        "a pair": ({}, {}),
    }
    rose, few, figures = [], [], {}
    for name, records in logs.items():
        train = [(r["step"], r["nll"]) for r in records if "nll" in r and "step" in r]
        held = [(r["step"], r["eval/nll"]) for r in records if "eval/nll" in r]
        if not train:
            continue
        few += [name] if len(held) < 3 else []
        if len(held) < 2:
            continue
        unit = "a pair" if any("margin" in r for r in records) else "a token"
        smooth, (lines, marks) = _smooth(train), drawn[unit]
        lines[name] = ([s for s, _ in smooth], [v for _, v in smooth])
        marks[name] = ([s for s, _ in held], [v for _, v in held])
        best, last = min(h for _, h in held), held[-1][1]
        final = float(np.mean([v for _, v in train[-max(1, len(train) // 10) :]]))
        figures[name] = {"best": best, "last": last, "train_last": final, "nats": unit}
        if last > best * ROSE:
            rose.append(name)
    if not figures and not few:
        return None
    said = [
        f"Held-out loss rose by more than 2 % after its best in {', '.join(rose) or 'no run'} (a threshold: "
        "logs keep no rows to test)."
    ]
    if few and not rose:
        said.append(f"Evaluated fewer than three times: {', '.join(few)}.")
    for unit in drawn:
        gaps = {name: f["last"] - f["train_last"] for name, f in figures.items() if f["nats"] == unit}
        if gaps:
            gap = max(gaps, key=lambda n: gaps[n])
            ends = (
                f"{figures[gap]['train_last']:.2f} on training rows, {figures[gap]['last']:.2f} on "
                "held-out ones"
            )
            said.append(f"Widest gap at the end, in nats {unit}: {gap}, {ends}.")
    shown = {
        name: charts.curves(drawn[unit][0], points=drawn[unit][1], x="step", y=f"nats {unit}", title=title)
        for name, unit, title in (
            ("curves", "a token", "Training (lines) and held-out loss (dots)"),
            ("curves_pairs", "a pair", "The same of reward models"),
        )
        if drawn[unit][0]
    }
    return Finding(
        "Did a run learn its rows by heart?",
        " ".join(said),
        "yes" if rose else "cannot say" if few else "no",
        figures,
        shown,
    )


def _smooth(points: Sequence[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means over equal stretches, at most ``most`` of them."""
    parts = np.array_split(np.asarray(points, np.float64), min(most, len(points)))
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]


def loss_and_quality(comparison: Comparison) -> Finding | None:
    """Whether a lower loss makes a better model: pairs of models that differ in both beyond chance, and
    disagree.

    A pair counts where both differences pass metrics.sign_flip, its p-value being the larger of the two
    (Berger 1982), after Holm's correction over all pairs with MIN_ROWS rows: of twenty sets of equal models,
    one has a pair that counts.
    """
    models = [m for m in comparison.models if "response_loss" in m.values and "accuracy" in m.values]
    if len(models) < 2:
        return None
    pairs = list(itertools.combinations(models, 2))
    both = [
        [_apart(a, b, metric, comparison.seed) for metric in ("response_loss", "accuracy")] for a, b in pairs
    ]
    known = [i for i, parts in enumerate(both) if all(p is not None for _, p in parts)]
    counted = [
        i
        for i, sure in zip(
            known, holm([max(float(p or 0) for _, p in both[i]) for i in known], LEVEL), strict=True
        )
        if sure
    ]
    agree, disagree = 0, []
    for i in counted:
        (a, b), ((loss, _), (right, _)) = pairs[i], both[i]
        if (loss < 0) == (right > 0):
            agree += 1
        else:
            disagree.append((a.name, b.name) if loss < 0 else (b.name, a.name))
    unsure = len(pairs) - len(counted)
    told = (
        f"Of {len(pairs)} pairs of models, the one with the lower loss answers more questions right in "
        f"{agree}"
    )
    if disagree:
        told += (
            f" and fewer in {len(disagree)} (for example {disagree[0][0]}, lower loss, against "
            f"{disagree[0][1]})"
        )
    told += f"; in {unsure} the difference is within chance." if unsure else "."
    verdict: Verdict = "yes" if disagree else "no" if agree else "cannot say"
    points = {m.name: ([m.figure("response_loss").mean], [m.figure("accuracy").mean]) for m in models}
    chart = charts.scatter(
        points,
        x=METRICS["response_loss"].label + ", nats a token",
        y="right answers",
        title="Loss against answers",
    )
    return Finding(
        "Can a model with a lower loss be the worse one?",
        told,
        verdict,
        {"agree": agree, "disagree": disagree, "within_chance": unsure},
        {"loss_quality": chart},
    )


def _apart(a: Measured, b: Measured, metric: str, seed: int) -> tuple[float, float | None]:
    """(sum of the weighted differences a - b, their p-value); None for a p-value where fewer than MIN_ROWS
    rows have both.
    """
    (rows, weights), (others, _) = a.values[metric], b.values[metric]
    if rows.shape != others.shape or np.isfinite(rows - others).sum() < MIN_ROWS:
        return 0.0, None
    total = float(np.nansum((rows - others) * (1.0 if weights is None else weights)))
    return total, sign_flip(rows, others, weights=weights, seed=seed)
