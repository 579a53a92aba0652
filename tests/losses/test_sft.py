"""Supervised losses: hand-worked numbers, reference figures, three libraries, gradients."""

import json
import math

import numpy as np
import pytest

from mlx_posttrain.losses.sft import full_kl, sequence_logprobs, token_logprobs, token_mean
from mlx_posttrain.ops import ops

LOGITS = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
REFERENCE = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]))


def arrays(library, *values):
    """The same numbers as arrays of a library; floats in the widest type both engines train with."""
    if library == "numpy":
        return values
    if library == "mlx":
        import mlx.core as mx

        return tuple(
            mx.array(v.astype(np.float32) if v.dtype.kind == "f" else v.astype(np.int32)) for v in values
        )
    torch = pytest.importorskip("torch")
    return tuple(
        torch.from_numpy(v.astype(np.float32) if v.dtype.kind == "f" else v.astype(np.int64)) for v in values
    )


def to_numpy(x):
    return np.array(x.tolist())


def gradient(library, function, x):
    """d function / d x as NumPy."""
    if library == "mlx":
        import mlx.core as mx

        return np.array(mx.grad(function)(x))
    x = x.clone().requires_grad_(True)
    function(x).backward()
    return x.grad.numpy()


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_token_logprobs_by_hand(library):
    logits, targets = arrays(library, LOGITS + 3.0, np.array([1, 2]))  # a shift changes no probability
    assert np.allclose(to_numpy(token_logprobs(logits, targets)), [math.log(0.25), math.log(0.7)], atol=1e-6)


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_full_kl_by_hand_and_its_two_directions(library):
    logits, reference = arrays(library, LOGITS, REFERENCE)
    # Forward, KL(ref || policy): .25 log(.25/.5) + .5 log(.5/.25) + 0; reverse exchanges the roles.
    forward = 0.25 * math.log(0.5) + 0.5 * math.log(2.0)
    reverse = 0.5 * math.log(2.0) + 0.25 * math.log(0.5)
    assert np.allclose(to_numpy(full_kl(logits, reference, "forward")), [forward, 0.0], atol=1e-6)
    assert np.allclose(to_numpy(full_kl(logits, reference, "reverse")), [reverse, 0.0], atol=1e-6)


def test_the_directions_differ_and_name_the_right_roles():
    policy, reference = np.log(np.array([[0.98, 0.01, 0.01]])), np.log(np.array([[0.4, 0.3, 0.3]]))
    forward = sum(p * math.log(p / q) for p, q in zip([0.4, 0.3, 0.3], [0.98, 0.01, 0.01]))
    reverse = sum(q * math.log(q / p) for p, q in zip([0.4, 0.3, 0.3], [0.98, 0.01, 0.01]))
    assert full_kl(policy, reference, "forward")[0] == pytest.approx(forward)
    assert full_kl(policy, reference, "reverse")[0] == pytest.approx(reverse)
    assert forward > 2 * reverse  # losing what the reference could say costs more, forward
    with pytest.raises(ValueError, match="direction"):
        full_kl(policy, reference, "sideways")


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("library", ["mlx", "torch"])
def test_full_kl_gradient_equals_finite_differences_and_leaves_the_reference_alone(library, direction):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    policy, reference = arrays(library, x, y)
    found = gradient(library, lambda p: ops(p).sum(full_kl(p, reference, direction)), policy)
    step = 1e-6
    wanted = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        wanted[i] = (full_kl(up, y, direction).sum() - full_kl(down, y, direction).sum()) / (2 * step)
    assert np.allclose(found, wanted, atol=1e-5)
    assert (
        np.abs(
            gradient(
                library, lambda r: ops(r).sum(full_kl(policy, r, direction)) + 0 * ops(r).sum(r), reference
            )
        ).max()
        == 0
    )


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_token_mean_divides_by_the_whole_step_and_ignores_padding(library):
    values, weights = arrays(library, np.array([1.0, 2.0, np.inf, 4.0]), np.array([1.0, 1.0, 0.0, 1.0]))
    # A part of a step of 10 trained tokens: 7/10, whatever the padded position holds.
    assert float(token_mean(values, weights, 10.0)) == pytest.approx(0.7)


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_reference_figures(library, shared):
    """Mean negative log-likelihood of completion tokens, and its gradient with respect to their log-probs.

    The reference values are in ../shared/oracle.
    """
    oracle = json.loads((shared / "oracle" / "losses.json").read_text())
    (case,) = [c for c in oracle["cases"] if c["name"] == "sft/nll"]
    mask = np.array(oracle["inputs"]["completion_mask"], float)[:, 1:]
    logprobs, weights = arrays(library, np.array(oracle["inputs"]["policy"]), mask)

    def loss(p):
        return token_mean(-p, weights, float(mask.sum()))

    assert float(loss(logprobs)) == pytest.approx(case["loss"], abs=1e-6)
    if library != "numpy":
        # The reference differentiates at masked positions too; ours are zero there, as they must be.
        found = gradient(library, loss, logprobs)
        assert np.allclose(found, np.array(case["grad"]) * mask, atol=1e-6)


@pytest.mark.parametrize("library", ["numpy", "mlx", "torch"])
def test_sequence_logprobs_by_hand(library):
    """Rows 0 and 2 have two tokens and one, row 1 none; nan at padding reaches neither value nor gradient."""
    values = np.array([-1.0, -2.5, -0.5, np.nan])
    mask, row = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 2, 0])
    logprobs, mask, row = arrays(library, values, mask, row)
    assert to_numpy(sequence_logprobs(logprobs, mask, row, 3)).tolist() == [-3.5, 0.0, -0.5]
    if library != "numpy":
        slope = gradient(library, lambda x: sequence_logprobs(x, mask, row, 3)[0], logprobs)
        assert slope.tolist() == [1.0, 1.0, 0.0, 0.0]
