"""Likelihoods from a table, where every number is known, and of a tiny random GPT-2 on both engines."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data import encode
from mlx_posttrain.data.batches import Batch, collate
from mlx_posttrain.data.types import Conversation, Example, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import likelihood
from mlx_posttrain.evaluation.metrics import bootstrap, perplexity
from mlx_posttrain.ops import ops

CONTEXT = 64


class Table:
    """A bigram model: row i of the table holds the log-probabilities of the token after token i."""

    def __init__(self, vocabulary: int, context: int | None = CONTEXT, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.table = (
            ops(np.zeros(1)).log_softmax(rng.normal(0, 2, (vocabulary, vocabulary))).astype(np.float32)
        )
        self.context = context
        self.batches: list[Batch] = []

    def token_logprobs(self, batches: list[Batch]) -> list[np.ndarray]:
        self.batches += batches
        values = [self.table[b.tokens.reshape(-1)[b.index], b.target] for b in batches]
        # padded positions must not be used, so they get the worst value
        return [
            np.where(b.mask > 0, v, -np.inf).astype(np.float32) for b, v in zip(batches, values, strict=True)
        ]


class Counting(Table):
    """A model whose negative log-likelihood of a token is the number of inputs before it."""

    def token_logprobs(self, batches: list[Batch]) -> list[np.ndarray]:
        return [-(b.index % b.tokens.shape[1] + 1).astype(np.float32) for b in batches]


def test_response_loss_counts_the_trained_tokens_of_each_row():
    table = Table(10)
    examples = [
        Example((1, 2, 3, 4), (False, False, True, True)),
        Example((5, 6), (False, False)),  # nothing to score
        Example((7, *[8] * 40, 9), (False, *[True] * 41)),
        Example((3,), (True,)),  # a first token is never predicted
    ]
    nll, tokens = loss = likelihood.response_loss(table, examples, batch=2)
    log_p = table.table.astype(np.float64)
    assert tokens.tolist() == [2, 0, 41, 0]
    np.testing.assert_allclose(
        nll, [-log_p[2, 3] - log_p[3, 4], 0, -log_p[7, 8] - 39 * log_p[8, 8] - log_p[8, 9], 0], rtol=1e-6
    )
    assert math.isnan(loss.per_token[1]) and loss.per_token[0] == nll[0] / 2
    assert loss.mean == pytest.approx(nll.sum() / 43) == bootstrap(loss.per_token, weights=tokens).mean
    assert math.isnan(likelihood.response_loss(table, []).mean)


def test_long_rows_make_smaller_batches():
    table = Table(10, context=None)
    likelihood.response_loss(table, [Example((1,) * 1025, (True,) * 1025)] * 5, batch=32)
    assert [b.tokens.shape for b in table.batches] == [(2, 1024), (2, 1024), (1, 1024)]


def test_a_row_beyond_the_context_is_an_error():
    # the last token is no input
    likelihood.response_loss(Table(10), [Example((1,) * (CONTEXT + 1), (True,) * (CONTEXT + 1))])
    with pytest.raises(UserError, match="a row of 65 tokens does not fit"):
        likelihood.response_loss(Table(10), [Example((1,) * (CONTEXT + 2), (True,) * (CONTEXT + 2))])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 10, 37])
@pytest.mark.parametrize("window, stride", [(4, 4), (4, 2), (4, 1), (1, 1), (5, 3), (64, 64), (64, 7)])
def test_windows_score_every_token_exactly_once(length, window, stride):
    scored = []
    for i, (begin, end, count) in enumerate(likelihood.windows(length, window, stride)):
        assert begin == i * stride and 0 < count <= end - begin <= window
        first = end - count  # the first input whose prediction is scored
        assert i == 0 or first - begin >= window - stride
        assert i == 0 or count <= stride
        scored += range(first, end)
    assert scored == list(range(length))


def test_windows_by_hand():
    assert likelihood.windows(10, 4, 4) == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert likelihood.windows(10, 4, 2) == [(0, 4, 4), (2, 6, 2), (4, 8, 2), (6, 10, 2)]
    assert likelihood.windows(3, 4, 2) == [(0, 3, 3)]


def test_base_text_loss_uses_the_stated_context(tokenizer):
    text = "zqxzqxzqxz"  # no merge of the tokenizer
    assert len(tokenizer(text)["input_ids"]) == 10
    counting = Counting(len(tokenizer))

    def loss(**settings: int) -> float:
        nll, tokens = likelihood.base_text_loss(counting, tokenizer, [text], **settings)
        assert tokens.tolist() == [10]
        return nll[0]

    assert loss() == 55  # 1 + 2 + ... + 10: one window that begins with the start token
    assert loss(window=4) == loss(window=4, stride=4) == 10 + 10 + 3
    assert loss(window=4, stride=2) == 10 + 3 * (3 + 4)
    assert loss(window=4, stride=1) == 10 + 6 * 4
    assert loss(window=1) == 10


def test_base_text_loss_equals_the_sum_over_the_document(tokenizer, texts):
    table = Table(len(tokenizer))
    documents = [texts[0], "", texts[1] * 6, texts[2]]
    eos = encode.eos_id(tokenizer)
    expected, counts = [], []
    for text in documents:
        ids = [eos, *tokenizer(text)["input_ids"]]
        expected.append(-sum(float(table.table[a, b]) for a, b in pairwise(ids)))
        counts.append(len(ids) - 1)
    assert max(counts) > CONTEXT
    # a bigram model needs one token of context, so every window and stride must give the same loss
    for settings in (
        {},
        {"window": 7},
        {"window": 20, "stride": 3},
        {"window": CONTEXT, "stride": 1, "batch": 3},
    ):
        loss = likelihood.base_text_loss(table, tokenizer, documents, **settings)
        np.testing.assert_allclose(loss.nll, expected, rtol=1e-5)
        assert loss.tokens.tolist() == counts
    assert perplexity(*loss) == pytest.approx(math.exp(sum(expected) / sum(counts)))
    assert likelihood.base_text_loss(table, tokenizer, []).nll.shape == (0,)
    assert max(b.tokens.shape[1] for b in table.batches) <= CONTEXT


def test_losses_by_window_add_up_to_those_of_the_texts(model, tokenizer, texts):
    document, settings = [texts[1] * 6], {"window": 20, "stride": 8}
    by_text = likelihood.base_text_loss(model, tokenizer, document, **settings)
    by_window = likelihood.base_text_loss(model, tokenizer, document, **settings, by_window=True)
    windows = likelihood.windows(int(by_text.tokens[0]), 20, 8)
    assert by_window.tokens.tolist() == [w.scored for w in windows]
    assert by_window.nll.sum() == pytest.approx(by_text.nll[0])
    assert by_window.mean == pytest.approx(by_text.mean)
    kl = likelihood.base_text_kl(model, model, tokenizer, document, **settings, by_window=True)
    assert kl.tokens.tolist() == by_window.tokens.tolist()


@pytest.mark.parametrize(
    "settings", [{"window": CONTEXT + 1}, {"window": 0}, {"window": 8, "stride": 9}, {"stride": 0}]
)
def test_impossible_windows_are_errors(tokenizer, texts, settings):
    with pytest.raises(UserError, match="must lie between 1 and"):
        likelihood.base_text_loss(Table(len(tokenizer)), tokenizer, texts, **settings)


def test_embedded_texts_are_plain_prose():
    texts = likelihood.embedded_texts()
    assert len(texts) == len(set(texts)) == 40
    lengths = [len(text.split()) for text in texts]
    assert all(80 <= n <= 140 for n in lengths) and 4000 <= sum(lengths) <= 5000
    assert len({text[:12] for text in texts}) == 40
    for text in texts:
        assert text.isascii() and "\n" not in text and text == text.strip()
        assert not any(
            mark in text for mark in ("###", "Instruction", "Response", "Question:", "Answer:", "User:")
        )


# both engines


@cache
def transformers_model(folder: Path) -> Any:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def transformers_logprobs(folder: Path, tokens: list[int]) -> np.ndarray:
    """[T, V] log-probabilities of what follows each token."""
    net = transformers_model(folder)
    import torch

    with torch.no_grad():
        return net(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()


def test_token_logprobs_equal_transformers(model, folder, tokenizer, texts):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    examples = [Example(tuple(ids), tuple(i % 3 > 0 for i in range(len(ids)))) for ids in rows]
    batches = [collate(examples[:2], CONTEXT), collate(examples[2:], CONTEXT)]
    model.net.train()
    found = model.token_logprobs(batches)
    assert not model.net.training
    for batch, values in zip(batches, found, strict=True):
        assert (
            isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == batch.mask.shape
        )
        assert np.isfinite(values).all()
    for number, (ids, example) in enumerate(zip(rows, examples, strict=True)):
        batch, values, row = (batches[0], found[0], number) if number < 2 else (batches[1], found[1], 0)
        log_p = transformers_logprobs(folder, ids)
        expected = [log_p[i - 1, ids[i]] for i in range(1, len(ids)) if example.trained[i]]
        np.testing.assert_allclose(values[(batch.row == row) & (batch.mask > 0)], expected, atol=2e-5)


def test_the_engines_agree(folder):
    if len(engines.available()) < 2:
        pytest.skip("needs both engines")
    rng = np.random.default_rng(0)
    examples = [Example(tuple(rng.integers(1, 300, n).tolist()), (True,) * n) for n in (5, 20, 64)]
    batch = collate(examples, CONTEXT)
    ours, theirs = (engines.get(name).load(folder).token_logprobs([batch])[0] for name in ("mlx", "torch"))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_losses_on_an_engine_equal_one_pass_of_transformers(model, folder, tokenizer, texts):
    eos = encode.eos_id(tokenizer)
    loss = likelihood.base_text_loss(model, tokenizer, texts)
    for text, nll, tokens in zip(texts, *loss, strict=True):
        ids = [eos, *tokenizer(text)["input_ids"]]
        log_p = transformers_logprobs(folder, ids)
        assert tokens == len(ids) - 1
        assert nll == pytest.approx(-sum(log_p[i, ids[i + 1]] for i in range(tokens)), abs=1e-3)
    examples = [
        encode.encode(
            Conversation((Turn("user", text), Turn("assistant", "Yes."))), tokenizer, max_length=CONTEXT
        )
        for text in ("Hens?", "Rain on the roof?")
    ]
    loss = likelihood.response_loss(model, examples)
    from mlx_posttrain.methods import sft

    together = model.evaluate(sft.loss, [collate(examples, CONTEXT)])["nll"]
    assert loss.mean == pytest.approx(together, abs=1e-5)


def test_sliding_windows_on_an_engine_equal_a_pass_per_window(model, folder, tokenizer, texts):
    """Windows as long as the context over a longer text: the last target of a window is no input."""
    text = texts[1] * 6
    ids = [encode.eos_id(tokenizer), *tokenizer(text)["input_ids"]]
    assert len(ids) > 2 * CONTEXT
    expected = 0.0
    for begin, end, scored in likelihood.windows(len(ids) - 1, CONTEXT, 40):
        log_p = transformers_logprobs(folder, ids[begin:end])
        expected -= sum(log_p[i - begin, ids[i + 1]] for i in range(end - scored, end))
    nll, tokens = likelihood.base_text_loss(model, tokenizer, [text], window=CONTEXT, stride=40)
    assert tokens.tolist() == [len(ids) - 1]
    assert nll[0] == pytest.approx(expected, abs=2e-3)
