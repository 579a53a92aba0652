"""Advantages without a critic: by hand for each baseline and scale, and what a step's metrics say."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mlx_posttrain.errors import UserError
from mlx_posttrain.rl import advantages
from mlx_posttrain.rl.groups import equal_groups, explain, group_experience, shape_scores
from mlx_posttrain.rl.rollouts import Completion, Prompt

#: Two prompts with three answers each: scores 0, 1, 5 and 2, 2, 2.
SCORES = np.array([0.0, 1.0, 5.0, 2.0, 2.0, 2.0])
GROUPS = np.array([0, 0, 0, 1, 1, 1])
LENGTHS = [1, 2, 3, 4, 2, 2]
STOPPED = [True, True, False, False, True, True]


def completions() -> list[Completion]:
    prompts = [Prompt((1, 2), "a", {}), Prompt((3,), "b", {})]
    return [
        Completion(prompts[g], tuple(range(5, 5 + n)), stopped, "x", (-1.0,) * n, int(g))
        for g, n, stopped in zip(GROUPS, LENGTHS, STOPPED, strict=True)
    ]


def stats(reference: bool = False) -> dict[str, list[np.ndarray]]:
    found = {"old_logprobs": [np.full(n, -1.0) for n in LENGTHS]}
    if reference:  # half a nat a token above the reference
        found["ref_logprobs"] = [np.full(n, -1.5) for n in LENGTHS]
    return found


SHAPE = ("missing_eos_penalty", "missing_eos_score", "overlong_buffer")


def experience(scores=SCORES, reference=False, beta=0.0, **settings):
    shape = partial(shape_scores, max_tokens=4, **{k: settings.pop(k) for k in SHAPE if k in settings})
    given = (completions(), np.array(scores), stats(reference), beta)
    return group_experience(*given, shape=shape, **settings)


def gains(found) -> list[float]:
    """Each answer's advantage, which all of its tokens have."""
    values = found.stats["advantages"]
    assert all(len(v) == len(c.tokens) and np.ptp(v) == 0 for v, c in zip(values, found.completions))
    return [float(v[0]) for v in values]


def test_baselines_and_scales_by_hand():
    std = math.sqrt((4 + 1 + 9) / 2)  # of 0, 1, 5 around 2
    of_all = math.sqrt((4 + 1 + 9) / 5)
    none = experience(scale="none")
    assert gains(none) == [-2, -1, 3, 0, 0, 0]
    assert gains(experience(eps=0.5)) == pytest.approx([g / (std + 0.5) for g in (-2, -1, 3)] + [0, 0, 0])
    assert gains(experience(eps=1e-12, ddof=0))[2] == pytest.approx(3 / math.sqrt(14 / 3))
    assert gains(experience(scale="batch", eps=1e-12)) == pytest.approx(
        [g / of_all for g in (-2, -1, 3, 0, 0, 0)]
    )
    # the others' means: 3, 2.5, .5
    assert gains(experience(baseline="leave_one_out", scale="none")) == [-3, -1.5, 4.5, 0, 0, 0]
    assert gains(experience(baseline="global", scale="none")) == [-2, -1, 3, 0, 0, 0]
    # scores of one value have no scale, whatever their distance from a baseline
    same = experience([1.0] * 6, baseline="global", scale="batch", moving=0.5, momentum=0.5)
    assert gains(same) == pytest.approx([0.25] * 6)
    greedy = [
        (replace(completions()[0], text="greedy"), 1.0),
        (replace(completions()[3], text="greedy"), math.nan),
    ]
    # without a score of its own the second group keeps its mean
    assert gains(experience(baseline="greedy", scale="none", greedy=greedy)) == [-1, 0, 4, 0, 0, 0]


def test_rloo_is_grpo_without_deviation_times_its_factor():
    rng = np.random.default_rng(0)
    scores, groups = rng.normal(size=12), np.repeat([4, 9, 2], 4)
    centred = scores - advantages.group_mean(scores, groups)
    assert scores - advantages.leave_one_out(scores, groups) == pytest.approx(centred * 4 / 3)
    alone = advantages.leave_one_out(np.array([3.0, 1.0, 2.0]), np.array([0, 1, 1]))
    assert alone.tolist() == [3.0, 2.0, 1.0]  # an answer alone in its group has an advantage of 0


def test_a_moving_baseline():
    first = experience(baseline="global", scale="none", momentum=0.75)
    assert first.baseline == pytest.approx(2.0)
    later = experience(baseline="global", scale="none", momentum=0.75, moving=6.0)
    assert later.baseline == pytest.approx(0.75 * 6 + 0.25 * 2)
    assert gains(later) == pytest.approx([s - 5 for s in SCORES])
    assert experience().baseline is None


def test_penalties_change_scores_before_they_are_compared():
    # In the reward: beta .5 times half a nat a token.
    found = experience(reference=True, beta=0.5, kl_in_reward=True, baseline="global", scale="none")
    final = SCORES - 0.25 * np.array(LENGTHS)
    assert gains(found) == pytest.approx((final - final.mean()).tolist())
    assert found.kl == pytest.approx(0.5 * np.mean(LENGTHS)) == found.metrics["objective/kl"]
    assert found.metrics["objective/rlhf_reward"] == pytest.approx(final.mean())
    assert "ref_logprobs" not in found.stats and found.metrics["reward"] == SCORES.mean()
    # In the loss: the scores stay, and the loss gets what it needs.
    found = experience(reference=True, beta=0.5, scale="none")
    assert gains(found) == [-2, -1, 3, 0, 0, 0]
    assert found.stats["ref_logprobs"][2].tolist() == [-1.5] * 3 and set(found.stats["beta"][2]) == {0.5}
    # An answer that did not end: the third and the fourth.
    found = experience(missing_eos_penalty=1.5, baseline="global", scale="none")
    assert np.diff(gains(found)).tolist() == pytest.approx(np.diff([0, 1, 3.5, 0.5, 2, 2]).tolist())
    found = experience(missing_eos_score=-4.0, baseline="global", scale="none")
    assert np.diff(gains(found)).tolist() == pytest.approx(np.diff([0, 1, -4, -4, 2, 2]).tolist())
    # Of at most 4 tokens the last 2 cost half a point each.
    assert advantages.overlong_penalty(np.array([1, 2, 3, 4]), 4, 2).tolist() == [0, 0, -0.5, -1]
    found = experience(overlong_buffer=2, baseline="global", scale="none")
    assert np.diff(gains(found)).tolist() == pytest.approx(np.diff([0, 1, 4.5, 1, 2, 2]).tolist())
    # Baselines and deviations are of the same scores: with -4 for the unfinished, 0, 1, -4 and -4, 2, 2.
    found = experience(missing_eos_score=-4.0, eps=1e-12)
    assert gains(found)[0] == pytest.approx((0 + 1) / math.sqrt((1 + 4 + 9) / 2))
    found = experience(missing_eos_score=-4.0, baseline="leave_one_out", scale="none")
    assert gains(found) == pytest.approx([0 + 1.5, 1 + 2, -4 - 0.5, -4 - 2, 2 + 1, 2 + 1])
    unfinished = replace(completions()[0], stopped=False)
    found = experience(
        missing_eos_penalty=3.0,
        baseline="greedy",
        scale="none",
        greedy=[(unfinished, 1.0), (completions()[4], 2.0)],
    )
    assert gains(found) == pytest.approx([0 + 2, 1 + 2, 2 + 2, -1 - 2, 0, 0])
    assert math.isnan(
        shape_scores(np.array([math.nan]), [unfinished], max_tokens=4, missing_eos_score=0.0)[0]
    )


def test_unscored_and_unfinished_answers():
    found = experience([0.0, math.nan, 5.0, math.nan, math.nan, math.nan], scale="none")
    assert [c.text for c in found.completions] == ["x"] * 2 and gains(found) == [-2.5, 2.5]
    assert found.metrics["unscored"] == 4
    found = experience(scale="none", mask_unfinished=True)
    assert gains(found) == [-2, -1, 0, 0] and all(c.stopped for c in found.completions)
    assert found.metrics["completions/clipped_ratio"] == pytest.approx(2 / 6)
    with pytest.raises(UserError, match="no answer of this step could be scored"):
        experience([math.nan] * 6)


def test_a_sampler_that_differs_from_the_trainer():
    sampled = [replace(c, logprobs=(-1.0 - 0.25 * i,) * len(c.tokens)) for i, c in enumerate(completions())]
    found = group_experience(sampled, SCORES, stats(), 0.0, importance_cap=2.0)
    assert all(row.tolist() == [-1.0] * len(row) for row in found.stats["old_logprobs"])  # the trainer's
    weights = [v[0] for v in found.stats["importance"]]
    assert weights == pytest.approx([min(math.exp(0.25 * i), 2.0) for i in range(6)])
    assert found.metrics["sampling/sampling_logp_difference/max"] == pytest.approx(1.25)
    tokens = np.repeat(0.25 * np.arange(6), LENGTHS)
    assert found.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(tokens.mean())
    assert found.metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(1.25))
    assert "importance" not in experience().stats


def test_metrics_and_what_they_mean():
    metrics = experience().metrics
    assert metrics["reward"] == 2 and metrics["frac_reward_zero_std"] == 0.5
    assert metrics["reward_std"] == pytest.approx((math.sqrt(7) + 0) / 2)
    assert [metrics[f"completions/{n}_length"] for n in ("min", "mean", "max")] == [1, 14 / 6, 4]
    assert metrics["completions/mean_terminated_length"] == 7 / 4
    assert equal_groups(SCORES, GROUPS) == {1}
    assert equal_groups(np.array([1.0, math.nan, math.nan, 0.0, 1.0, math.nan]), GROUPS) == {0}


def test_the_sentence_about_equal_rewards():
    def said(*groups: list[float]) -> str:
        return explain(np.concatenate(groups), np.repeat(np.arange(len(groups)), len(groups[0])))

    same, half, wrong = [1.0] * 8, [0.0] * 4 + [1.0] * 4, [0.0] * 8
    assert said(*[wrong] * 31, half) == (
        "all 8 answers of 31 of 32 prompts earn the same reward: nothing can be learned from them; use "
        "easier prompts, more samples or a partial reward"
    )
    assert "use harder prompts," in said(*[same] * 31, half)
    assert "neither too easy nor too hard" in said(*[same] * 16, *[wrong] * 15, half)
    assert said(*[wrong] * 4).endswith("use easier prompts, more samples or a partial reward")
    assert "use harder prompts, or easier ones if these answers are wrong" in said(*[same] * 4)
    assert said(*[wrong] * 3, half) == "" == said(half, half)
    assert experience([1.0] * 6, baseline="global").sentence == ""  # which compares with other prompts
    assert experience([1.0] * 6).sentence.startswith("all 3 answers of 2 of 2 prompts")
    # What is compared counts: a penalty makes equal rewards differ, and one score for all makes them equal.
    assert experience([1.0] * 6, missing_eos_penalty=1.0).metrics["frac_reward_zero_std"] == 0
    assert experience([1.0] * 6, missing_eos_penalty=1.0).sentence == ""
