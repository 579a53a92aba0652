"""Log-probabilities from heads in half precision, held to float64 on the same half-precision numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.data.batches import collate
from mlx_posttrain.engines import decoding, fused
from mlx_posttrain.engines.base import AdapterSpec
from tests.engines.test_fused import rows

ENGINES = engines.available()
HALVES = ("bfloat16", "float16")
V, D, N = 1000, 128, 70
#: Nats; a product in half precision is off by ten times as much and more.
CLOSE = 0.005


class Case(NamedTuple):
    """Hidden states [N, D], a head [V, D], another such pair, and targets, as arrays of a library."""

    h: Any
    w: Any
    h_ref: Any
    w_ref: Any
    target: Any


def gpt2_like(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and a head whose rows share a direction, so that logits lie near -100 as GPT-2's do."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(D)
    w = 0.15 * rng.standard_normal((V, D)) + 0.3 * shared
    h = rng.standard_normal((N, D)) * 2
    h += ((-100 - h @ (0.3 * shared)) / (0.3 * shared @ shared))[:, None] * shared
    return h.astype(np.float32), w.astype(np.float32)


@pytest.fixture(params=[(e, d) for e in ENGINES for d in HALVES], ids=lambda p: "-".join(p))
def case(request, monkeypatch) -> tuple[str, Case, Case]:
    """An engine, arrays of it in half precision (hidden states as float32), and their values in float64."""
    monkeypatch.setattr(
        fused, "CHUNK_BYTES", 4 * D * 192
    )  # several chunks of positions, and parts of the head
    engine, dtype = request.param
    h, w = gpt2_like(0)
    h_ref, w_ref = gpt2_like(1)
    target = np.random.default_rng(2).integers(0, V, N)
    if engine == "mlx":
        import mlx.core as mx

        halves = [mx.array(a).astype(getattr(mx, dtype)) for a in (h, w, h_ref, w_ref)]
        halves = [a.astype(mx.float32) if a.shape[0] == N else a for a in halves]
        exact = [np.array(a.astype(mx.float32)).astype(np.float64) for a in halves]
        return engine, Case(*halves, mx.array(target)), Case(*exact, target)
    import torch

    tensors = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in (h, w, h_ref, w_ref)]
    tensors = [a.float() if a.shape[0] == N else a for a in tensors]
    exact = [a.double().numpy() for a in tensors]
    return engine, Case(*tensors, torch.from_numpy(target)), Case(*exact, target)


def log_softmax(z: np.ndarray) -> np.ndarray:
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def furthest(found: Any, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - wanted).max())


def test_losses_read_off_chunks(case):
    engine, on, exact = case
    log_p, log_q = (log_softmax(h @ w.T) for h, w in ((exact.h, exact.w), (exact.h_ref, exact.w_ref)))
    z = exact.h @ exact.w.T
    assert z.min() > -140 and z.max() < -60
    value = log_p[np.arange(N), exact.target]
    kl, entropy = (np.exp(log_q) * (log_q - log_p)).sum(-1), -(np.exp(log_p) * log_p).sum(-1)
    if engine == "mlx":
        from mlx_posttrain.engines.mlx import fused as ours

        how = {"trained": False, "training": True}
        found = [ours.logprobs(on.h, on.w, on.target, **how)]
        found += ours.logprobs_and_entropy(on.h, on.w, on.target, **how)
        found += ours.logprobs_and_kl(on.h, on.w, on.h_ref, on.w_ref, on.target, "forward", **how)
    else:
        from mlx_posttrain.engines.torch import fused as theirs

        found = [theirs.logprobs(on.h, on.w, on.target)]
        found += theirs.logprobs_and_entropy(on.h, on.w, on.target)
        found += theirs.logprobs_and_kl(on.h, on.w, on.h_ref, on.w_ref, on.target, "forward")
    wanted = [value, value, entropy, value, kl]
    assert max(map(furthest, found, wanted)) < CLOSE / 10


def test_gradients_of_hidden_states(case):
    engine, on, exact = case
    p, coefficient = np.exp(log_softmax(exact.h @ exact.w.T)), np.random.default_rng(3).standard_normal(N)
    wanted = coefficient[:, None] * (exact.w[exact.target] - p @ exact.w)
    if engine == "mlx":
        import mlx.core as mx

        from mlx_posttrain.engines.mlx import fused as ours

        found = mx.grad(
            lambda h: mx.sum(
                mx.array(coefficient.astype(np.float32))
                * ours.logprobs(h, on.w, on.target, trained=False, training=True)
            )
        )(on.h)
    else:
        import torch

        from mlx_posttrain.engines.torch import fused as theirs

        on.h.requires_grad_(True)
        (torch.from_numpy(coefficient).float() * theirs.logprobs(on.h, on.w, on.target)).sum().backward()
        found = on.h.grad
    assert furthest(found, wanted) < 1e-3 * np.abs(wanted).max()


@pytest.fixture(params=[(e, d) for e in ENGINES for d in HALVES], ids=lambda p: "-".join(p))
def model(request, random_gpt2, tmp_path) -> tuple[Any, np.ndarray]:
    """A GPT-2 in half precision whose logits lie near -100, and its head in float64."""
    from safetensors.numpy import load_file, save_file

    engine, dtype = request.param
    folder = tmp_path / "gpt2"
    convert(random_gpt2, folder, to="hf", dtype="float32")
    weights = load_file(folder / "model.safetensors")
    prefix = "transformer." if "transformer.wte.weight" in weights else ""
    w, shared = weights[f"{prefix}wte.weight"], np.random.default_rng(0).standard_normal(64)
    weights[f"{prefix}wte.weight"] = (w + shared).astype(np.float32)
    weights[f"{prefix}ln_f.bias"] = (-160 * shared / (shared @ shared)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "half", to="hf", dtype=dtype)
    from mlx_posttrain.convert.weights import load_weights

    head = next(v for k, v in load_weights(tmp_path / "half").items() if k.endswith("wte.weight"))
    exact = np.array([[float(x) for x in row] for row in head.tolist()])
    return engines.get(engine).load(tmp_path / "half", dtype=dtype), exact


def test_models_and_their_decoding(model, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK_BYTES", 4 * 64 * 128)
    net, head = model
    batch = collate(rows(), 64)
    for adapter in (False, True):
        if adapter:
            net.add_adapter(AdapterSpec(rank=2), 0)
        net.keep_reference()
        hidden = net.reference_hidden(batch).astype(np.float64)
        assert -200 < np.median(hidden @ head.T) < -60
        for temperature in (1.0, 0.7):
            found = net.apply(lambda m, b, t=temperature: {"p": m.logprobs(b, t)}, [batch])[0]["p"]
            wanted = log_softmax(hidden @ head.T / temperature)[np.arange(len(found)), batch.target]
            assert furthest(found[batch.mask > 0], wanted[batch.mask > 0]) < CLOSE
        every = net.apply(lambda m, b: {"z": m.logits(b)}, [batch])[0]["z"]
        assert furthest(log_softmax(every.astype(np.float64)), log_softmax(hidden @ head.T)) < CLOSE


def test_what_decoding_samples_from(model):
    """The log-probabilities of sampled tokens, at the hidden states that they were sampled after."""
    net, head = model
    seen: list[np.ndarray] = []
    given = net.decoding_head()

    def watched(hidden: Any) -> Any:
        seen.append(np.array(_floats(hidden), np.float64))
        return given(hidden)

    net.decoding_head = lambda: watched
    (sampled,) = net.generate([[3, 4, 5]], max_tokens=12, stop=None, temperature=0.8, seed=1)
    log_p = log_softmax(np.concatenate(seen)[:12] @ head.T / 0.8)
    assert furthest(sampled.logprobs, log_p[np.arange(12), sampled.tokens]) < CLOSE
    tokens = np.array([[3, 4, 5, *sampled.tokens]])
    whole = log_softmax(net.full_logits(tokens)[0, 2:-1].astype(np.float64) / 0.8)
    assert np.abs(whole - log_p).max() < 0.3  # its hidden states are rounded elsewhere


def _floats(array: Any) -> Any:
    import importlib

    if type(array).__module__.startswith("torch"):
        return array.float().numpy()
    return array.astype(importlib.import_module("mlx.core").float32)


def test_drawing_from_near_ties_of_half_precision(case):
    """In bfloat16 the likeliest of logits near -100 are equal; a greedy pick must see which is larger."""
    engine, on, exact = case
    if engine == "mlx":
        from mlx_posttrain.engines.mlx.fused import _logits

        picked = decoding.pick(_logits(on.h, on.w), None, 0.0, 1.0)
    else:
        from mlx_posttrain.engines.torch.fused import logits

        picked = decoding.pick(logits(on.h, on.w), None, 0.0, 1.0)
    assert np.array_equal(np.asarray(picked[0]), (exact.h @ exact.w.T).argmax(-1))
