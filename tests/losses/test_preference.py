"""Bradley-Terry: hand-worked numbers, the reference figures, three libraries."""

from __future__ import annotations

import json
import math

import pytest

from mlx_posttrain.losses.preference import bradley_terry, centering
from tests.helpers import array, libraries, numbers


@pytest.mark.parametrize("library", libraries())
def test_hand_worked(library):
    chosen, rejected = array(library, [1.0, 0.0, -50.0]), array(library, [1.0, math.log(3), 50.0])
    # equal scores: ln 2; a log-odds of -ln 3: sigma = 1/4; far wrong: the margin itself, without overflow
    assert numbers(bradley_terry(chosen, rejected)) == pytest.approx(
        [math.log(2), math.log(4), 100.0], rel=1e-6
    )
    assert numbers(bradley_terry(chosen, rejected, margin=math.log(3)))[0] == pytest.approx(
        math.log(4), rel=1e-6
    )
    each = numbers(bradley_terry(chosen, rejected, margin=array(library, [math.log(3), 0.0, -100.0])))
    assert each == pytest.approx([math.log(4), math.log(4), math.log(2)], rel=1e-6)
    assert numbers(centering(chosen, rejected)) == pytest.approx([4.0, math.log(3) ** 2, 0.0], abs=1e-5)


def test_gradient_is_minus_the_chance_of_being_wrong():
    torch = pytest.importorskip("torch")
    r = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry(r, torch.tensor([0.1, 0.5], dtype=torch.float64)).sum()
    loss.backward()
    assert r.grad.tolist() == pytest.approx([-1 / (1 + math.exp(0.2)), -1 / (1 + math.exp(-1.5))])


def test_reference_figures(shared):
    torch = pytest.importorskip("torch")
    found = json.loads((shared / "oracle" / "losses.json").read_text())
    cases = [c for c in found["cases"] if c["name"] == "reward_model"]
    assert len(cases) == 2
    for case in cases:
        scores = torch.tensor(found["inputs"]["rewards"], dtype=torch.float64, requires_grad=True)
        chosen, rejected = scores[:3], scores[3:]
        loss = (
            bradley_terry(chosen, rejected) + case["args"].get("center", 0.0) * centering(chosen, rejected)
        ).mean()
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
        assert scores.grad.tolist() == pytest.approx(case["grad"], rel=1e-9)
