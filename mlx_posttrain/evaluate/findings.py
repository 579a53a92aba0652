"""What runs show, each finding a sentence with its figures, a chart, and a verdict: the data support it, contradict it, or cannot say.

The questions are those that people ask after fine-tuning, and that this project's origin answered without measuring: what was forgotten,
where the weights moved, how foreign the training data are, where greedy decoding loops, whether templates pull against one another,
whether a run fits its rows by heart, and whether a lower loss makes a better model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mlx_posttrain.evaluate import charts
from mlx_posttrain.evaluate.metrics import Interval, bootstrap, paired_bootstrap, seq_rep_n
from mlx_posttrain.evaluate.suite import METRICS, MIN_ROWS, Comparison

Verdict = Literal["yes", "no", "cannot say"]


@dataclass
class Finding:
    """A question, what was found in one sentence, whether the data bear it out, the figures, and charts by name."""

    question: str
    sentence: str
    verdict: Verdict
    figures: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Without the charts, for JSON."""
        return {"question": self.question, "sentence": self.sentence, "verdict": self.verdict, "figures": self.figures}


def _sure(d: Interval) -> bool:
    return d.low > 0 or d.high < 0


def forgetting(comparison: Comparison) -> Finding | None:
    """Perplexity of base text and KL(base || model) on it, every model against the baseline; None where neither was measured."""
    base, tuned = comparison.models[0], [m for m in comparison.models[1:] if "perplexity" in m.values]
    if not tuned or "perplexity" not in base.values:
        return None
    figures = {m.name: m.figure("perplexity") for m in [base, *tuned]}
    gaps = {m.name: comparison.difference("perplexity", m) for m in tuned}
    lost = [m.name for m in tuned if (d := gaps[m.name]) is not None and d.low > 0 and comparison.sure("perplexity", m)]
    enough = np.isfinite(base.values["perplexity"].rows).sum() >= MIN_ROWS
    worst = max(tuned, key=lambda m: figures[m.name].mean)
    least = min(tuned, key=lambda m: figures[m.name].mean)
    sentence = (
        f"Base-text perplexity is {figures[base.name].mean:.1f} for {base.name}; "
        + (f"{worst.name} forgot most ({figures[worst.name].mean:.1f})" if lost else f"no model is worse beyond chance ({worst.name}: {figures[worst.name].mean:.1f})")
        + (f", {least.name} least ({figures[least.name].mean:.1f})." if len(tuned) > 1 else ".")
    )  # fmt: skip
    drawn = {"perplexity": charts.bars(figures, y="perplexity of base text", title="Forgetting", log=True)}
    kl = {m.name: m.figure("kl") for m in tuned if "kl" in m.values}
    if kl:
        drawn["kl"] = charts.bars(kl, y="KL(base || model), nats a token", title="Distance from the base on plain text")
    return Finding(
        "Was base text forgotten?", sentence, "yes" if lost else "no" if enough else "cannot say",
        {"perplexity": figures, "nats_minus_base": gaps, "kl": kl}, drawn,
    )  # fmt: skip


def drift(changes: Mapping[str, Mapping[str, float]]) -> Finding | None:
    """Where weights moved: relative change of each matrix, ``{model: {parameter path: |W - W0| / |W0|}}`` (Frobenius)."""
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
    if not by_layer:
        return None
    first = next(iter(by_layer))
    most = max(totals, key=lambda n: totals[n])
    layer = int(np.argmax(by_layer[most][1]))
    sentence = (
        f"{most} moved its weights most, {totals[most]:.2%} of a matrix's size on average, and layer {by_layer[most][0][layer]} "
        f"the most, {by_layer[most][1][layer]:.2%}."
        if totals[most] > 0
        else f"No weight of {first} moved."
    )
    chart = charts.curves(by_layer, x="layer", y="|W - W0| / |W0|, mean of its matrices", title="Weight drift by layer")
    return Finding("Did the weights move, and where?", sentence, "yes" if totals[most] > 0 else "no", {"mean": totals}, {"drift": chart})


def shift(training: Mapping[str, tuple[np.ndarray, np.ndarray]], base_text: tuple[np.ndarray, np.ndarray]) -> Finding | None:
    """How foreign training rows are to the base: perplexity of their trained tokens under it, beside that of base text.

    training: {run: (nll [R], tokens [R])} under the base; base_text: the same of plain text.
    """
    if not training:
        return None
    plain = bootstrap(base_text[0] / base_text[1], weights=base_text[1], of=np.exp)
    figures = {"base text": plain}
    for name, (nll, tokens) in training.items():
        figures[name] = bootstrap(nll / tokens, weights=tokens, of=np.exp)
    names = [n for n in figures if n != "base text"]
    foreign = [n for n in names if figures[n].low > plain.high]
    most = max(names, key=lambda n: figures[n].mean)
    sentence = (
        f"To the base, the answers that {most} was trained on have a perplexity of {figures[most].mean:.1f} "
        f"[{figures[most].low:.1f}, {figures[most].high:.1f}], plain text {plain.mean:.1f} [{plain.low:.1f}, {plain.high:.1f}]: "
        + ("they are further from what it knows." if foreign else "they are not further from what it knows.")
    )
    chart = charts.bars(figures, y="perplexity under the base", title="Training answers as the base sees them", log=True)
    return Finding(
        "Are the training data foreign to the base?",
        sentence,
        "yes" if foreign else "no",
        {"perplexity": figures},
        {"shift": chart},
    )


def loop_start(tokens: Sequence[int], most: int = 16) -> tuple[int, int] | None:
    """(position from which a continuation repeats a block until its end, length of the block), or None.

    A loop has a block of at most ``most`` tokens and goes round at least three times; the shortest block is reported.
    """
    for period in range(1, min(most, len(tokens) // 3) + 1):
        same = len(tokens) - period
        begin = same
        while begin > 0 and tokens[begin - 1] == tokens[begin - 1 + period]:
            begin -= 1
        if len(tokens) - begin >= 3 * period:
            return begin, period
    return None


def repetition(continuations: Mapping[str, Sequence[Sequence[int]]]) -> Finding | None:
    """Where greedy decoding falls into loops: for each model its continuations, the first model being the baseline."""
    if not continuations or not next(iter(continuations.values())):
        return None
    looping, begins = {}, {}
    for name, texts in continuations.items():
        found = [loop_start(tokens) for tokens in texts]
        looping[name] = bootstrap([float(f is not None) for f in found])
        begins[name] = [f[0] for f in found if f is not None]
    base, *others = continuations
    sentence = f"Continuing plain text greedily, {base} ends in a loop in {looping[base].mean:.0%} of texts"
    worse = []
    for name in others:
        a, b = ([float(loop_start(t) is not None) for t in continuations[n]] for n in (name, base))
        d = paired_bootstrap(a, b)
        worse += [name] if d.low > 0 and len(a) >= MIN_ROWS else []
    if others:
        most = max(others, key=lambda n: looping[n].mean)
        sentence += f"; {most} in {looping[most].mean:.0%}" + (" (more than the base, beyond chance)" if most in worse else "")
        least = min(others, key=lambda n: looping[n].mean)
        sentence += f", {least} in {looping[least].mean:.0%}" if len(others) > 1 else ""
    length = max(len(t) for texts in continuations.values() for t in texts)
    steps = list(range(length + 1))
    drawn = charts.curves(
        {n: (steps, [sum(b <= s for b in begins[n]) / len(continuations[n]) for s in steps]) for n in continuations},
        x="token of the continuation", y="share of texts in a loop", title="Where greedy decoding loops",
    )  # fmt: skip
    return Finding(
        "Did tuning make the model repeat itself?",
        sentence + ".",
        "yes" if worse else "no" if len(continuations[base]) >= MIN_ROWS else "cannot say",
        {"looping": looping},
        {"loops": drawn},
    )


def empty_cache(name: str, proper: Sequence[Sequence[int]], faulty: Sequence[Sequence[int]]) -> Finding:
    """Greedy answers of one model with its key/value cache (``proper``) and without (``faulty``): how many end in a loop.

    The project's origin sampled in training mode with gradient checkpointing on, which empties the cache, and took the loops for an effect
    of tuning.
    """
    looping = [[float(loop_start(tokens) is not None) for tokens in texts] for texts in (proper, faulty)]
    repeated = [[seq_rep_n(tokens, 4) if len(tokens) >= 4 else 0.0 for tokens in texts] for texts in (proper, faulty)]
    share = [bootstrap(values) for values in looping]
    more = paired_bootstrap(looping[1], looping[0])
    figures = {
        kind: {"looping": s, "seq-rep-4": bootstrap(r)}
        for kind, s, r in zip(("with the cache", "without it"), share, repeated, strict=True)
    }
    drawn = charts.bars(dict(zip(figures, share, strict=True)), y="share of answers in a loop", title=f"{name}, decoded in two ways")
    return Finding(
        "Would a fault of decoding look like a fault of the model?",
        f"The same weights ({name}) on the same {len(proper)} questions: {share[0].mean:.0%} of greedy answers end in a loop, and "
        f"{share[1].mean:.0%} where the cache is left empty, so that every token sees only the one before it.",
        "cannot say" if len(proper) < MIN_ROWS else "yes" if more.low > 0 else "no",
        figures,
        {"cache": drawn},
    )


def interference(templates: Sequence[str], cosines: np.ndarray) -> Finding:
    """Whether templates pull against one another: ``cosines`` [K, n, n], entry [k, i, j] the cosine between the gradient of template i on one
    random half of the rows and of template j on the other half. The diagonal is the control, two halves of the rows in one template:
    what random splits alone do.
    """
    n = len(templates)
    same = cosines[:, np.arange(n), np.arange(n)].mean(1)
    off = ~np.eye(n, dtype=bool)
    other = cosines[:, off].mean(1)
    against = float(cosines[:, off].min())
    mean = cosines.mean(0)
    verdict: Verdict = "cannot say" if len(cosines) < 3 else "yes" if other.mean() < 0 else "no"
    sentence = (
        f"At the base, gradients of different templates have a cosine of {other.mean():.2f} on average (lowest {against:.2f}); two halves of the rows in one "
        f"template {same.mean():.2f}. "
        + (
            "Different templates pull against each other."
            if verdict == "yes"
            else "They agree less than the control but do not pull against each other."
            if other.mean() < same.mean() - 2 * float((other - same).std())
            else "They agree as well as random halves of one template do."
        )
    )
    chart = charts.heatmap(mean, templates, templates, title="Cosine of gradients; diagonal: control")
    return Finding(
        "Do templates interfere with one another?",
        sentence,
        verdict,
        {"mean": mean.tolist(), "other": other.tolist(), "same": same.tolist()},
        {"interference": chart},
    )


def overfitting(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Finding | None:
    """Training against held-out loss: whether held-out loss rose after its best evaluation while training went on."""
    lines: dict[str, charts.Curve] = {}
    marks: dict[str, charts.Curve] = {}
    rose, figures = [], {}
    for name, records in logs.items():
        train = [(r["step"], r["nll"]) for r in records if "nll" in r and "step" in r]
        held = [(r["step"], r["eval/nll"]) for r in records if "eval/nll" in r]
        if not train or len(held) < 2:
            continue
        smooth = _smooth(train)
        lines[name] = ([s for s, _ in smooth], [v for _, v in smooth])
        marks[name] = ([s for s, _ in held], [v for _, v in held])
        best, last = min(h for _, h in held), held[-1][1]
        figures[name] = {"best": best, "last": last, "train_last": float(np.mean([v for _, v in train[-max(1, len(train) // 10) :]]))}
        if last > best * 1.02:
            rose.append(name)
    if not lines:
        return None
    gap = max(figures, key=lambda n: figures[n]["last"] - figures[n]["train_last"])
    sentence = (
        f"Held-out loss rose after its best in {', '.join(rose)}. "
        if rose
        else "No run's held-out loss rose by more than 2 % after its best. "
    ) + f"The widest gap at the end: {gap}, {figures[gap]['train_last']:.2f} on training rows, {figures[gap]['last']:.2f} on held-out ones."
    chart = charts.curves(lines, points=marks, x="step", y="nats a token", title="Training (lines) and held-out loss (dots)")
    return Finding("Did a run learn its rows by heart?", sentence, "yes" if rose else "no", figures, {"curves": chart})


def _smooth(points: Sequence[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means over equal stretches, at most ``most`` of them."""
    parts = np.array_split(np.asarray(points, np.float64), min(most, len(points)))
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]


def loss_and_quality(comparison: Comparison) -> Finding | None:
    """Whether a lower loss makes a better model: pairs of models that differ in both beyond chance, and disagree."""
    models = [m for m in comparison.models if "response_loss" in m.values and "accuracy" in m.values]
    if len(models) < 2:
        return None
    agree, disagree, unsure = 0, [], 0
    for a, b in itertools.combinations(models, 2):
        loss = paired_bootstrap(a.values["response_loss"].rows, b.values["response_loss"].rows, weights=a.values["response_loss"].weights)
        right = paired_bootstrap(a.values["accuracy"].rows, b.values["accuracy"].rows)
        few = min(len(a.values["accuracy"].rows), len(a.values["response_loss"].rows)) < MIN_ROWS
        if few or not (_sure(loss) and _sure(right)):
            unsure += 1
        elif (loss.mean < 0) == (right.mean > 0):
            agree += 1
        else:
            low, high = (a, b) if loss.mean < 0 else (b, a)
            disagree.append((low.name, high.name))
    told = f"Of {agree + len(disagree) + unsure} pairs of models, the one with the lower loss answers more questions right in {agree}"
    if disagree:
        told += f" and fewer in {len(disagree)} (for example {disagree[0][0]}, lower loss, against {disagree[0][1]})"
    told += f"; in {unsure} the difference is within chance." if unsure else "."
    verdict: Verdict = "yes" if disagree else "no" if agree else "cannot say"
    points = {m.name: ([m.figure("response_loss").mean], [m.figure("accuracy").mean]) for m in models}
    chart = charts.scatter(points, x=METRICS["response_loss"].label + ", nats a token", y="right answers", title="Loss against answers")
    return Finding(
        "Can a model with a lower loss be the worse one?", told, verdict,
        {"agree": agree, "disagree": disagree, "within_chance": unsure}, {"loss_quality": chart},
    )  # fmt: skip
