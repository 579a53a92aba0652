"""What a policy learned from labelled answers: does its implicit reward tell good answers from bad ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_posttrain.data.types import Judged, Labelled
from mlx_posttrain.evaluation.implicit_reward import compare, first_of_each_prompt, tell
from mlx_posttrain.evaluation.metrics import Interval, paired_bootstrap, proportion
from mlx_posttrain.evaluation.preference import by_group, percent, prompt_numbers, signed
from mlx_posttrain.losses.preference import kto_baseline
from mlx_posttrain.training.session import Session


@dataclass(frozen=True)
class LabelStats:
    """Results of :func:`judge_labels`; shares are of R answers, 0 to 1, and ties count one half.

    The areas under the curve are None where all answers have one label.
    """

    answers: int
    good: int
    accuracy: Interval
    longer: Interval
    over_longer: Interval
    auc: float | None
    longer_auc: float | None

    def lines(self) -> list[str]:
        """The results in words."""
        larger = max(self.good, self.answers - self.good) / self.answers
        text = [
            f"held-out answers: {self.answers}, {self.good} of them good; the reward's sign is right "
            f"{percent(self.accuracy)} (the larger class: {larger:.1%})",
            f"  answers longer than the median are good: {percent(self.longer)}; the model has "
            f"{signed(self.over_longer)}",
        ]
        if self.auc is not None:
            text.append(
                f"  a good answer has the higher reward than a bad one {self.auc:.1%} of the time (AUC), and "
                f"is the longer one {self.longer_auc:.1%}"
            )
        return text


def judge_labels(
    rewards: np.ndarray, rows: Sequence[Labelled], train: Sequence[Labelled], seed: int = 0
) -> LabelStats:
    """Hold rewards of labelled answers to their labels, beside what the answers' length tells.

    rewards: [R], above 0 for an answer taken to be good; train: the training rows, whose median length in
    characters is the baseline's threshold. Intervals are at 95 % over prompts, as
    evaluation.preference.compare_with_baselines has them. The area under the curve is the chance that of a
    good and a bad answer the good one has the higher value (Hanley & McNeil 1982). Raises ValueError for a
    reward that is not finite.
    """
    if not np.all(np.isfinite(rewards)):
        raise ValueError("a reward is not finite, so the model cannot be evaluated")
    good = np.array([row.label for row in rows])
    groups = prompt_numbers(rows)
    lengths = np.array([len(row.completion) for row in rows], np.float64)
    beyond = lengths - float(np.median([len(row.completion) for row in train]))
    right, longer = (_agreement(values, good) for values in (rewards, beyond))
    (of_model, weight), (of_length, _) = (by_group(values, groups) for values in (right, longer))
    return LabelStats(
        len(rows),
        int(good.sum()),
        proportion(of_model, weights=weight, seed=seed),
        proportion(of_length, weights=weight, seed=seed),
        paired_bootstrap(of_model, of_length, weights=weight, seed=seed),
        area_under_curve(rewards, good),
        area_under_curve(lengths, good),
    )


def area_under_curve(values: np.ndarray, good: np.ndarray) -> float | None:
    """Share of (good, bad) pairs in which the good one has the higher value, ties half; None without a pair.

    values: [R]; good: [R] booleans.
    """
    above, below = values[good], np.sort(values[~good])
    if not len(above) or not len(below):
        return None
    beaten = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(beaten.mean() / 2 / len(below))


def _agreement(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """1 where a value has the label's sign, 1/2 where it is 0, else 0."""
    return (1 + np.sign(values) * np.where(good, 1, -1)) / 2


def report(session: Session) -> dict[str, Any]:
    """Judge held-out answers by the implicit reward, sample beside the reference, and write report.json.

    An answer is taken to be good where its log-ratio is above z, as in the loss: z is the mean log-ratio of
    the held-out prompts' mismatched answers, at least 0.
    Returns accuracy, AUC, KL (nats an answer) and answer length (tokens) for result.json; an empty dict
    without held-out answers.
    """
    dataset, recipe = session.dataset, session.recipe
    assert dataset is not None
    items: Sequence[Judged] = dataset.held_out
    if not items:
        return {}
    firsts = first_of_each_prompt(items)
    answers = [*(item.answer for item in items), *(item.mismatched for item in items)]
    beside = compare(session, answers, [item.answer for item in firsts])
    ratios, drifts = np.split(beside.judged - beside.judged_ref, 2)
    baseline = float(kto_baseline(drifts))
    rewards = recipe.kto.beta * (ratios - baseline)
    found = judge_labels(rewards, [item.row for item in items], dataset.train_rows, recipe.seed)
    heading = (
        f"implicit reward, {recipe.kto.beta:g} times an answer's log-ratio to the reference less the "
        f"loss's z, which is {baseline:.2f} nats:"
    )
    wanted = [(item.row.prompt, item.row.completion if item.good else None) for item in firsts]
    figures = tell(
        session,
        {**asdict(found), "z": baseline},
        [heading, *found.lines()],
        beside,
        wanted,
        "A higher kto.beta or kto.desirable_weight counters it",
    )
    auc = {} if found.auc is None else {"auc": found.auc}
    return {"accuracy": found.accuracy.mean, **auc, **figures}
