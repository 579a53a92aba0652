"""What is measured of a policy's completions of held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlx_posttrain.data import tasks
from mlx_posttrain.evaluation.metrics import correlation
from mlx_posttrain.rewards.scorer import Scorer
from mlx_posttrain.rl.rollouts import Completion, Stats


def evaluation(
    completions: Sequence[Completion], stats: Stats, scores: np.ndarray, judge: Scorer
) -> dict[str, float]:
    """Means over held-out completions; scores: [R], nan where there is none.

    score; logps: log-probability of a completion in nats; length: in tokens; eos_share: those that ended by
    themselves. With ``ref_logprobs`` also ``kl``, to the reference in nats per completion, with rows that
    have a checker ``accuracy``, with a judge its score.
    """
    lengths = np.array([len(c.tokens) for c in completions], np.float64)
    known = np.isfinite(scores)
    logps = np.array([row.sum() for row in stats["old_logprobs"]])
    metrics = {
        "score": float(scores[known].mean()) if known.any() else float("nan"),
        "logps": float(logps.mean()),
        "length": float(lengths.mean()),
        "eos_share": float(np.mean([c.stopped for c in completions])),
        "score_length_correlation": correlation(scores[known], lengths[known]) if known.any() else 0.0,
    }
    if "ref_logprobs" in stats:
        metrics["kl"] = float((logps - [row.sum() for row in stats["ref_logprobs"]]).mean())
    if all("checker" in c.prompt.columns for c in completions):
        metrics["accuracy"] = float(np.mean([tasks.check(c.prompt.columns, c.text) for c in completions]))
    if judge.entries:
        judged = judge(completions)
        judged = judged[np.isfinite(judged)]
        metrics["judge"] = float(judged.mean()) if len(judged) else float("nan")
    return metrics


def score_by_source(completions: Sequence[Completion], scores: np.ndarray) -> dict[str, float]:
    """Mean score of each source of a mixture, as ``score/NAME``; of one without a score nothing."""
    sources = np.array([c.prompt.source for c in completions])
    found = {}
    for name in dict.fromkeys(sources.tolist()):
        known = scores[(sources == name) & np.isfinite(scores)]
        if name and len(known):
            found[f"score/{name}"] = float(known.mean())
    return found


def describe(metrics: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    texts = {
        "score": "score {:+.3f}",
        "kl": "KL {:.2f}",
        "length": "{:.1f} tokens",
        "eos_share": "ended {:.0%}",
        "accuracy": "right {:.1%}",
        "judge": "judge {:+.3f}",
    }
    return ", ".join(text.format(metrics[name]) for name, text in texts.items() if name in metrics)
