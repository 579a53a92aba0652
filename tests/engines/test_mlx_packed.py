"""Packed rows on MLX against padded ones: the same losses, hidden states and gradients from fewer tokens."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_posttrain.data.batches import PACKING, PackingRule, collate, padded_length, round_up  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines.base import AdamW, AdapterSpec  # noqa: E402
from mlx_posttrain.engines.mlx import lean as mlx_lean  # noqa: E402
from mlx_posttrain.engines.mlx import packed as mlx_packed  # noqa: E402
from mlx_posttrain.engines.mlx.cpu import attention as mlx_attention  # noqa: E402
from mlx_posttrain.engines.mlx.engine import MLXEngine  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from tests.counts import operations  # noqa: E402
from tests.packed_rows import OTHER, PROMPT, RNG, ROWS, SHARED, row  # noqa: E402


@pytest.fixture(params=["full", "lora", "lean", "stock attention", "mixed", "new tokens"])
def model(request, random_gpt2, monkeypatch):
    if request.param == "lean":
        monkeypatch.setattr(mlx_lean, "LEAN_ABOVE", 0)
    if request.param == "stock attention":
        monkeypatch.setattr(mlx_attention, "use_in", lambda net: None)
    found = MLXEngine().load(random_gpt2, mixed=request.param == "mixed")
    if request.param in ("lora", "new tokens"):
        found.add_adapter(
            AdapterSpec(rank=4, tokens=(7, 300) if request.param == "new tokens" else ()), seed=0
        )
        for _, layer in found.adapted():
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    assert found.shares_prefixes
    found.exactness = 30.0 if request.param == "mixed" else 1.0
    return found


def outputs(model, batch, threshold: float):
    """Log-probabilities, and one step's gradients; threshold: share of padded tokens to pack below."""

    def loss(model, batch):
        return (batch.mask * model.logprobs(batch) * (1 + batch.index % 3)).sum(), {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PACKING, "mlx", PackingRule(threshold, 64))
        return model.token_logprobs([batch])[0], model.gradient(loss, [batch])


@pytest.mark.parametrize("rows", ROWS)
def test_packed_rows_compute_what_padded_ones_do(model, rows):
    batch = collate(ROWS[rows], model.context)
    real = batch.mask > 0
    padded, wanted = outputs(model, batch, -1.0)
    packed, found = outputs(model, batch, 2.0)
    off = model.exactness
    np.testing.assert_allclose(packed[real], padded[real], rtol=1e-4 * off, atol=1e-5 * off)
    assert found.keys() == wanted.keys() and len(found) > 3
    for name, gradient in wanted.items():
        size = float(np.abs(gradient).max())
        np.testing.assert_allclose(
            found[name], gradient, rtol=1e-3 * off, atol=(2e-5 * size + 1e-6) * off**2, err_msg=name
        )


def test_steps_are_those_of_padded_rows(random_gpt2, monkeypatch):
    """Compiled, with another batch of the same shape after the first, and the reference's copy beside."""
    steps = [SHARED, [row(PROMPT, 5), row(OTHER, 3), row(PROMPT, 17), row(PROMPT, 4), row(OTHER, 9)]]
    found = []
    for threshold in (-1.0, 2.0):
        monkeypatch.setitem(PACKING, "mlx", PackingRule(threshold, 64))
        model = MLXEngine().load(random_gpt2)
        model.keep_reference()
        trainer = MLXEngine().trainer(model, AdamW())
        losses = [trainer.step(sft.loss, [collate(rows)], 1e-3) for rows in steps * 2]
        kl = model.evaluate(lambda m, b: (sum(m.logprobs_and_kl(b, "forward")).sum(), {}), [collate(SHARED)])
        found.append([*(v for step in losses for v in step.values()), kl["loss"]])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_a_prompt_is_read_once_and_padding_never():
    batch = collate(SHARED)
    found = {name.removeprefix(mlx_packed.PREFIX): value for name, value in mlx_packed.arrays(batch).items()}
    tokens = 9 + 6 + (4 + 2 + 16 + 1 + 10)  # the last token of each completion predicts nothing
    assert found["tokens"].shape == found["positions"].shape == (round_up(tokens, PACKING["mlx"].multiple),)
    assert not found["tokens"][tokens:].any()
    assert found["rows"].shape == (5, padded_length(9 + 16))
    for r, example in enumerate(SHARED):
        n = len(example.tokens) - 1
        assert found["tokens"][found["rows"][r, :n]].tolist() == list(example.tokens[:n])
        assert found["positions"][found["rows"][r, :n]].tolist() == list(range(n))
    assert found["owned"].sum() == tokens
    # each place of the rows is some token's first or one of its copies, once
    places = np.concatenate([found["rows.first"], found["rows.copies"].ravel()])
    real = np.sort(places[places < found["rows"].size])
    assert real.tolist() == [
        r * found["rows"].shape[1] + t for r, e in enumerate(SHARED) for t in range(len(e.tokens) - 1)
    ]


def test_gradients_gather_and_never_scatter(random_gpt2):
    """A scatter adds in any order on a GPU; what is left is that of the embeddings' own rows."""
    model = MLXEngine().load(random_gpt2)
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    batch = model.to_device(collate(SHARED), 1.0)

    def loss(parameters):
        model.net.update(parameters)
        return (batch.mask * model.logprobs(batch)).sum()

    assert f"{mlx_packed.PREFIX}tokens" in batch.extra
    gradients = mx.grad(loss)(model.net.trainable_parameters())
    assert not [one for one in operations(gradients) if "scatter" in one.lower()]


def test_what_cannot_be_packed_stays_as_it_is(random_gpt2):
    rows = [Example((r, *RNG.integers(1, 300, 31).tolist()), (False,) * 3 + (True,) * 29) for r in range(4)]
    assert mlx_packed.arrays(collate(rows)) == {}
    model = MLXEngine().load(random_gpt2)
    model.add_adapter(AdapterSpec(rank=4, dropout=0.5), seed=0)  # whose mask differs from row to row
    assert not model.shares_prefixes and not model.to_device(collate(SHARED), 1.0).extra
    assert not MLXEngine().load(random_gpt2, gradient_checkpointing=True).shares_prefixes
