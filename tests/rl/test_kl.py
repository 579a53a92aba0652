"""Controllers of the KL penalty in both directions."""

from __future__ import annotations

import pytest

from mlx_posttrain.rl.kl import AdaptiveKL, controller


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
    with pytest.raises(ValueError, match="fixed, adaptive or linear"):
        controller("adaptiv", 0.1)


def test_beta_in_a_straight_line():
    line = controller("linear", 0.5, final=0.1, steps=5)
    seen = []
    for step in range(5):
        seen.append(line.beta)
        if step == 2:
            state, line = line.state(), controller("linear", 0.5, final=0.1, steps=5)
            line.restore(state)
        line.update(100.0 * step, 8)
    assert seen == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert controller("linear", 0.5, final=0.1, steps=1).beta == 0.5
