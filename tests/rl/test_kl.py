"""Estimators against the exact divergence; controllers in both directions."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain.rl.kl import AdaptiveKL, controller, estimate


def test_estimators_of_a_known_divergence():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.3, 0.3, 0.4])
    exact = float((p * np.log(p / q)).sum())
    every = np.log(p), np.log(q)
    # expectations under p, so no sampling noise
    assert float((p * estimate(*every, "k1")).sum()) == pytest.approx(exact)
    assert float((p * estimate(*every, "k3")).sum()) == pytest.approx(exact)
    assert float((p * estimate(*every, "k2")).sum()) == pytest.approx(exact, rel=0.1)
    assert (estimate(*every, "k3") >= 0).all()
    assert (estimate(*every, "k1") < 0).any()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        estimate(*every, "k4")


def test_beta_follows_the_divergence_both_ways():
    adaptive = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    adaptive.update(12.0, 256)  # twice the target: clipped to +.2
    assert adaptive.beta == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    high = adaptive.beta
    adaptive.update(5.4, 1000)  # a tenth below
    assert adaptive.beta == pytest.approx(high * (1 - 0.1 * 1000 / 10_000))
    before = adaptive.beta
    adaptive.update(6.0, 1000)
    assert adaptive.beta == before
    steep = AdaptiveKL(0.5, target=6.0, horizon=10)
    steep.update(0.0, 64)  # 6.4 horizons at once: -0.2 of beta, not -1.28
    assert steep.beta == pytest.approx(0.4)
    again = controller("adaptive", 9.9)
    again.restore(adaptive.state())
    assert again.beta == adaptive.beta
    fixed = controller("fixed", 0.3)
    fixed.update(100.0, 1000)
    assert fixed.beta == 0.3
    with pytest.raises(ValueError, match="fixed or adaptive"):
        controller("adaptiv", 0.1)
