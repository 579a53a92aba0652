"""From answers to advantages: ``experience`` against loops over tokens, ``measure`` against plain logits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data import batches, pairs
from mlx_posttrain.engines.base import AdamW, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.rl.experience import Parties, experience, measure
from mlx_posttrain.rl.rollouts import Completion, Prompt
from mlx_posttrain.rl.settings import PPOSection, PPOTrainSection

ENGINES = engines.available()
LENGTHS = [3, 1, 5, 4]
STOPPED = [True, False, True, False]
SCORES = np.array([2.5, -0.4, 0.3, -1.7])


def answers(lengths: list[int] = LENGTHS, stopped: list[bool] = STOPPED, seed: int = 0) -> list[Completion]:
    rng = np.random.default_rng(seed)
    return [
        Completion(
            Prompt(tuple(rng.integers(1, 380, 2 + i).tolist()), "q", {}),
            tuple(rng.integers(1, 380, n).tolist()),
            s,
            "a",
        )
        for i, (n, s) in enumerate(zip(lengths, stopped, strict=True))
    ]


def figures() -> dict[str, list[np.ndarray]]:
    """Old log-probabilities, those of another reference, and values, for each token."""
    rng = np.random.default_rng(1)
    return {name: [-rng.exponential(1.0, n) for n in LENGTHS] for name in ("old", "reference", "old_value")}


def by_loops(
    seen, settings: PPOSection, penalty: float | None, fixed: float | None, beta: float, offset: float
):
    """What Ziegler et al. 2019 and Schulman et al. 2016 say, one token at a time: (advantages, returns, final
    scores, KL) by answer.
    """
    final, rewards, advantages = [], [], []
    for i, n in enumerate(LENGTHS):
        score = SCORES[i]
        if not STOPPED[i]:
            score = fixed if fixed is not None else score - (penalty or 0.0)
        if settings.score_clip is not None:
            score = max(-settings.score_clip, min(settings.score_clip, score))
        final.append(score)
        rewards.append(
            [
                -beta * (seen["old"][i][t] - seen["reference"][i][t]) + (score if t == n - 1 else 0.0)
                for t in range(n)
            ]
        )
    flat = [r for row in rewards for r in row]
    if settings.whiten_rewards:
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in flat) / (len(flat) - 1) + 1e-8)
        rewards = [[(r - mean) / deviation + mean for r in row] for row in rewards]
    for i, n in enumerate(LENGTHS):
        values = [v + offset for v in seen["old_value"][i]] + [0.0]
        deltas = [rewards[i][t] + settings.gamma * values[t + 1] - values[t] for t in range(n)]
        advantages.append(
            [
                sum((settings.gamma * settings.lam) ** (k - t) * deltas[k] for k in range(t, n))
                for t in range(n)
            ]
        )
    returns = [
        [advantages[i][t] + seen["old_value"][i][t] + offset for t in range(n)] for i, n in enumerate(LENGTHS)
    ]
    kl = [sum(seen["old"][i][t] - seen["reference"][i][t] for t in range(n)) for i, n in enumerate(LENGTHS)]
    return advantages, returns, final, kl


@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("penalty, fixed", [(None, None), (0.8, None), (1.0, -1.0)])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.7, 0.4)])
def test_experience_is_the_double_loop(clip, whiten, penalty, fixed, gamma, lam):
    settings = PPOSection(gamma=gamma, lam=lam, score_clip=clip, whiten_rewards=whiten)
    beta, offset, given = 0.3, 0.6, figures()
    advantages, returns, final, kl = by_loops(given, settings, penalty, fixed, beta, offset)
    found = experience(answers(), SCORES, given, settings, penalty, beta, offset, missing_eos_score=fixed)

    raw = np.concatenate(advantages)
    whitened = [(np.array(row) - raw.mean()) / math.sqrt(raw.var(ddof=1) + 1e-8) for row in advantages]
    for i in range(len(LENGTHS)):
        assert found.figures["advantage"][i] == pytest.approx(whitened[i])
        # Returns are of the advantages before whitening, and in the critic's own units: without the offset.
        assert found.figures["return"][i] == pytest.approx(np.array(returns[i]) - offset)
        assert found.figures["old"][i] == pytest.approx(given["old"][i])
        assert found.figures["old_value"][i] == pytest.approx(given["old_value"][i])

    wanted, said = np.concatenate(returns), np.concatenate(given["old_value"])
    assert found.statistics == pytest.approx(
        {
            "objective/kl": np.mean(kl),
            "objective/entropy": np.mean([-row.sum() for row in given["old"]]),
            "objective/scores": SCORES.mean(),
            "objective/scores_std": SCORES.std(),
            "objective/non_score_reward": -beta * np.mean(kl),
            "objective/rlhf_reward": np.mean(final) - beta * np.mean(kl),
            "val/explained_variance": 1 - (wanted - said).var() / wanted.var(),
            "val/num_eos_tokens": 2.0,
            "val/eos_share": 0.5,
            "val/length": np.mean(LENGTHS),
            "val/reward_length_correlation": np.corrcoef(SCORES, LENGTHS)[0, 1],
            "val/unscored": 0.0,
        }
    )


def test_an_answer_without_a_score_is_left_out():
    given = figures()
    scores = np.where([False, True, False, False], np.nan, SCORES)
    found = experience(answers(), scores, given, PPOSection(), None, 0.1)
    rest = [0, 2, 3]
    fewer = {name: [rows[i] for i in rest] for name, rows in given.items()}
    alone = experience([answers()[i] for i in rest], SCORES[rest], fewer, PPOSection(), None, 0.1)
    assert found.answers == alone.answers
    assert found.statistics == pytest.approx({**alone.statistics, "val/unscored": 1.0})
    assert all(
        a == pytest.approx(b)
        for n in alone.figures
        for a, b in zip(found.figures[n], alone.figures[n], strict=True)
    )
    with pytest.raises(UserError, match="every reward function returned None"):
        experience(answers(), np.full(4, np.nan), given, PPOSection(), None, 0.1)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def value_at(model, row: tuple[int, ...]) -> float:
    """The head's output at the last token of a row, which nothing follows."""
    return float(
        model.apply(lambda m, b: {"v": m.scores(b)}, [pairs.collate_rows([row], None, 64)])[0]["v"][0]
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_measured_figures_are_those_of_plain_logits(engine, kind, random_gpt2):
    library = engines.get(engine)
    policy, first, critic = library.load(random_gpt2), library.load(random_gpt2), None
    policy.keep_reference()
    if kind == "separate":
        critic = library.load(random_gpt2)
        critic.add_head(initial_head(64, 3))
    else:
        policy.add_head(initial_head(64, 3))
    asked = answers([3, 1, 9, 4], seed=2)
    batch = batches.collate([a.example for a in asked], 64)

    def likelihood(model, device):
        return (-model.logprobs(device) * device.weight).sum() / device.total, {}

    # so that the policy is no longer its reference
    library.trainer(policy, AdamW()).step(likelihood, [batch], 1e-2)
    found = measure(
        Parties(policy, critic, None, None, None),
        asked,
        0.7,
        PPOTrainSection(batch_size=1, token_budget=48),
        64,
    )
    for i, a in enumerate(asked):
        places = range(len(a.question.tokens), len(a.row))
        for name, model in (("old", policy), ("reference", first)):
            logits = softmax(np.asarray(model.full_logits(np.array([a.row], np.int32))[0]) / 0.7)
            assert found[name][i] == pytest.approx([logits[t - 1, a.row[t]] for t in places], abs=2e-5), name
        # A token's value is what the critic says before it, reading the prompt and the tokens up to there.
        wanted = [value_at(critic or policy, a.row[:t]) for t in places]
        assert found["old_value"][i] == pytest.approx(wanted, abs=2e-5)
    assert any(
        not np.allclose(a, b, atol=1e-2) for a, b in zip(found["old"], found["reference"], strict=True)
    )
    assert np.ptp(np.concatenate(found["old_value"])) > 0.1


def test_answers_are_measured_in_batches_larger_than_those_of_training():
    """No gradient, so four times the rows and, where there is one, four times the budget of tokens."""

    class Policy:
        shares_prefixes = False

        def apply(self, function, made):
            self.shapes = [b.tokens.shape for b in made]
            return [
                dict.fromkeys(("old", "reference", "old_value"), np.zeros(len(b.weight), np.float32))
                for b in made
            ]

    first = answers()[0]
    policy, asked = (
        Policy(),
        [dataclasses.replace(first, tokens=(9,) * (32 - len(first.question.tokens)))] * 24,
    )
    rows = {None: [8, 8, 8], 64: [8, 8, 8], 32: [4] * 6}  # of 32 tokens each
    for budget, wanted in rows.items():
        measure(
            Parties(policy, None, None, None, None),
            asked,
            1.0,
            PPOTrainSection(batch_size=2, token_budget=budget),
            64,
        )
        assert policy.shapes == [(n, 32) for n in wanted], budget


def test_answers_hold_prompt_and_answer():
    a = dataclasses.replace(answers()[0], question=Prompt((7, 8), "q", {}), tokens=(9, 0))
    assert a.row == (7, 8, 9, 0)
    assert a.example.tokens == a.row and tuple(a.example.trained) == (False, False, True, True)
