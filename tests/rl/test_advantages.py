"""Rewards per token, GAE, whitening: by hand, against the definition, against the reference figures."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain.rl.advantages import explained_variance, gae, token_rewards, whiten

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], float)


def junk(x: np.ndarray) -> np.ndarray:
    """The same numbers with nonsense at padding."""
    return np.where(MASK > 0, x, np.nan)


def test_the_score_is_on_the_last_real_token():
    rng = np.random.default_rng(0)
    logp, ref = rng.normal(size=(2, 3, 4))
    rewards = token_rewards(junk(logp), junk(ref), np.array([10.0, 20.0, 30.0]), MASK, beta=0.5)
    wanted = -0.5 * (logp - ref) * MASK
    wanted[0, 2] += 10
    wanted[1, 0] += 20
    wanted[2, 3] += 30
    assert rewards == pytest.approx(wanted)
    with pytest.raises(ValueError, match="answer 1"):
        token_rewards(logp, ref, np.zeros(3), MASK * np.array([[1], [0], [1]]), 0.1)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 3, 4))
    advantages, returns = gae(junk(rewards), junk(values), MASK, gamma, lam)
    for r in range(3):
        n = int(MASK[r].sum())
        v = np.append(values[r, :n], 0.0)
        deltas = rewards[r, :n] + gamma * v[1:] - v[:-1]
        for t in range(n):
            wanted = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
            assert advantages[r, t] == pytest.approx(wanted)
            assert returns[r, t] == pytest.approx(wanted + values[r, t])
        assert not advantages[r, n:].any() and not returns[r, n:].any()


def test_gae_with_lambda_1_is_return_minus_value():
    rewards, values = np.array([[0.0, 0.0, 1.0]]), np.array([[0.2, 0.5, 0.9]])
    advantages, returns = gae(rewards, values, np.ones((1, 3)), 1.0, 1.0)
    assert advantages == pytest.approx(np.array([[0.8, 0.5, 0.1]]))
    assert returns == pytest.approx(np.ones((1, 3)))


def test_whitening_counts_real_tokens_only():
    rng = np.random.default_rng(2)
    values = rng.normal(3.0, 2.0, (3, 4))
    white = whiten(junk(values), MASK)
    real = white[MASK > 0]
    assert real.mean() == pytest.approx(0.0, abs=1e-12)
    assert real.var(ddof=1) == pytest.approx(1.0, rel=1e-6)
    assert not white[MASK == 0].any()
    assert whiten(junk(values), MASK, shift_mean=False)[MASK > 0].mean() == pytest.approx(
        values[MASK > 0].mean()
    )
    one = np.array([[1.0, 0.0]])
    assert whiten(np.array([[5.0, 9.0]]), one).tolist() == [[0.0, 0.0]]
    assert whiten(np.array([[5.0, 5.0]]), np.ones((1, 2))).tolist() == [[0.0, 0.0]]


def test_explained_variance():
    returns = np.array([[1.0, 2.0, 3.0, 99.0]])
    mask = np.array([[1.0, 1.0, 1.0, 0.0]])
    # an offset is no variance
    assert explained_variance(returns + 7.0, returns, mask) == pytest.approx(1.0)
    assert explained_variance(np.zeros((1, 4)), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones((1, 4)), mask) == 0.0
    # whose variance is 2e-34, as their mean is rounded
    assert explained_variance(returns, np.full((1, 4), 0.1), mask) == 0.0
    assert explained_variance(returns, returns, np.zeros((1, 4))) == 0.0


def test_reference_figures(shared):
    """TRL 1.12 scores one slot after the last token where the row is padded; over its own slots its figures
    are ours.
    """
    d = json.loads((shared / "oracle" / "ppo_step.json").read_text())
    config, inputs, wanted = d["config"], d["inputs"], d["outputs"]
    slots, tokens = 1.0 - np.array(wanted["padding_mask_p1"]), 1.0 - np.array(wanted["padding_mask"])
    advantages, returns = gae(
        np.array(wanted["rewards"]), np.array(inputs["values"]), slots, config["gamma"], config["lam"]
    )
    assert advantages == pytest.approx(np.array(wanted["raw_advantages"]) * slots)
    assert returns == pytest.approx(np.array(wanted["returns"]) * slots)
    assert whiten(advantages, tokens) == pytest.approx(np.array(wanted["advantages"]), rel=1e-7)
    # Our rewards are theirs with the score moved back by one slot where there was room.
    scores = np.array(inputs["scores"]) - config["missing_eos_penalty"] * np.array(
        [config["eos"] not in row for row in inputs["responses"]]
    )
    ours = token_rewards(
        np.array(inputs["logp"]), np.array(inputs["ref_logp"]), scores, tokens, config["kl_coef"]
    )
    theirs = np.array(wanted["rewards"])
    for r, slot in enumerate(wanted["score_index"]):
        last = int(tokens[r].sum()) - 1
        if slot != last:
            theirs[r, last] += theirs[r, slot]
            theirs[r, slot] = 0.0
    assert ours == pytest.approx(theirs)
