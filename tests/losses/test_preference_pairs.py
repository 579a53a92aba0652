"""DPO and its relatives, ORPO, SimPO, CPO and KTO: by hand, against TRL's figures, in three libraries."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlx_posttrain.losses import preference as losses
from tests.helpers import array, gradient, libraries, numbers

LN2 = math.log(2)
LN3 = math.log(3)


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("library", libraries())
def test_where_policy_and_reference_agree(library):
    """Closed forms at log-ratios of 0, where every run begins."""
    zero = array(library, [0.0])
    at_zero = {
        LN2: [losses.dpo(zero, zero, 0.1), losses.dpo(zero, zero, 0.1, 0.2), losses.cpo(zero, zero, 0.1)],
        0.25 / 0.01: [losses.ipo(zero, zero, 0.1)],
        1.0: [losses.hinge(zero, zero, 0.1), losses.apo_zero(zero, zero, 0.1)],
        2 * LN2: [losses.nca_pair(zero, zero, 0.1)],
        50.0: [losses.sppo_hard(zero, zero, 0.1)],
        (LN2 + 1) / 2: [losses.discopop(zero, zero, 0.1)],
        0.5: [losses.kto(zero, zero, 0.0, 0.1), losses.apo_zero_unpaired(zero, zero, 0.1)],
        -math.log(sigma(-0.5)): [losses.simpo(zero, zero, 2.0, 0.5)],
    }
    for expected, found in at_zero.items():
        for loss in found:
            assert numbers(loss) == pytest.approx([expected], rel=1e-6)
    assert numbers(losses.apo_down(zero, zero, 0.1)) == pytest.approx([1.0])
    assert numbers(losses.robust(zero, zero, 0.1, 0.1)) == pytest.approx([LN2])


@pytest.mark.parametrize("library", libraries())
def test_worked_by_hand(library):
    chosen, rejected = array(library, [LN3]), array(library, [-LN3])  # h = 2 ln 3 = ln 9, beta 1/2: ln 3
    assert numbers(losses.dpo(chosen, rejected, 0.5)) == pytest.approx([math.log(4 / 3)], rel=1e-6)
    # a fifth of the labels flipped: .8 ln(4/3) + .2 ln 4
    flipped = 0.8 * math.log(4 / 3) + 0.2 * math.log(4)
    assert numbers(losses.dpo(chosen, rejected, 0.5, 0.2)) == pytest.approx([flipped], rel=1e-6)
    unbiased = (0.8 * math.log(4 / 3) - 0.2 * math.log(4)) / 0.6
    assert numbers(losses.robust(chosen, rejected, 0.5, 0.2)) == pytest.approx([unbiased], rel=1e-6)
    assert numbers(losses.dpo(chosen, rejected, 0.5, margin=LN3)) == pytest.approx([LN2], rel=1e-6)
    assert numbers(losses.ipo(chosen, rejected, 0.5)) == pytest.approx([(2 * LN3 - 1) ** 2], rel=1e-6)
    assert numbers(losses.hinge(chosen, rejected, 0.5)) == pytest.approx([0.0])
    assert numbers(losses.hinge(chosen, rejected, 0.5, LN3)) == pytest.approx([1.0], rel=1e-6)
    # beta c = ln 3: sigma = 3/4, and 1/4 on the other side
    assert numbers(losses.apo_zero(chosen, rejected, 1.0)) == pytest.approx([0.5], rel=1e-6)
    assert numbers(losses.apo_down(chosen, rejected, 1.0)) == pytest.approx([0.85], rel=1e-6)
    assert numbers(losses.kto(chosen, array(library, [1.0]), 0.0, 1.0)) == pytest.approx([0.25], rel=1e-6)
    assert numbers(losses.kto(chosen, array(library, [0.0]), 2 * LN3, 1.0)) == pytest.approx([0.25], rel=1e-6)
    assert numbers(losses.kto_baseline(array(library, [-3.0, 1.0]))) == pytest.approx(0.0)
    assert numbers(losses.kto_baseline(array(library, [3.0, 1.0]))) == pytest.approx(2.0)


@pytest.mark.parametrize("library", libraries())
def test_odds(library):
    # p = 1/2 against 1/4: odds 1 against 1/3, so sigma(ln 3) = 3/4
    found = losses.odds_ratio(array(library, [math.log(0.5)]), array(library, [math.log(0.25)]))
    assert numbers(found) == pytest.approx([math.log(4 / 3)], rel=1e-5)


@pytest.mark.parametrize("library", libraries())
def test_odds_stay_finite(library):
    """Probabilities of 1 and almost 0, whose odds a naive form turns into NaN."""
    extreme = array(library, [0.0, -1e-9, -1e-3, -80.0, -500.0])
    other = array(library, [-1.0, -500.0, -1.0, 0.0, -80.0])
    assert np.isfinite(numbers(losses.odds_ratio(extreme, other))).all()
    if library != "numpy":
        assert np.isfinite(gradient(library, lambda x: losses.odds_ratio(x, other).sum(), extreme)).all()
    assert numbers(losses.log1mexp(array(library, [-1e-3, -1.0, -40.0]))) == pytest.approx(
        [math.log(-math.expm1(-1e-3)), math.log(1 - math.exp(-1)), 0.0], rel=1e-4, abs=1e-7
    )


@pytest.mark.parametrize("library", libraries())
def test_large_log_ratios_neither_overflow_nor_lose_their_gradient(library):
    far = array(library, [-4000.0])
    zero = array(library, [0.0])
    for loss in (losses.dpo, losses.cpo):
        assert numbers(loss(far, zero, 0.1)) == pytest.approx([400.0])
        if library != "numpy":
            slope = gradient(library, lambda x, loss=loss: loss(x, zero, 0.1).sum(), far)
            assert slope == pytest.approx([-0.1])


# TRL's figures, some of which were computed in float32 on the way


def inputs(found, side):
    """[6, 5] log-probabilities, 0 where there is no answer, and the mask of the answers' tokens."""
    mask = np.array(found["inputs"]["completion_mask"], float)[:, 1:]
    return np.array(found["inputs"][side], float), mask


CASES = {
    "sigmoid": lambda c, r, b, e, n: losses.dpo(c, r, b),
    "hinge": lambda c, r, b, e, n: losses.hinge(c, r, b),
    "exo_pair": lambda c, r, b, e, n: losses.exo_pair(c, r, b, e),
    "nca_pair": lambda c, r, b, e, n: losses.nca_pair(c, r, b),
    "robust": lambda c, r, b, e, n: losses.robust(c, r, b, e),
    "sppo_hard": lambda c, r, b, e, n: losses.sppo_hard(c, r, b),
    "aot_unpaired": lambda c, r, b, e, n: losses.aot_unpaired(c, r, b),
    "apo_zero": lambda c, r, b, e, n: losses.apo_zero(c, r, b),
    "apo_down": lambda c, r, b, e, n: losses.apo_down(c, r, b),
    "discopop": lambda c, r, b, e, n: losses.discopop(c, r, b),
    # means over an answer's tokens
    "ipo": lambda c, r, b, e, n: losses.ipo(c / n[:3], r / n[3:], b),
    "sigmoid_norm": lambda c, r, b, e, n: losses.dpo(c / n[:3], r / n[3:], b),
}


@pytest.fixture(scope="module")
def found(shared):
    return json.loads((shared / "oracle" / "losses.json").read_text())


def case(found, name):
    return next(one for one in found["cases"] if one["name"] == name)


@pytest.mark.parametrize("name", [*CASES, "aot", "bco_pair"])
def test_pairs_equal_trl_in_value_and_gradient(name, found):
    torch = pytest.importorskip("torch")
    of = case(found, f"dpo/{name}")
    policy, mask = inputs(found, "policy")
    tokens = torch.tensor(policy, requires_grad=True)
    ref = torch.tensor(inputs(found, "ref")[0])
    mask = torch.tensor(mask)
    logps, ref_logps, lengths = tokens.sum(1), ref.sum(1), mask.sum(1)
    ratio, beta, e = logps - ref_logps, of["args"]["beta"], of["args"]["label_smoothing"]
    if name == "aot":
        loss = losses.aot(logps[:3], logps[3:], ref_logps[:3], ref_logps[3:], beta)
    elif name == "bco_pair":  # before any reward was met
        loss = losses.bco_pair(ratio[:3], ratio[3:], beta, 0.0)
    else:
        loss = CASES[name](ratio[:3], ratio[3:], beta, e, lengths)
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(of["loss"], rel=1e-7)
    np.testing.assert_allclose(tokens.grad.numpy(), of["grad"], rtol=1e-6, atol=1e-12)


def test_kto_equals_trl(found):
    torch = pytest.importorskip("torch")
    of = case(found, "kto")
    tokens = torch.tensor(inputs(found, "policy")[0], requires_grad=True)
    ref, kl_policy, kl_ref = (torch.tensor(inputs(found, s)[0]) for s in ("ref", "kl_policy", "kl_ref"))
    label = torch.tensor(found["inputs"]["label"], dtype=torch.float64)
    z = losses.kto_baseline((kl_policy - kl_ref).sum(1))
    each = losses.kto((tokens - ref).sum(1), label, z, of["args"]["beta"])
    loss = (each * torch.where(label > 0, of["args"]["dw"], of["args"]["uw"])).mean()
    loss.backward()
    assert loss.item() == pytest.approx(of["loss"], rel=1e-7)
    np.testing.assert_allclose(tokens.grad.numpy(), of["grad"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["orpo/odds_term", "simpo"])
def test_losses_without_a_reference_equal_trl(name, found):
    torch = pytest.importorskip("torch")
    of = case(found, name)
    chosen = torch.tensor(found["inputs"]["avg_chosen"], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(found["inputs"]["avg_rejected"], dtype=torch.float64)
    if name == "simpo":
        loss = losses.simpo(chosen, rejected, of["args"]["beta"], of["args"]["gamma"]).mean()
    else:
        loss = of["args"]["beta"] * losses.odds_ratio(chosen, rejected).mean()
    loss.backward()
    assert loss.item() == pytest.approx(of["loss"], rel=1e-6)
    np.testing.assert_allclose(chosen.grad.numpy(), of["grad"], rtol=1e-6)


@pytest.mark.parametrize("library", [one for one in libraries() if one != "numpy"])
@pytest.mark.parametrize("name", CASES)
def test_libraries_agree_in_value_and_gradient(name, library):
    rng = np.random.default_rng(3)
    c, r = rng.normal(size=(2, 3)) * 3
    n = rng.integers(2, 9, 6).astype(float)
    truth = CASES[name](c, r, 0.3, 0.1, n)
    loss = CASES[name](array(library, c), array(library, r), 0.3, 0.1, array(library, n))
    np.testing.assert_allclose(numbers(loss), truth, rtol=2e-5, atol=1e-6)
    slope = gradient(
        library,
        lambda x: CASES[name](x, array(library, r), 0.3, 0.1, array(library, n)).sum(),
        array(library, c),
    )
    eps = 1e-6
    numeric = [
        (
            CASES[name](c + eps * unit, r, 0.3, 0.1, n).sum()
            - CASES[name](c - eps * unit, r, 0.3, 0.1, n).sum()
        )
        / (2 * eps)
        for unit in np.eye(3)
    ]
    np.testing.assert_allclose(slope, numeric, rtol=1e-3, atol=1e-5)
