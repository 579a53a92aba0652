"""Losses read off logits a chunk at a time.

Against the plain losses in float64, and against the engines' path over all logits at once.
"""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines import fused
from mlx_posttrain.engines.base import AdamW, AdapterSpec, DeviceBatch
from mlx_posttrain.losses import policy
from mlx_posttrain.losses.sft import full_kl, token_logprobs, token_mean
from mlx_posttrain.methods import sft

ENGINES = engines.available()
N, V, D = 7, 23, 5
KINDS = ["logprobs", "entropy", "kl forward", "kl reverse", "kl forward together", "kl reverse together"]
BETA = 0.3


def problem(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Hidden states and heads of policy and reference, targets, and a cotangent for each value.

    The cotangents are random, with zeros among them; where the values are promised to enter the loss
    together, they are those of a loss of BETA * kl - logprobs at each position.
    """
    rng = np.random.default_rng(seed)
    draw = {
        name: rng.standard_normal(shape) * 1.5
        for name, shape in {"h": (N, D), "w": (V, D), "h_ref": (N, D), "w_ref": (V, D)}.items()
    }
    weights = rng.standard_normal((2, N)) * (np.arange(N) % 3 > 0)
    if kind.endswith("together"):
        weights[1] = -BETA * weights[0]
    return {**draw, "target": rng.integers(0, V, N), "weights": weights}


def values_in_float64(p: dict[str, np.ndarray], kind: str, h: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    z = h @ w.T
    first = token_logprobs(z, p["target"])
    if kind == "logprobs":
        return [first]
    return [
        first,
        policy.entropy(z) if kind == "entropy" else full_kl(z, p["h_ref"] @ p["w_ref"].T, kind.split()[1]),
    ]


def truth(p: dict[str, np.ndarray], kind: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The values, and the gradients of their weighted sum with respect to h and w.

    In float64, by central differences.
    """

    def total(h: np.ndarray, w: np.ndarray) -> float:
        return sum(
            float(np.sum(f * g)) for f, g in zip(values_in_float64(p, kind, h, w), p["weights"], strict=False)
        )

    gradients = []
    for name in ("h", "w"):
        gradient = np.zeros_like(p[name])
        for at in np.ndindex(*gradient.shape):
            step = np.zeros_like(gradient)
            step[at] = 1e-5
            both = [total(**{"h": p["h"], "w": p["w"], name: p[name] + sign * step}) for sign in (1, -1)]
            gradient[at] = (both[0] - both[1]) / 2e-5
        gradients.append(gradient)
    return values_in_float64(p, kind, p["h"], p["w"]), gradients[0], gradients[1]


def direction_and_beta(kind: str) -> tuple[str, float | None]:
    return kind.split()[1], BETA if kind.endswith("together") else None


def mlx_results(
    p: dict[str, np.ndarray], kind: str, trained: bool, streamed: bool
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    import mlx.core as mx

    from mlx_posttrain.engines.mlx import fused as mlx_fused

    a = {name: mx.array(v.astype(np.int32 if name == "target" else np.float32)) for name, v in p.items()}
    mode = {"trained": trained, "training": trained or streamed}

    def values(h, w):
        if kind == "logprobs":
            return [mlx_fused.logprobs(h, w, a["target"], **mode)]
        if kind == "entropy":
            return list(mlx_fused.logprobs_and_entropy(h, w, a["target"], **mode))
        return list(
            mlx_fused.logprobs_and_kl(
                h, w, a["h_ref"], a["w_ref"], a["target"], *direction_and_beta(kind), **mode
            )
        )

    def total(h, w):
        found = values(h, w)
        return sum(mx.sum(f * g) for f, g in zip(found, a["weights"], strict=False)), found

    (_, found), gradients = mx.compile(mx.value_and_grad(total, argnums=(0, 1)))(a["h"], a["w"])
    return [np.array(f) for f in found], *(np.array(g) for g in gradients)


def torch_results(
    p: dict[str, np.ndarray], kind: str, trained: bool, streamed: bool
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    import torch

    from mlx_posttrain.engines.torch import fused as torch_fused

    a = {name: torch.from_numpy(v if name == "target" else v.astype(np.float32)) for name, v in p.items()}
    h, w = a["h"].requires_grad_(True), a["w"].requires_grad_(trained)
    if kind == "logprobs":
        found = [torch_fused.logprobs(h, w, a["target"])]
    elif kind == "entropy":
        found = list(torch_fused.logprobs_and_entropy(h, w, a["target"]))
    else:
        found = list(
            torch_fused.logprobs_and_kl(h, w, a["h_ref"], a["w_ref"], a["target"], *direction_and_beta(kind))
        )
    sum((f * g).sum() for f, g in zip(found, a["weights"], strict=False)).backward()
    assert (w.grad is not None) == trained
    return (
        [f.detach().numpy() for f in found],
        h.grad.numpy(),
        (w.grad if trained else torch.zeros(V, D)).numpy(),
    )


RESULTS = {"mlx": mlx_results, "torch": torch_results}


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal to 1e-5 of the largest entry."""
    return bool(np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_plain_losses_for_every_chunk(name, kind, monkeypatch):
    p = problem(kind)
    values, d_h, d_w = truth(p, kind)
    for rows in range(1, N + 2):  # positions to a chunk, and 3 to 23 entries of the vocabulary
        monkeypatch.setattr(fused, "CHUNK_BYTES", rows * V * 4 + 3)
        assert max(s.stop - s.start for s in fused.chunks(N, V)) <= 2 * rows
        for trained, streamed, cached in (
            (True, False, 0),
            (True, False, 4),
            (True, False, N),
            (False, True, N),
            (False, False, N),
        ):
            if name == "torch" and not (trained or streamed):
                continue  # torch itself knows whether a gradient is wanted
            monkeypatch.setattr(fused, "CACHED_BYTES", cached * V * 4)
            positions = fused.cached_positions(N, V)
            assert (positions == N) == (cached == N) and positions <= cached
            found, got_h, got_w = RESULTS[name](p, kind, trained, streamed)
            case = rows, trained, streamed, cached
            assert all(near(a, b) for a, b in zip(found, values, strict=True)), case
            assert near(got_h, d_h), case
            assert near(got_w, d_w if trained else np.zeros((V, D))), case


def test_chunks_cover_every_position_once_and_fit_the_budget():
    for n in (1, 64, 166, 167, 2048):
        parts = fused.chunks(n, 50257)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
        assert all((part.stop - part.start) * 50257 * 4 <= fused.CHUNK_BYTES for part in parts)
    assert len(fused.chunks(3, 10**9)) == 3  # a chunk has at least one position
    assert [part.stop for part in fused.chunks(576, 50257)] == [128, 256, 384, 512, 576]  # whole panels
    assert [part.stop for part in fused.chunks(320, 50257)] == [128, 256, 320]
    assert [part.stop for part in fused.chunks(129, 50257)] == [128, 129]
    # a panel may take twice the budget
    assert [part.stop for part in fused.chunks(192, 151_936)] == [64, 128, 192]
    assert [part.stop for part in fused.chunks(64, 262_144)] == [32, 64]
    assert fused.chunks(0, 50257) == []


def test_gradients_are_cached_of_whole_chunks_that_fit():
    assert fused.cached_positions(576, 50257) == 576
    assert fused.cached_positions(4096, 50257) == 640
    assert fused.cached_positions(4096, 50257) * 50257 * 4 <= fused.CACHED_BYTES
    assert fused.cached_positions(64, 10**8) == 0  # not even the first chunk


def test_equal_distributions_have_no_divergence_and_likely_tokens_no_positive_logprob():
    """With logits as large as GPT-2's, far from zero, and a distribution with all its mass on one token."""
    z = np.array([[-140.0, -110.0, -112.0], [30.0, -900.0, -900.0]], np.float32)
    p, lse = fused.softmax(z)
    assert lse[:, 0] == pytest.approx(np.log(np.exp(z.astype(float) + 110).sum(1)) - 110, rel=1e-6)
    assert (z.max(1) - lse[:, 0] <= 0).all()
    for direction in ("forward", "reverse"):
        assert np.array_equal(fused.kl(z, p, lse, z, p, lse, direction), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="sideways"):
        fused.kl(z, p, lse, z, p, lse, "sideways")


# Through a model.


@pytest.fixture(params=ENGINES)
def engine(request):
    return engines.get(request.param)


def rows(seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(tuple(rng.integers(1, 256, n).tolist()), tuple([False] * (n // 3) + [True] * (n - n // 3)))
        for n in (12, 40, 25, 38, 9)
    ]


def plain_logprobs(model, batch: DeviceBatch, temperature: float = 1.0):
    return token_logprobs(model.logits(batch) / temperature, batch.target)


def plain_loss(model, batch: DeviceBatch):
    nll = token_mean(-plain_logprobs(model, batch), batch.mask, batch.total)
    return nll, {"nll": nll}


def plain_kl_loss(direction: str):
    def loss(model, batch: DeviceBatch):
        nll, _ = plain_loss(model, batch)
        kl = token_mean(
            full_kl(model.logits(batch), model.reference_logits(batch), direction), batch.mask, batch.total
        )
        return nll + 0.3 * kl, {"nll": nll, "kl": kl}

    return loss


def bonus_loss(plain: bool):
    """A policy gradient at temperature 0.7 with weights of both signs and an entropy bonus.

    The bonus needs the entropy's gradient too.
    """

    def loss(model, batch: DeviceBatch):
        if plain:
            logprobs, entropy = plain_logprobs(model, batch, 0.7), policy.entropy(model.logits(batch) / 0.7)
        else:
            logprobs, entropy, _ = model.policy_terms(batch, 0.7)
        sign = (batch.target % 2) * 2.0 - 1.0
        value = token_mean(-sign * logprobs - 0.1 * entropy, batch.mask, batch.total)
        return value, {"entropy": token_mean(entropy, batch.mask, batch.total)}

    return loss


LOSSES = {
    "sft": (sft.loss, plain_loss),
    "kl forward": (sft.kl_loss(0.3, "forward"), plain_kl_loss("forward")),
    "kl reverse": (sft.kl_loss(0.3, "reverse"), plain_kl_loss("reverse")),
    "policy": (bonus_loss(False), bonus_loss(True)),
}


@pytest.mark.parametrize(("adapter", "cached"), [(None, 0), (None, 50), (None, 10**3), ("lora", 0)])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_equal_those_of_the_plain_path(engine, random_gpt2, adapter, cached, loss, monkeypatch):
    """Several chunks, two micro-batches, three steps, gradients cached of no, some and all positions.

    AdamW's eps is large, or rounding of tiny gradients would become whole steps.
    """
    monkeypatch.setattr(fused, "CHUNK_BYTES", 50 * 400 * 4)
    monkeypatch.setattr(fused, "CACHED_BYTES", cached * 400 * 4)
    curves, weights = [], []
    for chosen in LOSSES[loss]:
        model = engine.load(random_gpt2)
        if adapter:
            model.add_adapter(AdapterSpec(rank=4, alpha=8), seed=3)
        model.keep_reference()
        trainer = engine.trainer(model, AdamW(eps=1e-3))
        curves.append(
            [trainer.step(chosen, [collate(rows()[:3], 64), collate(rows()[3:], 64)], 3e-3) for _ in range(3)]
        )
        weights.append(model.weights())
    for ours, theirs in zip(*curves, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name, weight in weights[0].items():
        assert np.abs(weight - weights[1][name]).max() <= 1e-5, name


def test_values_of_a_model_equal_the_plain_ones_and_the_reference_stays(engine, random_gpt2):
    model = engine.load(random_gpt2)
    model.add_adapter(AdapterSpec(rank=4, alpha=8), seed=3)
    engine.trainer(model, AdamW()).step(sft.loss, [collate(rows(), 64)], 1e-2)

    def read_off_chunks(m, b):
        logprobs, entropy, scores = m.policy_terms(b, 0.7)
        assert scores is None
        return {
            "logprobs": logprobs,
            "entropy": entropy,
            "reference": m.reference_logprobs(b, 0.7),
            "kl": m.logprobs_and_kl(b, "reverse")[1],
        }

    def plain(m, b):
        reference = m.reference_logits(b)
        return {
            "logprobs": plain_logprobs(m, b, 0.7),
            "entropy": policy.entropy(m.logits(b) / 0.7),
            "reference": token_logprobs(reference / 0.7, b.target),
            "kl": full_kl(m.logits(b), reference, "reverse"),
        }

    ours, theirs = (model.apply(f, [collate(rows(), 64)])[0] for f in (read_off_chunks, plain))
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, abs=2e-5), name


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_is_formed_for_a_frozen_head(engine, random_gpt2, loss, monkeypatch):
    """Without the function that forms it an adapter still trains, and a whole model does not."""
    monkeypatch.setattr(f"mlx_posttrain.engines.{engine.name}.fused._head_gradient", None)
    batch = collate(rows(), 64)
    model = engine.load(random_gpt2)
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    engine.trainer(model, AdamW()).step(LOSSES[loss][0], [batch], 1e-3)
    whole = engine.load(random_gpt2)
    whole.keep_reference()
    with pytest.raises(TypeError, match="NoneType"):
        engine.trainer(whole, AdamW()).step(LOSSES[loss][0], [batch], 1e-3)
    engine.seed(0)  # the failed step left MLX's random state half traced


def test_a_head_that_is_not_one_plain_matrix_takes_the_plain_path(engine, random_gpt2):
    batch = collate(rows(), 64)
    model = engine.load(random_gpt2)
    wanted = model.token_logprobs([batch])[0]
    model._split = False
    assert model._fused_head(model.net) is None
    assert model.token_logprobs([batch])[0] == pytest.approx(wanted, abs=1e-5)
    model.keep_reference()
    terms = model.apply(
        lambda m, b: dict(zip(("logprobs", "entropy"), m.policy_terms(b), strict=False)), [batch]
    )[0]
    assert terms["logprobs"] == pytest.approx(wanted, abs=1e-5)
    assert model.evaluate(sft.kl_loss(0.1, "forward"), [batch])["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_a_quantised_head_is_chunked_too(random_gpt2):
    import mlx.nn as nn

    model = engines.get("mlx").load(random_gpt2)
    nn.quantize(model.net, group_size=32, bits=8)
    assert model._fused_head(model.net) is not None
    assert np.isfinite(model.token_logprobs([collate(rows(), 64)])[0]).all()


# Memory.


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
@pytest.mark.parametrize("trained", [True, False])
def test_on_mlx_twice_the_positions_take_the_memory_of_one(trained, monkeypatch):
    """MLX allocates for operations that are still queued.

    Some twenty chunks are alive at once, however many there are in all.
    """
    import gc

    import mlx.core as mx

    from mlx_posttrain.engines.mlx import fused as mlx_fused

    monkeypatch.setattr(fused, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(fused, "CACHED_BYTES", 2**22)
    monkeypatch.setattr(fused, "PANEL", 1)
    v, d = 16384, 16

    def peak(n: int) -> int:
        h, w, target = mx.random.normal((n, d)), mx.random.normal((v, d)), mx.random.randint(0, v, (n,))
        mx.eval(h, w, target)

        def loss(h, w):
            values = mlx_fused.logprobs_and_kl(h, w, h, w, target, "forward", trained=trained, training=True)
            return mx.sum(values[0] - values[1])

        step = mx.compile(mx.value_and_grad(loss, argnums=(0, 1) if trained else 0))
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(h, w))
        return mx.get_peak_memory() - before

    one, two = peak(1024), peak(2048)
    assert two < 1.2 * one, f"{one / 2**20:.1f} and {two / 2**20:.1f} MB"
    assert two < 2048 * v * 4 / 3


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_torch_frees_the_cached_gradients_once_they_are_used():
    """A training loop holds the last loss, and with it the graph, until the next forward pass is through."""
    import gc
    import weakref

    import torch

    from mlx_posttrain.engines.torch import fused as torch_fused

    h, w, target = (
        torch.randn(9, 4, requires_grad=True),
        torch.randn(30, 4, requires_grad=True),
        torch.randint(0, 30, (9,)),
    )
    logprobs = torch_fused.logprobs(h, w, target)
    alive = [weakref.ref(o) for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (9, 30)]
    assert alive  # the cached gradients
    logprobs.sum().backward()
    assert [o for o in alive if o() is not None] == []


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_on_torch_a_tied_embedding_gets_one_gradient_made_in_place():
    """The gradient of both its uses, over two micro-batches, equals autograd's.

    It is added to what ``grad`` held before.
    """
    import torch

    from mlx_posttrain.engines.torch import fused as torch_fused

    torch.manual_seed(0)
    tokens, target = torch.tensor([[3, 1, 3], [0, 3, 7]]), torch.tensor([1, 3, 5, 3, 7, 0])

    def gradient(ours: bool) -> torch.Tensor:
        w = (torch.arange(40.0).reshape(10, 4) / 10).sin().requires_grad_(True)
        w.grad = torch.ones_like(w)
        for scale in (1.0, -2.0):
            if ours:
                found = torch_fused.logprobs(torch_fused.embed(tokens, w).flatten(0, 1).tanh() * 3, w, target)
            else:
                found = token_logprobs((w[tokens].flatten(0, 1).tanh() * 3) @ w.T, target)
            (scale * found * torch.arange(6.0)).sum().backward()
        return w.grad

    assert torch.allclose(gradient(True), gradient(False), atol=1e-6)


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
@pytest.mark.parametrize("cached", [0, 10**9])
def test_torch_trains_all_weights_in_bfloat16(random_gpt2, cached, monkeypatch):
    """Its gradients point where float32's do, however many are cached."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", 50 * 400 * 4)
    monkeypatch.setattr(fused, "CACHED_BYTES", cached)
    whole, half = (engines.get("torch").load(random_gpt2, dtype=dtype) for dtype in ("float32", "bfloat16"))
    whole.load_trained(random_gpt2)
    wanted, found = (model.gradient(sft.loss, [collate(rows(), 64)]) for model in (whole, half))
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"):
        a, b = wanted[name].ravel(), found[name].ravel()
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.995, name
    engines.get("torch").trainer(half, AdamW()).step(sft.loss, [collate(rows(), 64)], 1e-3)


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_torch_embeds_in_place_where_the_embedding_trains_and_has_no_row_apart(random_gpt2, monkeypatch):
    import torch

    from mlx_posttrain.engines.torch import fused as torch_fused
    from mlx_posttrain.engines.torch import model as torch_model

    calls, ours = [], torch_fused.embed
    monkeypatch.setattr(torch_fused, "embed", lambda tokens, w: calls.append(1) or ours(tokens, w))
    engine, batch = engines.get("torch"), collate(rows(), 64)
    model = engine.load(random_gpt2)
    model.token_logprobs([batch])
    assert not calls
    engine.trainer(model, AdamW()).step(sft.loss, [batch], 1e-3)
    assert len(calls) == 1
    model.net.set_input_embeddings(torch.nn.Embedding(400, model.net.config.n_embd, padding_idx=3))
    assert not torch_model._embeds(model.net)  # row 3 has no gradient
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    engine.trainer(model, AdamW()).step(sft.loss, [batch], 1e-3)
    assert len(calls) == 1


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_torch_finds_the_weight_whatever_holds_on_to_saved_tensors():
    import torch

    from mlx_posttrain.engines.torch import fused as torch_fused

    h, w, target = (
        torch.randn(9, 4, requires_grad=True),
        torch.randn(30, 4, requires_grad=True),
        torch.randint(0, 30, (9,)),
    )
    with torch.autograd.graph.save_on_cpu():
        torch_fused.logprobs(torch_fused.embed(target, w) + h, w, target).sum().backward()
    found, w.grad = w.grad, None
    token_logprobs((w[target] + h) @ w.T, target).sum().backward()
    assert torch.allclose(found, w.grad, atol=1e-5)


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_on_mlx_an_evaluation_caches_nothing(random_gpt2, monkeypatch):
    from mlx_posttrain.engines.mlx import fused as mlx_fused

    calls, ours = [], fused.cached_positions
    monkeypatch.setattr(mlx_fused.fused, "cached_positions", lambda *sizes: calls.append(1) or ours(*sizes))
    engine, batch = engines.get("mlx"), collate(rows(), 64)
    model = engine.load(random_gpt2)
    model.token_logprobs([batch])
    model.evaluate(sft.loss, [batch])
    assert not calls
    engine.trainer(model, AdamW()).step(sft.loss, [batch], 1e-3)
    assert calls


@pytest.mark.slow
@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
@pytest.mark.parametrize("trained", [True, False])
def test_torch_never_makes_all_logits(trained):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from mlx_posttrain.engines.torch import fused as torch_fused

    n, v, d = 2048, 50257, 64
    h, w, target = (
        torch.randn(n, d, requires_grad=True),
        torch.randn(v, d, requires_grad=trained),
        torch.randint(0, v, (n,)),
    )
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        t.numel()
                        for t in (out if isinstance(out, tuple | list) else [out])
                        if isinstance(t, torch.Tensor)
                    ),
                ]
            )
            return out

    with Watch():
        logprobs, kl = torch_fused.logprobs_and_kl(h, w, h.detach(), w.detach(), target, "forward")
        (logprobs - kl).sum().backward()
    assert largest * 4 <= max(fused.CHUNK_BYTES, v * d * 4)
