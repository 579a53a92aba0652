"""GRPO's relatives: hand-worked numbers, and TRL's figures through the method's own loss."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import methods
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines.base import DeviceBatch
from mlx_posttrain.losses import policy
from mlx_posttrain.losses.sft import token_mean
from mlx_posttrain.methods import grpo
from mlx_posttrain.rl.aggregation import AGGREGATIONS, aggregate
from tests.helpers import array, gradient, indices, libraries, numbers

LIBRARIES = libraries()


@pytest.mark.parametrize("library", LIBRARIES)
def test_surrogate_by_hand(library):
    ratios = [0.5, 1.25, 1.5, 0.5, 1.5, 6.0]
    gains = array(library, [1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    logs, mask = np.log(ratios), array(library, np.ones(6))

    def loss(x, delta=None):
        return policy.clipped_surrogate(x, gains, mask, 0.2, 0.28, delta)

    # A > 0 counts up to 1.28, A < 0 from 0.8 on, without bound unless delta gives one.
    assert numbers(loss(array(library, logs))) == pytest.approx([-0.5, -1.25, -1.28, 0.8, 1.5, 6.0], rel=1e-5)
    bounded = numbers(loss(array(library, logs), delta=4.0))
    assert bounded == pytest.approx([-0.5, -1.25, -1.28, 0.8, 1.5, 4.0], rel=1e-5)
    assert gradient(library, loss, logs) == pytest.approx([-0.5, -1.25, 0.0, 0.0, 1.5, 6.0], abs=1e-4)
    assert gradient(library, lambda x: loss(x, 4.0), logs)[-1] == pytest.approx(0.0, abs=1e-6)
    low, high = policy.clipped(array(library, logs), gains, mask, 0.2, 0.28)
    assert numbers(low).tolist() == [0, 0, 0, 1, 0, 0] and numbers(high).tolist() == [0, 0, 1, 0, 0, 0]
    low, high = policy.clipped(array(library, logs), gains, mask, 0.2, 0.28, 4.0)
    assert numbers(low).tolist() == [0, 0, 0, 1, 0, 0] and numbers(high).tolist() == [0, 0, 1, 0, 0, 1]
    # whole answers far from where they were: no nan, and nothing where nothing is to be learned
    far = array(library, [90.0, -90.0, 200.0])
    found = numbers(
        policy.clipped_surrogate(far, array(library, [0.0, 1.0, -1.0]), array(library, np.ones(3)))
    )
    assert found[0] == 0 and abs(found[1]) < 1e-20 and np.isfinite(found[2]) and found[2] > 1e20


@pytest.mark.parametrize("library", LIBRARIES)
def test_kl_estimates_by_hand(library):
    # Policy 1/2 where the reference has 1/4, and the other way round: d = +-ln 2.
    new, ref = [math.log(1 / 2), math.log(1 / 4)], array(library, [math.log(1 / 4), math.log(1 / 2)])
    old, mask = array(library, [math.log(1 / 4), math.log(1 / 4)]), array(library, [1.0, 1.0])
    ln2 = math.log(2)
    wanted = {
        "k1": [ln2, -ln2],
        "k2": [ln2**2 / 2, ln2**2 / 2],
        "k3": [ln2 - 1 / 2, 1 - ln2],
        "unbiased": [2 * (ln2 - 1 / 2), 1 - ln2],
    }
    slopes = {
        "k1": [1.0, 1.0],
        "k2": [ln2, -ln2],
        "k3": [1 / 2, -1.0],
        # ratio k3 + ratio (1 - e^-d)
        "unbiased": [2 * (ln2 - 1 / 2) + 1.0, 1 - ln2 - 1.0],
    }
    for kind, values in wanted.items():

        def loss(x, kind=kind):
            return policy.kl_estimate(x, ref, mask, kind, old)

        assert numbers(loss(array(library, new))) == pytest.approx(values, rel=1e-5), kind
        assert gradient(library, loss, new) == pytest.approx(slopes[kind], abs=1e-4), kind
    with pytest.raises(ValueError, match="k1, k2, k3 or unbiased"):
        policy.kl_estimate(ref, ref, mask, "k4")


def test_estimates_of_kl_have_its_mean_and_gradient():
    """Over all tokens of a distribution: k1 and k3 have KL's mean, k2 and the unbiased form its gradient."""
    rng = np.random.default_rng(0)
    logits, reference = rng.normal(size=5), rng.normal(size=5)
    log_p = logits - np.log(np.exp(logits).sum())
    log_ref = reference - np.log(np.exp(reference).sum())
    p, ones = np.exp(log_p), np.ones(5)
    kl = (p * (log_p - log_ref)).sum()
    for kind in ("k1", "k3", "unbiased"):
        assert (p * policy.kl_estimate(log_p, log_ref, ones, kind, log_p)).sum() == pytest.approx(kl)
    # d/dlogits of sum_v sg(p_v) f(log p_v) = sum_v p_v f'(v) (1[v = j] - p_j)
    true = p * (log_p - log_ref - kl)
    for kind, exact in {"k2": True, "unbiased": True, "k1": False, "k3": False}.items():
        slope = gradient(
            "numpy", lambda x, kind=kind: policy.kl_estimate(x, log_ref, ones, kind, log_p), log_p
        )
        found = p * slope - p * (p * slope).sum()
        assert bool(np.abs(found - true).max() < 1e-5) is exact, kind


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_whole_completions_ratio(library):
    logs, row = array(library, [0.1, 0.3, -0.4, 0.0]), indices(library, [0, 0, 1, 1])
    total = policy.sequence_log_ratio(logs, row, 2)
    assert numbers(total) == pytest.approx([0.4, 0.4, -0.4, -0.4], rel=1e-5)
    mean = policy.sequence_log_ratio(logs, row, 2, array(library, [2.0, 1.0]))
    assert numbers(mean) == pytest.approx([0.2, 0.2, -0.4, -0.4], rel=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_at_padding_reaches_a_value(library):
    mask, row = array(library, [1.0, 0.0, 0.0]), indices(library, [0, 0, 0])
    bad = array(library, [-1.0, np.nan, np.inf])
    for found in (
        policy.clipped_surrogate(bad, bad, mask, 0.2, 0.3, 2.0),
        policy.kl_estimate(bad, bad, mask, "unbiased", bad),
        policy.cispo(bad, bad, bad, mask),
        policy.sapo(bad, bad, mask),
        policy.vespo(bad, bad, bad, mask, row, 1),
    ):
        values = numbers(found)
        assert np.isfinite(values).all() and values[1:].tolist() == [0, 0]


# Two answers, of 3 tokens and of 1, in one micro-batch or in two.
VALUES = [1.0, 2.0, 6.0, 5.0]
MEANS = {
    "token-mean": 14 / 4,
    "seq-mean-token-mean": (3 + 5) / 2,
    "seq-mean-token-sum": (9 + 5) / 2,
    "seq-mean-token-sum-norm": (9 / 10 + 5 / 10) / 2,
}


def batch_of(rows: list[list[float]], **extra: list[list[float]]) -> Batch:
    """A batch with those rows of values in ``extra``, padded by one position."""
    n = sum(map(len, rows)) + 1
    row = np.append(np.repeat(np.arange(len(rows)), [len(r) for r in rows]), 0).astype(np.int32)
    mask = np.ones(n, np.float32)
    mask[-1] = 0
    flat = {
        k: np.append(np.concatenate(v), np.nan).astype(np.float32) for k, v in {"x": rows, **extra}.items()
    }
    zeros = np.zeros(n, np.int32)
    tokens = np.zeros((len(rows), max(map(len, rows)) + 1), np.int32)
    return Batch(tokens, zeros, zeros, row, mask, np.ones(n, np.float32), flat)


def test_aggregation_by_hand():
    for how, wanted in MEANS.items():
        for parts in ([[VALUES[:3], VALUES[3:]]], [[VALUES[:3]], [VALUES[3:]]]):
            made = aggregate([batch_of(rows) for rows in parts], how, 10)
            total = sum(b.count for b in made)
            found = sum(token_mean(b.extra["x"], b.mask, total, b.weight) for b in made)
            assert found == pytest.approx(wanted), how
            shares = sum(token_mean(b.extra["x"], b.mask, 1.0, b.extra["token_share"]) for b in made)
            assert shares == pytest.approx(14 / 4)
    assert set(MEANS) == set(AGGREGATIONS)
    with pytest.raises(ValueError, match="token-mean"):
        aggregate([], "mean", 10)


@pytest.fixture(scope="module")
def figures(shared):
    return json.loads((shared / "oracle" / "losses.json").read_text())


def recipe(*overrides: str):
    return methods.load_recipe("10_grpo", list(overrides))


def loss_and_slope(figures, chosen, library, max_tokens=16):
    """The method's loss, and its gradient with respect to the log-probabilities as TRL's grid."""
    data = figures["inputs"]
    real = np.array(data["completion_mask"])[:, 1:] > 0
    grid = {name: np.array(data[name]) for name in ("logp", "old", "ref_logp")}
    rows = {name: [g[m].tolist() for g, m in zip(v, real, strict=True)] for name, v in grid.items()}
    gains = [[a] * int(m.sum()) for a, m in zip(data["adv"], real, strict=True)]
    beta = [[chosen.kl.beta] * len(g) for g in gains]
    batch = batch_of(
        rows["logp"], old_logprobs=rows["old"], ref_logprobs=rows["ref_logp"], advantages=gains, beta=beta
    )
    (batch,) = aggregate([batch], chosen.settings.aggregation, max_tokens)
    on_device = DeviceBatch(
        tokens=np.zeros(batch.tokens.shape),
        index=None,
        target=None,
        row=indices(library, batch.row),
        mask=array(library, batch.mask),
        weight=array(library, batch.weight),
        total=batch.count,
        extra={name: array(library, values) for name, values in batch.extra.items()},
    )
    loss = grpo.policy_loss(chosen)

    def value(x):
        model = SimpleNamespace(policy_terms=lambda batch, temperature: (x, 0.0 * x, None))
        return loss(model, on_device)[0]

    start = np.append(np.concatenate(rows["logp"]), 0.0)
    slope = np.zeros(real.shape)
    slope[real] = gradient(library, value, start)[:-1]
    return float(numbers(value(array(library, start)))), slope


TRL = {
    "grpo/grpo": ["grpo.preset=grpo"],
    "grpo/bnpo": ["grpo.aggregation=token-mean"],
    "grpo/dr_grpo": ["grpo.preset=dr_grpo"],
    "grpo/dapo": ["grpo.preset=dapo"],
    "grpo/gspo": ["grpo.preset=gspo"],
    "grpo/luspo": ["grpo.ratio=sequence", "grpo.aggregation=seq-mean-token-sum"],
    "rloo": ["grpo.preset=rloo", "grpo.aggregation=seq-mean-token-mean"],
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", TRL)
def test_trls_figures_through_the_methods_loss(name, library, figures):
    cases = [c for c in figures["cases"] if c["name"] == name]
    assert cases
    for case in cases:
        args = case["args"]
        bounds = [f"grpo.clip_low={args['eps']}", f"grpo.clip_high={args.get('eps_high', args['eps'])}"]
        chosen = recipe(*TRL[name], *bounds, f"kl.beta={args.get('beta', 0.0)}")
        found, slope = loss_and_slope(figures, chosen, library)
        assert found == pytest.approx(case["loss"], rel=1e-5)
        assert slope == pytest.approx(np.array(case["grad"]), abs=1e-4 if library == "numpy" else 1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["cispo", "sapo", "vespo"])
def test_trls_figures_of_functions_that_no_key_names(name, library, figures):
    data = figures["inputs"]
    real = np.array(data["completion_mask"])[:, 1:] > 0
    rows, width = real.shape
    mask = array(library, real.ravel().astype(float))
    old, ref = (array(library, np.ravel(data[key])) for key in ("old", "ref_logp"))
    gains = array(library, np.repeat(data["adv"], width))
    row = indices(library, np.repeat(np.arange(rows), width))
    lengths = np.repeat(real.sum(1), width)
    shares = {"sapo": 1 / (rows * lengths), "cispo": 1 / real.sum(), "vespo": 1 / real.sum()}
    share = array(library, np.broadcast_to(shares[name], rows * width))
    for case in (c for c in figures["cases"] if c["name"] == f"grpo/{name}"):
        beta, high = case["args"]["beta"], case["args"]["eps_high"]

        def value(x, beta=beta, high=high):
            logs = policy.log_ratio(x, old, mask)
            terms = {
                "cispo": lambda: policy.cispo(logs, x, gains, mask, high),
                "sapo": lambda: policy.sapo(logs, gains, mask),
                "vespo": lambda: policy.vespo(logs, x, gains, mask, row, rows),
            }[name]()
            terms = terms + beta * policy.kl_estimate(x, ref, mask, "k3")
            return token_mean(terms, mask, 1.0, share)

        start = np.ravel(data["logp"])
        assert float(numbers(value(array(library, start)))) == pytest.approx(case["loss"], rel=1e-5)
        if library != "numpy":  # differences would also see what stop_gradient hides
            slope = gradient(library, value, start).reshape(rows, width)
            assert slope == pytest.approx(np.array(case["grad"]), abs=1e-6)
