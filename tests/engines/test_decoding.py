"""Batched decoding.

The cache against full forward passes, rows independent of each other, sampling from the right distribution.
"""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError

ENGINES = engines.available()
PROMPTS = [[7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [21, 22, 23]]


@pytest.fixture(params=ENGINES)
def model(request, random_gpt2):
    return engines.get(request.param).load(random_gpt2)


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_left_padded_batch_equals_one_by_one_without_a_cache(model):
    """Tokens and log-probs of every row equal full forward passes over that row alone."""
    for row, done in zip(PROMPTS, model.generate(PROMPTS, max_tokens=20, stop=None)):
        assert len(done.tokens) == 20 and len(done.logprobs) == 20 and not done.stopped
        log_p = log_softmax(model.full_logits(np.array([row + done.tokens]))[0])
        for i, (token, logprob) in enumerate(zip(done.tokens, done.logprobs)):
            assert token == log_p[len(row) + i - 1].argmax()
            assert logprob == pytest.approx(log_p[len(row) + i - 1, token], abs=2e-5)


def test_a_rows_text_depends_on_the_seed_and_its_number_only(model):
    alone = model.generate(PROMPTS[:1], max_tokens=12, stop=None, temperature=1.0, seed=5)
    together = model.generate(PROMPTS, max_tokens=12, stop=None, temperature=1.0, seed=5)
    longer = model.generate(PROMPTS, max_tokens=20, stop=None, temperature=1.0, seed=5)
    other = model.generate(PROMPTS, max_tokens=12, stop=None, temperature=1.0, seed=6)
    assert alone[0].tokens == together[0].tokens == longer[0].tokens[:12]
    assert [c.tokens for c in together] != [c.tokens for c in other]


def test_samples_share_a_prefill_and_differ(model):
    both = model.generate(PROMPTS, max_tokens=8, stop=None, temperature=1.0, samples=3, seed=1)
    repeated = model.generate(
        [p for p in PROMPTS for _ in range(3)], max_tokens=8, stop=None, temperature=1.0, seed=1
    )
    assert [c.tokens for c in both] == [c.tokens for c in repeated]
    assert len({tuple(c.tokens) for c in both[:3]}) == 3


def test_rows_stop_alone_and_leave_the_batch(model):
    """Each row ends at its own stop token, and the rows that go on are not disturbed."""
    free = model.generate(PROMPTS, max_tokens=16, stop=None, temperature=1.0, seed=2)
    stop = free[1].tokens[3]
    cut = model.generate(PROMPTS, max_tokens=16, stop=stop, temperature=1.0, seed=2)
    for a, b in zip(free, cut):
        where = a.tokens.index(stop) if stop in a.tokens else None
        assert b.tokens == a.tokens[:where]
        assert b.stopped == (where is not None)
        assert len(b.logprobs) == len(b.tokens) + b.stopped
    assert cut[1].stopped


def test_any_of_several_tokens_stops_a_row(model):
    free = model.generate(PROMPTS, max_tokens=16, stop=None, temperature=1.0, seed=2)
    ends = {free[1].tokens[3], free[2].tokens[9]}
    for given in (ends, sorted(ends), tuple(ends)):
        cut = model.generate(PROMPTS, max_tokens=16, stop=given, temperature=1.0, seed=2)
        for a, b in zip(free, cut):
            first = next((i for i, token in enumerate(a.tokens) if token in ends), None)
            assert b.tokens == a.tokens[:first] and b.stopped == (first is not None)
            assert b.stop == (None if first is None else a.tokens[first])
    assert {c.stop for c in cut} >= ends
    assert not any(
        c.stopped for c in model.generate(PROMPTS, max_tokens=16, stop=(), temperature=1.0, seed=2)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 1.0, "top_p": 0.8, "seed": 4}]
)
def test_forbidden_tokens_are_never_sampled_and_the_others_share_their_probability(model, settings):
    free = model.generate(PROMPTS, max_tokens=12, stop=None, **settings)
    forbidden = sorted({c.tokens[2] for c in free} | {c.tokens[5] for c in free} | {0})
    stop = forbidden[0]
    done = model.generate(PROMPTS, max_tokens=12, stop=stop, forbidden=forbidden, **settings)
    for row, before, c in zip(PROMPTS, free, done):
        assert len(c.tokens) == 12 and not c.stopped and not set(c.tokens) & set(forbidden)
        log_p = log_softmax(model.full_logits(np.array([row + c.tokens]))[0])[len(row) - 1 : -1]
        log_allowed = np.log1p(-np.exp(log_p[:, forbidden]).sum(-1))  # the allowed tokens' probability
        assert c.logprobs == pytest.approx(log_p[np.arange(12), c.tokens] - log_allowed, abs=5e-5)
        if not settings:
            allowed = np.delete(log_p, forbidden, axis=-1).max(-1)
            assert log_p[np.arange(12), c.tokens] == pytest.approx(allowed, abs=2e-5)
        assert c.tokens != before.tokens


def test_answers_end_where_the_context_does(model):
    long = list(range(1, 61))
    done = model.generate([long, [5]], max_tokens=30, stop=None)
    assert [len(c.tokens) for c in done] == [4, 30]  # of a context of 64
    with pytest.raises(UserError, match="empty"):
        model.generate([[]], max_tokens=1, stop=None)


def test_streaming_gives_the_same_tokens(model):
    streamed = []
    (done,) = model.generate(
        [PROMPTS[1]],
        max_tokens=9,
        stop=None,
        temperature=0.8,
        seed=3,
        on_token=lambda row, token: streamed.append(token),
    )
    assert streamed == done.tokens


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("forbidden", [(), (0, 17, 40)])
def test_engines_sample_the_same_tokens(random_gpt2, top_p, forbidden):
    texts = [
        [
            c.tokens
            for c in engines.get(e)
            .load(random_gpt2)
            .generate(
                PROMPTS,
                max_tokens=24,
                stop=None,
                temperature=1.1,
                top_p=top_p,
                samples=4,
                seed=9,
                forbidden=forbidden,
            )
        ]
        for e in ENGINES
    ]
    assert texts[0] == texts[1]


def test_inverse_cdf_gives_the_softmax_distribution():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    n = 40_000
    uniforms = (np.arange(n)[:, None] + 0.5) / n  # an even grid: frequencies are exact to 1/n
    logits = np.log(p)[None].repeat(n, 0) * 2.0
    tokens, log_p = decoding.pick(logits, uniforms, 2.0, 1.0)  # temperature 2 undoes the factor 2
    assert np.bincount(tokens, minlength=4) / n == pytest.approx(p, abs=2e-4)
    assert log_p == pytest.approx(np.log(p)[tokens])


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    p = np.array([0.15, 0.5, 0.05, 0.3])
    n = 20_000
    uniforms = (np.arange(n)[:, None] + 0.5) / n
    tokens, log_p = decoding.pick(np.log(p)[None].repeat(n, 0), uniforms, 1.0, 0.7)
    assert np.bincount(tokens, minlength=4) / n == pytest.approx([0, 0.5 / 0.8, 0, 0.3 / 0.8], abs=2e-4)
    assert log_p == pytest.approx(np.log(p)[tokens])  # of the full softmax, not of the nucleus


def test_the_last_token_can_be_drawn_and_none_past_it():
    logits = np.zeros((1, 7), np.float32)
    tokens, _ = decoding.pick(logits, np.array([[np.float32(1) - np.finfo(np.float32).epsneg]]), 1.0, 1.0)
    assert tokens[0] == 6


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_no_token_of_probability_0_is_drawn_where_running_sums_are_not_monotone(top_p, monkeypatch):
    """As on Metal, whose parallel scan rounds each entry in an order of its own."""
    from mlx_posttrain.ops.numpy import NAMESPACE

    rng = np.random.default_rng(0)
    cumsum = NAMESPACE.cumsum

    def noisy(x, axis=-1):
        return (cumsum(x, axis=axis) + rng.normal(0, 1e-3, x.shape)).astype(x.dtype)

    monkeypatch.setattr(NAMESPACE, "cumsum", noisy)
    logits = np.where(np.arange(64) % 3 == 0, 0.0, -np.inf).astype(np.float32)[None].repeat(4000, 0)
    uniforms = np.append(rng.random(3999, np.float32), np.float32(1 - 2**-24))[:, None]
    tokens, log_p = decoding.pick(logits, uniforms, 1.0, top_p)
    assert set(tokens.tolist()) <= set(range(0, 64, 3)) and np.isfinite(log_p).all()


class Successor:
    """A decoder whose token after t is t + 1, and which notes how far its rows have gone."""

    def __init__(self, ahead, leave_at):
        self.ahead, self.leave_at, self.rows, self.passes, self.furthest = ahead, leave_at, [], 0, 0

    def _logits(self, tokens):
        return np.where(np.arange(100) == tokens[:, None] + 1, 9.0, 0.0).astype(np.float32)

    def prefill(self, prompts, samples):
        self.lengths = np.repeat([len(p) for p in prompts], samples)
        return self._logits(np.repeat([p[-1] for p in prompts], samples))

    def advance(self, tokens):
        self.passes += 1
        self.rows.append(len(tokens))
        self.lengths = self.lengths + 1
        self.furthest = max(self.furthest, self.lengths.max())
        return self._logits(tokens)

    def keep(self, rows, array):
        self.lengths = self.lengths[rows]
        return array[rows]

    def pick(self, logits, uniforms, temperature, top_p):
        picked = decoding.pick(logits, uniforms[:, None], temperature, top_p)
        return picked[0], picked

    def read(self, picked):
        return picked


@pytest.mark.parametrize("context", [None, 12])
@pytest.mark.parametrize("leave_at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ahead", [False, True])
def test_reading_a_step_late_returns_no_token_too_many(ahead, leave_at, context):
    """Rows that have stopped stay until enough have, but never outgrow the context."""
    prompts = [[1], [40, 41, 42], [60, 61], [80] * 11]
    decoder, seen = Successor(ahead, leave_at), []
    settings = {"max_tokens": 9, "stop": {5, 50, 69}, "temperature": 0.0, "top_p": 1.0, "samples": 1}
    done = decoding.decode(
        decoder, prompts, context=context, seed=0, on_token=lambda *pair: seen.append(pair), **settings
    )
    wanted = [[2, 3, 4], [*range(43, 50)], [*range(62, 69)], [81] if context else [*range(81, 90)]]
    assert [c.tokens for c in done] == wanted
    assert [c.stop for c in done] == [5, 50, 69, None]
    assert [len(c.logprobs) for c in done] == [4, 8, 8, 1 if context else 9]
    assert sorted(seen) == [(row, token) for row, tokens in enumerate(wanted) for token in tokens]
    assert context is None or decoder.furthest <= context
    longest = 8 if context else 9
    assert decoder.passes == longest - 1 + (ahead and context is not None)
    last = (
        {0.0: (1, 3), 0.5: (1, 4), 1.0: (4, 4)}
        if context is None
        else {0.0: (2, 2), 0.5: (3, 3), 1.0: (3, 3)}
    )
    assert decoder.rows[-1] == last[leave_at][ahead]


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_the_preallocated_cache_holds_what_transformers_own_holds(monkeypatch):
    """While it grows and rows are repeated and dropped; nothing is copied while there is room."""
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    from mlx_posttrain.engines.torch import decoding as torch_decoding

    monkeypatch.setattr(decoding, "TORCH_CACHE_BLOCK", 4)
    torch.manual_seed(0)
    torch_decoding._PreallocatedLayer().batch_repeat_interleave(2)  # before its first token
    both = [
        Cache(layer_class_to_replicate=kind) for kind in (torch_decoding._PreallocatedLayer, DynamicLayer)
    ]
    rows = 2
    for step, change in enumerate(["repeat", "", "drop", "", "", "drop", "", "", ""]):
        keys, values = (torch.randn(rows, 3, 3 if step == 0 else 1, 5) for _ in range(2))
        for layer in (0, 1):
            ours, theirs = (c.update(keys + layer, values, layer) for c in both)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
        if change == "repeat":
            for c in both:
                c.batch_repeat_interleave(3)
            rows *= 3
        if change == "drop":
            kept = torch.tensor([0, 2, 3, 5][: rows - 2])
            for c in both:
                c.batch_select_indices(kept)
            rows = len(kept)
        assert both[0].get_seq_length() == both[1].get_seq_length() == 3 + step
    buffer = both[0].layers[0]._buffers[0]
    assert buffer.shape[2] == 12 and both[0].layers[0].keys.data_ptr() == buffer.data_ptr()


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_a_cache_that_grows_while_rows_leave_gives_the_same_tokens(random_gpt2, monkeypatch):
    model = engines.get("torch").load(random_gpt2)

    def sampled():
        completions = model.generate(PROMPTS, max_tokens=40, stop=9, temperature=1.5, samples=4, seed=2)
        return [c.tokens for c in completions]

    in_one_block = sampled()
    assert len({len(tokens) for tokens in in_one_block}) > 2  # rows leave at different steps
    monkeypatch.setattr(decoding, "TORCH_CACHE_BLOCK", 3)
    assert sampled() == in_one_block


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_torch_decodes_through_the_whole_model_where_logits_are_more_than_products(random_gpt2, monkeypatch):
    from mlx_posttrain.engines.torch import decoding as torch_decoding
    from mlx_posttrain.engines.torch import model as torch_model

    model = engines.get("torch").load(random_gpt2)
    heads = []

    class Watched(torch_decoding.TorchDecoder):
        def __init__(self, net, head, precision):
            super().__init__(net, head, precision)
            heads.append(head)

    monkeypatch.setattr(torch_model, "TorchDecoder", Watched)
    tokens = []
    for split in (True, False):
        model._split = split
        completions = model.generate(PROMPTS, max_tokens=8, stop=None, temperature=1.0, seed=1)
        tokens.append([c.tokens for c in completions])
    assert heads[0] is not None and heads[1] is None and tokens[0] == tokens[1]
