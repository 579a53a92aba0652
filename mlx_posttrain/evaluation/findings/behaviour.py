"""Findings about what models write: forgetting, repetition, decoding, and loss against right answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.comparison import LEVEL, MIN_ROWS, Comparison, paired_test
from mlx_posttrain.evaluation.findings.base import Finding, Verdict
from mlx_posttrain.evaluation.metric_table import METRICS
from mlx_posttrain.evaluation.metrics import bootstrap, holm, proportion, seq_rep_n, sign_flip

# Texts that do not loop before tuning, which a test of repetition needs: if all of only 5 begin to loop, the
# sign-flip test still gives p = .06.
MIN_LOOP_FREE = 6


def forgetting(comparison: Comparison) -> Finding | None:
    """Whether models became worse at base text than the ones they are compared with.

    Perplexities are tested with Holm's correction over the models; KL(base || model) on the same text is
    given as well. None where no two models have a perplexity to compare.
    """
    compared = {
        m.name: (m, d) for m in comparison.models if (d := comparison.difference("perplexity", m)) is not None
    }
    if not compared:
        return None
    perplexity = {m.name: m.interval("perplexity") for m in comparison.models if "perplexity" in m.values}
    worse = [
        name for name, (m, d) in compared.items() if d.mean > 0 and comparison.is_significant("perplexity", m)
    ]
    worst = max(worse or compared, key=lambda name: compared[name][1].mean)
    least = min(compared, key=lambda name: compared[name][1].mean)

    def change(name: str) -> str:
        before = comparison.baseline(compared[name][0]).name
        return f"from {perplexity[before].mean:.1f} ({before}) to {perplexity[name].mean:.1f}"

    rows = min(comparison.paired_rows("perplexity", m) for m, _ in compared.values())
    if worse:
        sentence = f"{worst} forgot most: its perplexity went {change(worst)}"
    elif rows < MIN_ROWS:
        sentence = f"{_too_few(rows)}: perplexity of {worst} went {change(worst)}"
    else:
        sentence = f"No model is worse on base text beyond chance: perplexity of {worst} went {change(worst)}"
    sentence += f"; that of {least} {change(least)}." if least != worst else "."
    drawn = {"perplexity": charts.bars(perplexity, y="perplexity of base text", title="Forgetting", log=True)}
    kl = {m.name: m.interval("kl") for m in comparison.models if "kl" in m.values}
    if kl:
        drawn["kl"] = charts.bars(
            kl, y="KL(base || model), nats per token", title="Distance from the base on plain text"
        )
    return Finding(
        "Was base text forgotten?",
        sentence,
        "yes" if worse else "cannot say" if rows < MIN_ROWS else "no",
        {
            "perplexity": perplexity,
            "nats_minus_base": {name: d for name, (_, d) in compared.items()},
            "kl": kl,
        },
        drawn,
    )


def _too_few(texts: int) -> str:
    return f"{texts} {'text is' if texts == 1 else 'texts are'} too few to tell ({MIN_ROWS} are needed)"


def loop_start(tokens: Sequence[int], longest: int = 16) -> tuple[int, int] | None:
    """(position from which a continuation repeats a block until its end, length of the block), or None.

    The block of a loop has at most ``longest`` tokens and occurs at least three times; the shortest block is
    reported.
    """
    for period in range(1, min(longest, len(tokens) // 3) + 1):
        begin = len(tokens) - period
        while begin > 0 and tokens[begin - 1] == tokens[begin - 1 + period]:
            begin -= 1
        if len(tokens) - begin >= 3 * period:
            return begin, period
    return None


def repetition(comparison: Comparison) -> Finding | None:
    """Whether greedy continuations loop more often than those of the model that each is compared with.

    The continuations are those of the table's repetition: all of equal length, with the end of text
    forbidden. The models are tested with Holm's correction. None where there are no continuations.
    """
    models = [m for m in comparison.models if m.continuations]
    if not models:
        return None
    loops = {m.name: [loop_start(tokens) for tokens in m.continuations] for m in models}
    looping = {
        name: proportion([float(loop is not None) for loop in of_texts], seed=comparison.seed)
        for name, of_texts in loops.items()
    }
    tuned = [
        m
        for m in models
        if comparison.baseline(m) is not m
        and len(m.continuations) == len(comparison.baseline(m).continuations)
    ]
    pairs = [
        np.array(
            [[loop is not None for loop in loops[n]] for n in (m.name, comparison.baseline(m).name)],
            np.float64,
        )
        for m in tuned
    ]
    texts = min(len(m.continuations) for m in models)
    # where nearly all texts loop before tuning, no number of loops after it could differ beyond chance
    saturated = texts >= MIN_ROWS and any(
        sum(loop is None for loop in loops[comparison.baseline(m).name]) < MIN_LOOP_FREE for m in tuned
    )
    enough = texts >= MIN_ROWS and not saturated
    significant = holm([sign_flip(*pair, seed=comparison.seed) for pair in pairs], LEVEL)
    worse = [
        m.name
        for m, pair, differs in zip(tuned, pairs, significant, strict=True)
        if enough and differs and pair[0].sum() > pair[1].sum()
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
    if saturated:
        sentence += ". Nearly all texts loop before tuning, so an increase could not show"
        if any("seq_rep_4_sampled" in m.values for m in models):
            sentence += ": see the table's repetition of sampled text"
    elif tuned and not enough:
        sentence += f". {_too_few(texts)}"
    steps = list(range(max(len(tokens) for m in models for tokens in m.continuations) + 1))
    chart = charts.curves(
        {
            n: (
                steps,
                [sum(loop is not None and loop[0] <= s for loop in of_texts) / len(of_texts) for s in steps],
            )
            for n, of_texts in loops.items()
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
        {"loops": chart},
    )


def empty_cache(
    name: str, cached: Sequence[Sequence[int]], uncached: Sequence[Sequence[int]], seed: int = 0
) -> Finding:
    """Whether one model's greedy answers loop more often without its key/value cache than with it.

    cached, uncached: the answers' tokens. Sampling in training mode with gradient checkpointing on leaves the
    cache empty, and the loops it causes look like an effect of tuning.
    """
    looping = [[float(loop_start(tokens) is not None) for tokens in texts] for texts in (cached, uncached)]
    repeated = [
        [seq_rep_n(tokens, 4) if len(tokens) >= 4 else 0.0 for tokens in texts]
        for texts in (cached, uncached)
    ]
    shares = [proportion(values, seed=seed) for values in looping]
    more = shares[1].mean > shares[0].mean and sign_flip(looping[1], looping[0], seed=seed) <= LEVEL
    stats = {
        kind: {"looping": s, "seq-rep-4": bootstrap(r, seed=seed)}
        for kind, s, r in zip(("with the cache", "without it"), shares, repeated, strict=True)
    }
    chart = charts.bars(
        dict(zip(stats, shares, strict=True)),
        y="share of answers in a loop",
        title=f"{name}, decoded in two ways",
    )
    return Finding(
        "Would a fault of decoding look like a fault of the model?",
        f"The same weights ({name}) on the same {len(cached)} questions: {shares[0].mean:.0%} of greedy "
        f"answers end in a loop, and {shares[1].mean:.0%} where the cache is left empty, so that every token "
        "attends only to the one before it.",
        "cannot say" if len(cached) < MIN_ROWS else "yes" if more else "no",
        stats,
        {"cache": chart},
    )


def loss_and_quality(comparison: Comparison) -> Finding | None:
    """Whether the model with the lower loss can answer fewer questions right.

    A pair of models counts where both differences pass metrics.sign_flip, its p-value being the larger of the
    two (Berger 1982), with Holm's correction over all pairs with MIN_ROWS rows: of twenty sets of equal
    models, one has a pair that counts. None for fewer than two models with a loss and right answers.
    """
    models = [m for m in comparison.models if "response_loss" in m.values and "accuracy" in m.values]
    if len(models) < 2:
        return None
    pairs = list(itertools.combinations(models, 2))
    tests = [
        [paired_test(a, b, metric, comparison.seed) for metric in ("response_loss", "accuracy")]
        for a, b in pairs
    ]
    tested = [i for i, parts in enumerate(tests) if all(p is not None for _, p in parts)]
    significant = holm([max(float(p or 0) for _, p in tests[i]) for i in tested], LEVEL)
    counted = [i for i, differs in zip(tested, significant, strict=True) if differs]
    agree, disagree = 0, []
    for i in counted:
        (a, b), ((loss, _), (accuracy, _)) = pairs[i], tests[i]
        if (loss < 0) == (accuracy > 0):
            agree += 1
        else:
            disagree.append((a.name, b.name) if loss < 0 else (b.name, a.name))
    within_chance, untested = len(tested) - len(counted), len(pairs) - len(tested)
    sentence = (
        f"Of {len(pairs)} pairs of models, the one with the lower loss answers more questions right in "
        f"{agree}"
    )
    if disagree:
        better, worse = disagree[0]
        sentence += (
            f" and fewer in {len(disagree)} (for example {better}, with the lower loss, against {worse})"
        )
    sentence += f"; in {within_chance} the difference is within chance" if within_chance else ""
    sentence += f"; {untested} cannot be told, for fewer than {MIN_ROWS} rows." if untested else "."
    verdict: Verdict = "yes" if disagree else "no" if agree else "cannot say"
    points = {m.name: ([m.interval("response_loss").mean], [m.interval("accuracy").mean]) for m in models}
    chart = charts.scatter(
        points,
        x=METRICS["response_loss"].label + ", nats per token",
        y="right answers",
        title="Loss against answers",
    )
    return Finding(
        "Can a model with a lower loss be the worse one?",
        sentence,
        verdict,
        {"agree": agree, "disagree": disagree, "within_chance": within_chance},
        {"loss_quality": chart},
    )
