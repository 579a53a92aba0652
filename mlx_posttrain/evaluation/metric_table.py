"""The metrics of a comparison: what each is called, which way is better, and what its ceiling is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

#: Metrics per token, which cannot be compared across tokenizers.
PER_TOKEN = (
    "response_loss",
    "perplexity",
    "kl",
    "length",
    "length_sampled",
    *(f"{name}{how}" for name in ("seq_rep_4", "distinct_2", "diversity") for how in ("", "_sampled")),
)


#: For how many answers a question is asked whether one is right, beside the mean, which is pass@1.
PASS_AT = (4, 16)


class Metric(NamedTuple):
    """How a metric is called and written, which way is better, and its best possible value."""

    label: str
    format: str
    better: Literal["higher", "lower", "neither"]
    ceiling: str
    description: str
    # monotone, applied to mean and bounds: exp makes a loss a perplexity
    transform: Callable[[float], float] | None = None
    null_value: float | None = None  # what the metric is compared with where the baseline has none

    @property
    def is_proportion(self) -> bool:
        """Whether it is a proportion; those are the metrics written in per cent."""
        return self.format.endswith("%}")


METRICS: dict[str, Metric] = {
    "accuracy": Metric(
        "right answers",
        "{:.1%}",
        "higher",
        "100 %",
        "greedy answers that the row's rule accepts, on held-out contents",
    ),
    "accuracy_phrasing": Metric(
        "right, unseen phrasing",
        "{:.1%}",
        "higher",
        "100 %",
        "the same on known contents in held-out phrasings",
    ),
    "accuracy_sampled": Metric(
        "right answers, sampled",
        "{:.1%}",
        "higher",
        "100 %",
        "mean over several sampled answers to each question",
    ),
    **{
        f"pass_at_{k}": Metric(
            f"pass@{k}",
            "{:.1%}",
            "higher",
            "100 %",
            f"questions that at least one of {k} sampled answers has right, an unbiased estimate",
        )
        for k in PASS_AT
    },
    "response_loss": Metric(
        "response loss", "{:.3f}", "lower", "0", "nats per token of the expected answers"
    ),
    "perplexity": Metric(
        "base-text perplexity",
        "{:.1f}",
        "lower",
        "1",
        "of plain text, in windows, each token scored once",
        math.exp,
    ),
    "kl": Metric(
        "KL from the baseline",
        "{:.3f}",
        "neither",
        "0: unchanged",
        "KL(baseline || model) on plain text, nats per token",
    ),
    "last_word": Metric(
        "last word", "{:.1%}", "higher", "100 %", "texts whose last word greedy decoding predicts"
    ),
    "last_word_perplexity": Metric(
        "last-word perplexity",
        "{:.1f}",
        "lower",
        "1",
        "exp of the last word's mean negative log-likelihood",
        math.exp,
    ),
    "seq_rep_4": Metric(
        "repetition",
        "{:.3f}",
        "lower",
        "0",
        "share of repeated 4-grams (seq-rep-4) in greedy continuations of equal length, "
        "with the end of text forbidden",
    ),
    "distinct_2": Metric(
        "distinct-2",
        "{:.3f}",
        "higher",
        "1",
        "share of distinct 2-grams in all greedy continuations together: also low where a model "
        "says the same about everything",
    ),
    "diversity": Metric(
        "diversity", "{:.3f}", "higher", "1", "product of 1 - seq-rep-n, n = 2..4, of greedy continuations"
    ),
    "seq_rep_4_sampled": Metric(
        "repetition, sampled",
        "{:.3f}",
        "lower",
        "0",
        "seq-rep-4 of sampled continuations, averaged over those of a text",
    ),
    "distinct_2_sampled": Metric(
        "distinct-2, sampled", "{:.3f}", "higher", "1", "the same for sampled continuations"
    ),
    "diversity_sampled": Metric(
        "diversity, sampled", "{:.3f}", "higher", "1", "diversity of sampled continuations"
    ),
    "coherence": Metric(
        "coherence",
        "{:.1f}",
        "neither",
        "human text's",
        "perplexity of greedy continuations under one judge: above human text they fall apart, below it they "
        "are easier to predict than people's, as repetition is",
        math.exp,
    ),
    "coherence_sampled": Metric(
        "coherence, sampled",
        "{:.1f}",
        "neither",
        "human text's",
        "the same for sampled continuations",
        math.exp,
    ),
    "ended": Metric(
        "ended by itself", "{:.0%}", "neither", "100 %", "greedy answers that ended before the limit"
    ),
    "length": Metric("answer tokens", "{:.1f}", "neither", "the limit", "tokens of the greedy answers"),
    "ended_sampled": Metric(
        "ended, sampled", "{:.0%}", "neither", "100 %", "sampled answers that ended before the limit"
    ),
    "length_sampled": Metric(
        "answer tokens, sampled", "{:.1f}", "neither", "the limit", "tokens of the sampled answers"
    ),
    "score": Metric(
        "reward score",
        "{:+.2f}",
        "higher",
        "none",
        "the reward model's score of the greedy answers; an empty one gets the lowest score of any answer",
    ),
    "wins": Metric(
        "wins, length-controlled",
        "{:.1%}",
        "higher",
        "100 %; baseline 50 %",
        "share of answers that the reward model prefers to the baseline's, at equal length by a logistic fit "
        "in which the effect of length may saturate; an empty one loses; compared with 50 %",
        null_value=0.5,
    ),
}


def one_way_is_better(metric: str) -> str:
    """The name itself, of a metric whose higher or lower values are better; raises ValueError for others."""
    if metric not in METRICS or METRICS[metric].better == "neither":
        known = ", ".join(name for name, row in METRICS.items() if row.better != "neither")
        raise ValueError(f"{metric!r} is no metric of which more or less is better; there are {known}")
    return metric
