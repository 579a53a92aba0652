"""The PPO losses: hand-worked numbers, gradients under clipping and masking, reference values of TRL 1.12."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlx_posttrain.losses import policy as ppo
from mlx_posttrain.losses.sft import token_logprobs, token_mean
from tests.helpers import array, gradient, indices, libraries, numbers

LIBRARIES = libraries()
RATIOS = [1.0, 1.5, 0.5, 1.5, 0.5]
GAINS = [2.0, 2.0, 2.0, -2.0, -2.0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_policy_loss_by_hand(library):
    old = array(library, [-1.0] * 5)
    new = [-1.0 + math.log(r) for r in RATIOS]
    gain, mask = array(library, GAINS), array(library, np.ones(5))
    # A > 0 gains nothing above ratio 1.2, A < 0 nothing below 0.8; the other sides count in full.
    values = ppo.clipped_policy(array(library, new), old, gain, mask, 0.2)
    assert numbers(values) == pytest.approx([-2.0, -2.4, -1.0, 3.0, 1.6], rel=1e-5)
    # d(-A r)/d logp = -A r, and exactly 0 where the clipped branch counts
    found = gradient(library, lambda v: ppo.clipped_policy(v, old, gain, mask, 0.2), new)
    assert found == pytest.approx([-2.0, 0.0, -1.0, 3.0, 0.0], abs=2e-5)
    seen = ppo.update_statistics(array(library, new), old, gain, mask, 0.2)
    assert numbers(seen["clip_fraction"]).tolist() == [0, 1, 0, 0, 1]
    assert numbers(seen["ratio"]) == pytest.approx(RATIOS, rel=1e-5)
    assert numbers(seen["approx_kl"]) == pytest.approx([0.5 * math.log(r) ** 2 for r in RATIOS], abs=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_value_loss_by_hand(library):
    # Old value 0, return 1, clip .2: a value of .5 is held at .2, whose error is larger; a value of -1 is
    # worse than the one that it is held at.
    values, old, returns = [0.5, -1.0, 0.1], array(library, [0.0] * 3), array(library, [1.0] * 3)
    mask = array(library, np.ones(3))
    found = ppo.clipped_value(array(library, values), old, returns, mask, 0.2)
    assert numbers(found) == pytest.approx([0.5 * 0.8**2, 0.5 * 4.0, 0.5 * 0.9**2], rel=1e-5)
    assert gradient(
        library, lambda v: ppo.clipped_value(v, old, returns, mask, 0.2), values
    ) == pytest.approx([0.0, -2.0, -0.9], abs=1e-5)
    assert numbers(ppo.value_clip_fraction(array(library, values), old, returns, mask, 0.2)).tolist() == [
        1,
        0,
        0,
    ]
    plain = ppo.clipped_value(array(library, values), old, returns, mask, None)
    assert numbers(plain) == pytest.approx([0.125, 2.0, 0.405], rel=1e-5)
    assert numbers(ppo.value_clip_fraction(array(library, values), old, returns, mask, None)).tolist() == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("library", LIBRARIES)
def test_garbage_at_padding_reaches_nothing(library):
    mask = array(library, [1.0, 0.0, 0.0, 0.0])
    new = [-1.1, np.nan, 1e30, np.inf]
    old = array(library, [-1.0, -np.inf, -1e30, np.nan])
    gain = array(library, [1.5, np.inf, np.nan, 1e30])
    values = numbers(ppo.clipped_policy(array(library, new), old, gain, mask))
    assert values.tolist() == pytest.approx([-1.5 * math.exp(-0.1), 0, 0, 0])
    assert numbers(ppo.clipped_value(array(library, new), old, gain, mask, 0.2))[1:].tolist() == [0, 0, 0]
    if library != "numpy":
        assert gradient(library, lambda v: ppo.clipped_policy(v, old, gain, mask), new)[1:].tolist() == [
            0,
            0,
            0,
        ]
        assert gradient(library, lambda v: ppo.clipped_value(v, old, gain, mask, 0.2), new)[1:].tolist() == [
            0,
            0,
            0,
        ]
    seen = ppo.update_statistics(array(library, new), old, gain, mask)
    assert all(np.isfinite(numbers(v)).all() for v in seen.values())


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "numpy"])
def test_statistics_have_no_gradient(library):
    one, mask = array(library, [0.5, -0.5]), array(library, [1.0, 1.0])
    for name in ("ratio", "approx_kl", "clip_fraction"):
        # The second term gives torch a graph.
        found = gradient(
            library, lambda x, name=name: ppo.update_statistics(x, one, x, mask)[name] + 2.0 * x, [0.1, 0.2]
        )
        assert found.tolist() == [2.0, 2.0]
    found = gradient(library, lambda x: ppo.value_clip_fraction(x, one, one, mask) + 2.0 * x, [0.1, 0.2])
    assert found.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_entropy(library):
    logits = np.log(np.array([[0.25, 0.25, 0.5], [1e-30, 1.0, 1e-30]])) + 3.0
    assert numbers(ppo.entropy(array(library, logits))) == pytest.approx([1.5 * math.log(2), 0.0], abs=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_good_answer_becomes_likelier(library):
    """The sign, from the whole chain of functions.

    One step along the negative gradient raises the log-probability of a token with a positive advantage.
    """
    logits = np.array([[0.3, -0.2, 0.1], [0.0, 0.5, -1.0]])
    old = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.array([2, 0])

    def loss(x):
        logprobs = token_logprobs(x, indices(library, target))
        return ppo.clipped_policy(
            logprobs,
            array(library, old[[0, 1], target]),
            array(library, [1.0, -1.0]),
            array(library, [1.0, 1.0]),
        )

    moved = logits - 0.1 * gradient(library, loss, logits)
    new = moved - np.log(np.exp(moved).sum(-1, keepdims=True))
    assert new[0, 2] > old[0, 2]
    assert new[1, 0] < old[1, 0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_reference_figures(shared, library):
    """Values and gradients of TRL 1.12's update.

    Its value loss covers one more position where a row is padded, with a mask of its own.
    """
    d = json.loads((shared / "oracle" / "ppo_step.json").read_text())
    config, inputs, wanted = d["config"], d["inputs"], d["outputs"]
    tokens = ~np.array(wanted["padding_mask"])
    slots = ~np.array(wanted["padding_mask_p1"])
    mask, value_mask = array(library, tokens.astype(float)), array(library, slots.astype(float))
    old, gain = array(library, inputs["logp"]), array(library, wanted["advantages"])
    old_values, returns = array(library, inputs["values"]), array(library, wanted["returns"])

    def policy(x):
        return token_mean(
            ppo.clipped_policy(x, old, gain, mask, config["cliprange"]), mask, float(tokens.sum())
        )

    def value(x):
        terms = ppo.clipped_value(x, old_values, returns, value_mask, config["cliprange_value"])
        return config["vf_coef"] * token_mean(terms, value_mask, float(slots.sum()))

    tolerance = {"numpy": 1e-6, "mlx": 1e-5, "torch": 1e-9}[library]
    assert float(policy(array(library, inputs["new_logp"]))) == pytest.approx(
        wanted["pg_loss"], rel=tolerance
    )
    assert float(value(array(library, inputs["new_values"]))) / config["vf_coef"] == pytest.approx(
        wanted["vf_loss"], rel=tolerance
    )
    assert gradient(library, policy, inputs["new_logp"]) == pytest.approx(
        np.array(wanted["grad_logp"]), abs=tolerance
    )
    assert gradient(library, value, inputs["new_values"]) == pytest.approx(
        np.array(wanted["grad_values"]), abs=tolerance
    )
