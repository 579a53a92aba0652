"""From completions to advantages: ``experience`` against loops over tokens, ``measure`` against logits."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data import batches, pairs
from mlx_posttrain.engines.base import AdamW, AdapterSpec, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.rl.config import RolloutTrainSection
from mlx_posttrain.rl.experience import Actors, experience, measure
from mlx_posttrain.rl.rollouts import Completion, Prompt, sample

ENGINES = engines.available()
LENGTHS = [3, 1, 5, 4]
STOPPED = [True, False, True, False]
STATS = ("old_logprobs", "ref_logprobs", "old_values")
SCORES = np.array([2.5, -0.4, 0.3, -1.7])


def completions(
    lengths: list[int] = LENGTHS, stopped: list[bool] = STOPPED, seed: int = 0
) -> list[Completion]:
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


def stats() -> dict[str, list[np.ndarray]]:
    """Old log-probabilities, those of another reference, and values, for each token."""
    rng = np.random.default_rng(1)
    return {name: [-rng.exponential(1.0, n) for n in LENGTHS] for name in STATS}


def by_loops(
    given, beta, offset, *, gamma, lam, whiten_rewards, score_clip, missing_eos_penalty, missing_eos_score
):
    """What Ziegler et al. 2019 and Schulman et al. 2016 say, one token at a time: (advantages, returns, final
    scores, KL) by completion.
    """
    final, rewards, advantages = [], [], []
    for i, n in enumerate(LENGTHS):
        score = SCORES[i]
        if not STOPPED[i]:
            score = (
                missing_eos_score if missing_eos_score is not None else score - (missing_eos_penalty or 0.0)
            )
        if score_clip is not None:
            score = max(-score_clip, min(score_clip, score))
        final.append(score)
        rewards.append(
            [
                -beta * (given["old_logprobs"][i][t] - given["ref_logprobs"][i][t])
                + (score if t == n - 1 else 0.0)
                for t in range(n)
            ]
        )
    flat = [r for row in rewards for r in row]
    if whiten_rewards:
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in flat) / (len(flat) - 1) + 1e-8)
        rewards = [[(r - mean) / deviation + mean for r in row] for row in rewards]
    for i, n in enumerate(LENGTHS):
        values = [v + offset for v in given["old_values"][i]] + [0.0]
        deltas = [rewards[i][t] + gamma * values[t + 1] - values[t] for t in range(n)]
        advantages.append([sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
    returns = [
        [advantages[i][t] + given["old_values"][i][t] + offset for t in range(n)]
        for i, n in enumerate(LENGTHS)
    ]
    kl = [
        sum(given["old_logprobs"][i][t] - given["ref_logprobs"][i][t] for t in range(n))
        for i, n in enumerate(LENGTHS)
    ]
    return advantages, returns, final, kl


@pytest.mark.parametrize("clip", [None, 0.9])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("penalty, fixed", [(None, None), (0.8, None), (1.0, -1.0)])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.7, 0.4)])
def test_experience_is_the_double_loop(clip, whiten, penalty, fixed, gamma, lam):
    settings = {"gamma": gamma, "lam": lam, "score_clip": clip, "whiten_rewards": whiten}
    settings |= {"missing_eos_penalty": penalty, "missing_eos_score": fixed}
    beta, offset, given = 0.3, 0.6, stats()
    advantages, returns, final, kl = by_loops(given, beta, offset, **settings)
    found = experience(completions(), SCORES, given, beta, offset, **settings)

    raw = np.concatenate(advantages)
    whitened = [(np.array(row) - raw.mean()) / math.sqrt(raw.var(ddof=1) + 1e-8) for row in advantages]
    for i in range(len(LENGTHS)):
        assert found.stats["advantages"][i] == pytest.approx(whitened[i])
        # Returns are of the advantages before whitening, and in the critic's own units: without the offset.
        assert found.stats["returns"][i] == pytest.approx(np.array(returns[i]) - offset)
        assert found.stats["old_logprobs"][i] == pytest.approx(given["old_logprobs"][i])
        assert found.stats["old_values"][i] == pytest.approx(given["old_values"][i])

    wanted, predicted = np.concatenate(returns), np.concatenate(given["old_values"])
    assert found.metrics == pytest.approx(
        {
            "objective/kl": np.mean(kl),
            "objective/entropy": np.mean([-row.sum() for row in given["old_logprobs"]]),
            "objective/scores": SCORES.mean(),
            "objective/scores_std": SCORES.std(),
            "objective/non_score_reward": -beta * np.mean(kl),
            "objective/rlhf_reward": np.mean(final) - beta * np.mean(kl),
            "val/explained_variance": 1 - (wanted - predicted).var() / wanted.var(),
            "val/num_eos_tokens": 2.0,
            "val/eos_share": 0.5,
            "val/length": np.mean(LENGTHS),
            "val/reward_length_correlation": np.corrcoef(SCORES, LENGTHS)[0, 1],
            "val/unscored": 0.0,
        }
    )


def test_a_completion_without_a_score_is_left_out():
    given = stats()
    scores = np.where([False, True, False, False], np.nan, SCORES)
    found = experience(completions(), scores, given, 0.1)
    rest = [0, 2, 3]
    fewer = {name: [rows[i] for i in rest] for name, rows in given.items()}
    alone = experience([completions()[i] for i in rest], SCORES[rest], fewer, 0.1)
    assert found.completions == alone.completions
    assert found.metrics == pytest.approx({**alone.metrics, "val/unscored": 1.0})
    assert all(
        a == pytest.approx(b)
        for n in alone.stats
        for a, b in zip(found.stats[n], alone.stats[n], strict=True)
    )
    with pytest.raises(UserError, match="every reward function returned None"):
        experience(completions(), np.full(4, np.nan), given, 0.1)


@pytest.mark.parametrize("reference", [True, False])
def test_without_a_critic_the_values_are_0(reference):
    """By hand, with gamma * lambda = 1/4: rewards (-.05, .1, 2) and (-1.1), without a reference (0, 0, 2) and
    (-1).
    """
    old = [np.array([-1.0, -2.0, -0.5]), np.array([-1.0])]
    given = {"old_logprobs": old}
    if reference:
        given["ref_logprobs"] = [np.array([-1.5, -1.0, -0.5]), np.array([-2.0])]
    asked = completions([3, 1], [True, True])
    found = experience(asked, np.array([2.0, -1.0]), given, 0.1, gamma=0.5, lam=0.5)
    raw = [[0.1, 0.6, 2.0], [-1.1]] if reference else [[0.125, 0.5, 2.0], [-1.0]]
    mean = 0.4 if reference else 0.40625
    deviation = math.sqrt(sum((a - mean) ** 2 for row in raw for a in row) / 3 + 1e-8)
    assert set(found.stats) == {"old_logprobs", "advantages"}
    for i in range(2):
        assert found.stats["old_logprobs"][i].tolist() == old[i].tolist()
        assert found.stats["advantages"][i] == pytest.approx([(a - mean) / deviation for a in raw[i]])
    assert "val/explained_variance" not in found.metrics
    assert found.metrics["objective/kl"] == pytest.approx(0.25 if reference else 0.0)
    assert found.metrics["objective/rlhf_reward"] == pytest.approx(0.475 if reference else 0.5)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def value_at(model, row: tuple[int, ...]) -> float:
    """The head's output at the last token of a row, which nothing follows."""
    return float(
        model.apply(lambda m, b: {"v": m.scores(b)}, [pairs.collate_scores([row], None, 64)])[0]["v"][0]
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_measured_stats_are_those_of_plain_logits(engine, kind, random_gpt2):
    library = engines.get(engine)
    policy, first, critic = library.load(random_gpt2), library.load(random_gpt2), None
    policy.keep_reference()
    if kind == "separate":
        critic = library.load(random_gpt2)
        critic.add_head(initial_head(64, 3))
    else:
        policy.add_head(initial_head(64, 3))
    asked = completions([3, 1, 9, 4], seed=2)
    batch = batches.collate([a.example for a in asked], 64)

    def likelihood(model, device):
        return (-model.logprobs(device) * device.mask).sum() / device.total, {}

    # so that the policy is no longer its reference
    library.trainer(policy, AdamW()).step(likelihood, [batch], 1e-2)
    found = measure(
        Actors(policy, critic, None, None, None),
        asked,
        0.7,
        RolloutTrainSection(batch_size=1, token_budget=48),
    )
    for i, a in enumerate(asked):
        places = range(len(a.prompt.tokens), len(a.row))
        for name, model in (("old_logprobs", policy), ("ref_logprobs", first)):
            logits = softmax(np.asarray(model.full_logits(np.array([a.row], np.int32))[0]) / 0.7)
            assert found[name][i] == pytest.approx([logits[t - 1, a.row[t]] for t in places], abs=2e-5), name
        # A token's value is what the critic says before it, reading the prompt and the tokens up to there.
        wanted = [value_at(critic or policy, a.row[:t]) for t in places]
        assert found["old_values"][i] == pytest.approx(wanted, abs=2e-5)
    assert any(
        not np.allclose(a, b, atol=1e-2)
        for a, b in zip(found["old_logprobs"], found["ref_logprobs"], strict=True)
    )
    assert np.ptp(np.concatenate(found["old_values"])) > 0.1


def test_what_is_not_there_is_not_measured(random_gpt2):
    """A policy without a head beside no critic has no values, and not every method compares with a
    reference.
    """
    policy = engines.get(ENGINES[0]).load(random_gpt2)
    asked = completions()
    found = measure(Actors(policy, None, None, None, None), asked, 1.0, RolloutTrainSection(), False)
    assert set(found) == {"old_logprobs"}
    policy.keep_reference()
    both = measure(Actors(policy, None, None, None, None), asked, 1.0, RolloutTrainSection())
    assert set(both) == {"old_logprobs", "ref_logprobs"}
    for ours, theirs, first in zip(
        found["old_logprobs"], both["old_logprobs"], both["ref_logprobs"], strict=True
    ):
        assert np.array_equal(ours, theirs) and first == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_float32_samplers_log_probabilities_save_the_policys_pass(engine, dtype, random_gpt2, monkeypatch):
    library = engines.get(engine)
    policy = library.load(random_gpt2, dtype=dtype)
    critic = library.load(random_gpt2)
    critic.add_head(initial_head(64, 0))
    policy.add_adapter(
        AdapterSpec(rank=2, alpha=4.0, targets=("c_attn",)), 0
    )  # whose reference is the model without it
    asked = [Prompt((7, 8, 9 + i), "q", {}) for i in range(3)]
    made = sample(
        policy,
        SimpleNamespace(decode=str),
        asked,
        samples=2,
        max_tokens=6,
        temperature=0.7,
        stop=None,
        seed=0,
        token_budget=99,
    )
    calls = []
    own = type(policy).logprobs
    monkeypatch.setattr(type(policy), "logprobs", lambda *a: calls.append(0) or own(*a))
    train, actors = RolloutTrainSection(), Actors(policy, critic, None, None, None)
    measured = measure(actors, made, 0.7, train)
    assert calls and set(measured) == set(STATS)
    calls.clear()
    taken = measure(actors, made, 0.7, train, sampled=True)
    exact = dtype == "float32"
    assert policy.exact_sampler == exact and bool(calls) != exact and set(taken) == set(measured)
    for name, rows in measured.items():
        for ours, theirs, completion in zip(taken[name], rows, made, strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=2e-6 if exact else 0), name
            if exact and name == "old_logprobs":
                assert np.array_equal(ours, np.array(completion.logprobs, np.float32))


def test_a_critic_on_the_policys_trunk_has_the_policy_measured(random_gpt2):
    policy = engines.get(ENGINES[0]).load(random_gpt2)
    policy.add_head(initial_head(64, 0))
    made = [dataclasses.replace(c, logprobs=(-9.0,) * len(c.tokens)) for c in completions()]
    actors = Actors(policy, None, None, None, None)
    found = measure(actors, made, 1.0, RolloutTrainSection(), False, sampled=True)
    assert set(found) == {"old_logprobs", "old_values"}
    assert all((row > -8).all() for row in found["old_logprobs"])


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs MLX")
@pytest.mark.parametrize(
    ("architecture", "switched", "shortened"),
    [
        ("applegpu_g17s", None, True),
        ("applegpu_g17s", "0", False),
        ("applegpu_g16s", None, False),
        ("", "1", True),
    ],
)
def test_gpus_that_shorten_float32_products_are_no_exact_samplers(
    architecture, switched, shortened, random_gpt2, monkeypatch
):
    from mlx_posttrain.engines.mlx import device

    policy = engines.get("mlx").load(random_gpt2)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device.mx, "device_info", lambda: {"architecture": architecture})
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if switched is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", switched)
    assert policy.exact_sampler is not shortened


def test_completions_are_measured_in_batches_larger_than_those_of_training():
    """No gradient, so four times the rows and, where there is one, four times the budget of tokens."""

    class Policy:
        shares_prefixes, has_head, context = False, False, 64

        def apply(self, function, made):
            self.shapes = [b.tokens.shape for b in made]
            return [dict.fromkeys(STATS, np.zeros(len(b.mask), np.float32)) for b in made]

    first = completions()[0]
    policy, asked = (
        Policy(),
        [dataclasses.replace(first, tokens=(9,) * (32 - len(first.prompt.tokens)))] * 24,
    )
    rows = {None: [8, 8, 8], 64: [8, 8, 8], 32: [4] * 6}  # of 32 tokens each
    for budget, wanted in rows.items():
        measure(
            Actors(policy, None, None, None, None),
            asked,
            1.0,
            RolloutTrainSection(batch_size=2, token_budget=budget),
        )
        assert policy.shapes == [(n, 32) for n in wanted], budget


def test_a_completion_has_a_row_and_an_example():
    a = dataclasses.replace(completions()[0], prompt=Prompt((7, 8), "q", {}), tokens=(9, 0))
    assert a.row == (7, 8, 9, 0)
    assert a.example.tokens == a.row and tuple(a.example.trained) == (False, False, True, True)
