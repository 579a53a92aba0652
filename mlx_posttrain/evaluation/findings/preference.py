"""What preference optimisation did: where the margin came from, and whether answers got better or longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_posttrain.evaluation import charts
from mlx_posttrain.evaluation.comparison import LEVEL, Comparison, paired_test
from mlx_posttrain.evaluation.findings.base import Finding, Verdict
from mlx_posttrain.evaluation.metrics import holm

Logs = Mapping[str, Sequence[Mapping[str, Any]]]
MOVED = 1.0  # nats an answer: a smaller change of the mean log-probability is called none
_SIDES = ("eval/logps/chosen", "eval/logps/rejected")


def margin_source(logs: Logs) -> Finding | None:
    """Whether better answers became likelier, or the margin grew by worse ones becoming less likely.

    logs: {run: records of metrics.jsonl}. Logs keep means and not rows, so there are no intervals: a change
    of less than MOVED nats is none. Yes where the better answers of every run became likelier, no where those
    of one became less likely (likelihood displacement: Razin et al. 2024, "Unintentional Unalignment"). None
    without a run that logged both sides twice.
    """
    stats: dict[str, dict[str, float]] = {}
    drawn: dict[str, charts.Curve] = {}
    for name, records in logs.items():
        seen = [r for r in records if all(side in r for side in _SIDES)]
        if len(seen) < 2:
            continue
        chosen, rejected = (seen[-1][side] - seen[0][side] for side in _SIDES)
        stats[name] = {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}
        for side, label in zip(_SIDES, ("better", "worse"), strict=True):
            drawn[f"{name}, {label}"] = ([r["step"] for r in seen], [r[side] for r in seen])
    if not stats:
        return None
    fell = [name for name, s in stats.items() if s["chosen"] < -MOVED]
    rose = [name for name, s in stats.items() if s["chosen"] > MOVED]
    told = [
        f"{name}: the margin grew by {s['margin']:+.1f} nats, better answers {s['chosen']:+.1f} and worse "
        f"ones {s['rejected']:+.1f}"
        for name, s in stats.items()
    ]
    sentence = "; ".join(told) + "."
    if fell:
        sentence += (
            f" In {', '.join(fell)} what was to be preferred became less likely: raise preference.beta, "
            "lower train.lr, or add preference.sft_weight."
        )
    verdict: Verdict = "no" if fell else "yes" if len(rose) == len(stats) else "cannot say"
    chart = charts.curves(drawn, x="step", y="nats an answer", title="Log-probability of held-out answers")
    return Finding("Did better answers become likelier?", sentence, verdict, stats, {"margin_source": chart})


def better_or_longer(comparison: Comparison, logs: Logs) -> Finding | None:
    """Whether runs of preference optimisation answer more questions right than the models they started from.

    Answer length is told beside it: what people and reward models prefer is often what is longer (Singhal et
    al. 2023, "A Long Way to Go"). Sampled answers count where there are any. Verdicts rest on a sign-flip
    test over questions, with Holm's correction for the number of runs. None where no such run was asked.
    """
    trained = {name for name, records in logs.items() if any(_SIDES[0] in r for r in records)}
    runs = [m for m in comparison.models if m.name in trained and "accuracy" in m.values]
    if not runs:
        return None
    stats: dict[str, dict[str, float | None]] = {}
    told, p_values, changes = [], [], []
    for m in runs:
        base = comparison.baseline(m)
        both = m.values.keys() & base.values.keys()
        right = "accuracy_sampled" if "accuracy_sampled" in both else "accuracy"
        length = "length_sampled" if "length_sampled" in both else "length"
        (before, after) = (x.interval(right).mean for x in (base, m))
        change, p = paired_test(m, base, right, comparison.seed)
        p_values.append(p)
        changes.append(change)
        stats[m.name] = {"before": before, "after": after, "change": change, "p": p}
        words = f"{m.name}: right answers {before:.1%} before and {after:.1%} after"
        if length in both:
            tokens = [x.interval(length).mean for x in (base, m)]
            stats[m.name] |= {"length_before": tokens[0], "length_after": tokens[1]}
            words += f", {tokens[0]:.1f} and {tokens[1]:.1f} tokens long"
        told.append(words)
    tested = [i for i, p in enumerate(p_values) if p is not None]
    beyond = dict(zip(tested, holm([float(p_values[i] or 0) for i in tested], LEVEL), strict=True))
    changes = [c if beyond.get(i) else 0.0 for i, c in enumerate(changes)]
    verdict: Verdict = (
        "no" if any(c < 0 for c in changes) else "yes" if all(c > 0 for c in changes) else "cannot say"
    )
    return Finding("Did answers get better, or only longer?", "; ".join(told) + ".", verdict, stats)
