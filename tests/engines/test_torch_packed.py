"""Packed rows against padded ones: the same hidden states and gradients from fewer tokens."""

import pytest

torch = pytest.importorskip("torch")

from mlx_posttrain.data import batches  # noqa: E402
from mlx_posttrain.data.batches import collate  # noqa: E402
from mlx_posttrain.data.types import Example  # noqa: E402
from mlx_posttrain.engines.base import AdamW, AdapterSpec  # noqa: E402
from mlx_posttrain.engines.torch import packed as torch_packed  # noqa: E402
from mlx_posttrain.engines.torch.engine import TorchEngine  # noqa: E402
from mlx_posttrain.engines.torch.model import to_device  # noqa: E402
from mlx_posttrain.methods import sft  # noqa: E402
from tests.packed_rows import OTHER, PROMPT, RNG, ROWS, SHARED, row  # noqa: E402


@pytest.fixture(params=["full", "lora", "checkpointing"])
def model(request, random_gpt2):
    found = TorchEngine().load(random_gpt2, gradient_checkpointing=request.param == "checkpointing")
    if request.param == "lora":
        found.add_adapter(AdapterSpec(rank=4), seed=0)
        with torch.no_grad():
            for name, p in found.net.named_parameters():
                if "lora_B" in name:
                    p.add_(0.1 * torch.randn_like(p))
    return found


def outputs(model, batch, threshold: float):
    """Hidden states at the batch's positions, and the gradients of a function of them.

    threshold: share of the padded tokens below which rows are packed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(batches.PACKING, "torch", batches.PackingRule(threshold, 1))
        model.net.train()
        hidden = model._hidden(model.net, to_device(batch, 1.0))
        (torch.from_numpy(batch.mask)[:, None] * hidden**3).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.trained_parameters() if p.grad is not None}
        model.net.zero_grad()
    return hidden.detach(), gradients


@pytest.mark.parametrize("rows", ROWS)
def test_packed_rows_compute_what_padded_ones_do(model, rows):
    batch = collate(ROWS[rows], model.context)
    padded, wanted = outputs(model, batch, -1.0)
    packed, found = outputs(model, batch, 2.0)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)
    assert found.keys() == wanted.keys() and len(found) > 3
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-6, msg=name
        )


def test_a_prompt_is_read_once_and_padding_never():
    batch = collate(SHARED, None)
    packing = torch_packed.pack(batch.tokens, batch.index)
    # Two prompts, and each completion without its last token, which predicts nothing that is trained.
    assert packing.tokens.shape == (1, 9 + 6 + (4 + 2 + 16 + 1 + 10))
    for r, example in enumerate(SHARED):
        n = len(example.tokens) - 1
        assert packing.tokens[0, packing.place[r, :n]].tolist() == list(example.tokens[:n])
        assert packing.positions[0, packing.place[r, :n]].tolist() == list(range(n))


def test_a_template_before_all_prompts_hides_no_prompt_from_its_answers():
    """All rows begin alike; the second prompt is shared as the first is."""
    rows = [row((5, 6, *PROMPT), 4), row((5, 6, *PROMPT), 3), row((5, 6, *OTHER), 2), row((5, 6, *OTHER), 6)]
    batch = collate(rows, None)
    assert torch_packed.pack(batch.tokens, batch.index).tokens.shape == (1, 2 + 9 + 6 + (3 + 2 + 1 + 5))


def test_rows_without_anything_to_gain_stay_as_they_are():
    rows = [Example(tuple(RNG.integers(1, 300, 33).tolist()), (False,) * 3 + (True,) * 30) for _ in range(4)]
    rows = [Example((r, *e.tokens[1:]), e.trained) for r, e in enumerate(rows)]
    batch = collate([Example(e.tokens[:32], e.trained[:32]) for e in rows], None)
    assert torch_packed.pack(batch.tokens, batch.index) is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_share_no_dropout(random_gpt2, dropout, monkeypatch):
    model = TorchEngine().load(random_gpt2)
    model.add_adapter(AdapterSpec(rank=4, dropout=dropout), seed=0)
    packed = []
    monkeypatch.setattr(torch_packed, "pack", lambda tokens, index: packed.append(len(tokens)))
    batch = collate(SHARED, model.context)
    TorchEngine().trainer(model, AdamW()).step(sft.loss, [batch], 1e-3)
    assert packed == ([] if dropout else [5])
    model.token_logprobs([batch])  # no dropout in evaluation mode
    assert len(packed) == (1 if dropout else 2)
