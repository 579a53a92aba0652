"""Likelihood of rows and texts: loss of answers, loss and KL of base text, and the last word of a text.

Everything here uses the :class:`~mlx_posttrain.engines.base.Model` protocol and returns one value per row, in
the order of the rows, so that two models can be compared row by row (metrics.paired_bootstrap). Every window
is the same for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain import assets
from mlx_posttrain.data.batches import Batch, by_length, padded_length, padded_positions
from mlx_posttrain.data.tokens import Place, bos_ids, start_ids, tokenise_pieces
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import DeviceBatch, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.losses.sft import full_kl, token_logprobs
from mlx_posttrain.ops import ops

TOKEN_BUDGET = 2048  # padded tokens of a scoring batch: with GPT-2's vocabulary their logits take 0.4 GB
KL_BUDGET = 512  # the same for a KL, which holds the logits of two models

#: Inputs, the token that each should predict, and whether that prediction is scored: [T] each.
ScoredRow = tuple[np.ndarray, np.ndarray, np.ndarray]


class RowLoss(NamedTuple):
    """Summed negative log-likelihood of each row's scored tokens.

    ``nll`` is in nats, [R] float64; ``tokens`` is the number of scored tokens, [R] int64.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """Mean loss of each row, [R], nan for a row without tokens.

        Its mean weighted by ``tokens`` is ``mean``.
        """
        return np.divide(self.nll, self.tokens, out=np.full(len(self.nll), np.nan), where=self.tokens > 0)

    @property
    def mean(self) -> float:
        """Nats per token over all rows, each token counting once; nan where there is no token."""
        return float(self.nll.sum() / self.tokens.sum()) if self.tokens.sum() else float("nan")


class Window(NamedTuple):
    """Inputs ``begin`` to ``end`` of a sequence, of whose predictions the last ``scored`` are scored."""

    begin: int
    end: int
    scored: int


def response_loss(model: Model, examples: Sequence[Example], batch: int = 32) -> RowLoss:
    """Loss of each example's trained tokens, counted as in supervised training.

    examples: R encoded rows (data/encode.py), including EOS where an answer ends. A row without a trained
    token has neither nats nor tokens. At most ``batch`` rows are scored at once, and fewer where they are
    long. Raises UserError for a row longer than the model's context.
    """
    rows = [
        (
            np.asarray(e.tokens[:-1], np.int32),
            np.asarray(e.tokens[1:], np.int32),
            np.asarray(e.trained[1:], bool),
        )
        for e in examples
    ]
    nll, tokens = _score(model, rows, batch)
    return RowLoss(nll, tokens)


def base_text_loss(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 32,
    by_window: bool = False,
) -> RowLoss:
    """Loss of every token of each text, for perplexity; each of R texts is read on its own.

    ``by_window`` returns a value for each window instead of each text, in their order. Of a single long text
    a bootstrap can draw nothing else; its interval then is about more of the same text, and a little too
    narrow where neighbouring windows are alike.

    The L tokens of a text follow one start token (BOS where the tokenizer begins texts with it, else EOS, as
    documents began in GPT-2's training), which is an input and not scored; no EOS is appended. The model
    reads windows of at most ``window`` tokens (default: the context, at most 512), which begin every
    ``stride`` tokens (default: ``window``). A window scores the predictions that no earlier one did: all
    ``window`` in the first, ``stride`` in each later one, fewer in the last. So each of the L tokens is
    scored exactly once, and after the first window with at least ``window - stride`` tokens to its left.
    ``stride = window`` makes disjoint windows, which are cheap but give a loss that is a little too high,
    because each begins with little context; a smaller stride costs window / stride times as much. Texts never
    share a window. metrics.perplexity(*loss) is the perplexity per token, which depends on the tokenizer:
    compare models that share one.

    Texts without a token have neither nats nor tokens. Raises UserError for a window longer than the context
    or a stride outside 1 to window. Source: sliding windows as in Baevski & Auli 2019, "Adaptive Input
    Representations for Neural Language Modeling".
    """
    rows, owner = _text_rows(model, tokenizer, texts, window, stride)
    loss = RowLoss(*_score(model, rows, batch))
    return loss if by_window else _per_text(*loss, owner, len(texts))


def base_text_kl(
    base: Model,
    tuned: Model,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    by_window: bool = False,
) -> RowLoss:
    """KL(base || tuned) over the whole vocabulary, summed over each text's tokens.

    The result holds it as ``nll``, [R] in nats. Windows and ``by_window`` are as in ``base_text_loss``. Range
    0 (nothing changed) upwards. It shows what perplexity cannot: a model that predicts the text as well as
    before but would write something else. Raises UserError where the models' vocabularies differ in size;
    they must share the tokenizer.
    """
    if base.config.get("vocab_size") != tuned.config.get("vocab_size"):
        raise UserError(
            "the two models have vocabularies of different size: a KL between them has no meaning"
        )
    rows, owner = _text_rows(base, tokenizer, texts, window, stride)

    def divergence(model: Model, batch: DeviceBatch) -> dict[str, Any]:
        return {"kl": full_kl(tuned.logits(batch), model.logits(batch), "forward")}

    sums = np.zeros(len(rows))
    for group in by_length([len(inputs) for inputs, _, _ in rows], 32, KL_BUDGET):
        packed = make_batch([rows[i] for i in group], base.context)
        (values,) = base.apply(divergence, [packed], beside=[tuned])
        each = values["kl"].astype(np.float64)
        real = packed.mask > 0
        sums[group] = np.bincount(packed.row[real], each[real], len(group))
    kl = RowLoss(sums, np.array([int(scored.sum()) for _, _, scored in rows], np.int64))
    return kl if by_window else _per_text(*kl, owner, len(texts))


def last_words(
    model: Model, tokenizer: Any, texts: Sequence[str], batch: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Whether greedy decoding predicts each text's last word, [R] 0 or 1, and that word's loss, [R] nats.

    The last word and the space before it are scored, all their tokens together, given the text before them.
    Of a text longer than the context the end is read. Raises UserError for a text of one word. Source:
    LAMBADA (Paperno et al. 2016), as lm-eval-harness scores it.
    """
    rows = []
    start = bos_ids(tokenizer)
    pieces: list[tuple[tuple[str, Place], tuple[str, Place]]] = []
    for number, text in enumerate(texts, 1):
        before, space, word = text.rstrip().rpartition(" ")
        if not before.strip():
            raise UserError(f"text {number} has no word before its last one")
        pieces.append(((before, "beginning"), (space + word, "text")))
    ids = tokenise_pieces(tokenizer, [piece for both in pieces for piece in both])
    for before_piece, last_piece in pieces:
        last = ids[last_piece]
        sequence = np.array([*start, *ids[before_piece], *last], np.int32)
        sequence = sequence[-(model.context or len(sequence)) - 1 :]
        rows.append(
            (sequence[:-1], sequence[1:], np.arange(len(sequence) - 1) >= len(sequence) - 1 - len(last))
        )
    correct, nll = np.ones(len(rows)), np.zeros(len(rows))
    for group in by_length([len(inputs) for inputs, _, _ in rows], batch, TOKEN_BUDGET):
        packed = make_batch([rows[i] for i in group], model.context)
        (values,) = model.apply(target_and_top, [packed])
        real = packed.mask > 0
        nll[group] = np.bincount(packed.row[real], -values["logprobs"][real].astype(np.float64), len(group))
        correct[group] = (
            np.bincount(packed.row[real], values["top"][real] != packed.target[real], len(group)) == 0
        )
    return correct, nll


def target_and_top(model: Model, batch: DeviceBatch) -> dict[str, Any]:
    """``logprobs`` of the targets and the most likely token (``top``) at each position of a batch."""
    logits = model.logits(batch)
    return {"logprobs": token_logprobs(logits, batch.target), "top": ops(logits).argmax(logits, axis=-1)}


def _text_rows(
    model: Model, tokenizer: Any, texts: Sequence[str], window: int | None, stride: int | None
) -> tuple[list[ScoredRow], list[int]]:
    """The windows over all texts as rows, and the number of the text that each belongs to."""
    window = min(model.context or 512, 512) if window is None else window
    stride = window if stride is None else stride
    if window < 1 or (model.context is not None and window > model.context):
        raise UserError(
            f"window {window}: it must lie between 1 and the model's context of {model.context} tokens"
        )
    if not 1 <= stride <= window:
        raise UserError(
            f"stride {stride}: it must lie between 1 and the window of {window}, or some tokens "
            "would not be scored"
        )
    start = start_ids(tokenizer)
    rows, owner = [], []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        sequence = np.array([*start, *ids], np.int32)
        for begin, end, count in windows(len(ids), window, stride):
            scored = np.arange(begin, end) >= end - count
            rows.append((sequence[begin:end], sequence[begin + 1 : end + 1], scored))
            owner.append(number)
    return rows, owner


def _per_text(values: np.ndarray, tokens: np.ndarray, owner: list[int], texts: int) -> RowLoss:
    if not owner:
        return RowLoss(np.zeros(texts), np.zeros(texts, np.int64))
    return RowLoss(np.bincount(owner, values, texts), np.bincount(owner, tokens, texts).astype(np.int64))


def windows(length: int, window: int, stride: int) -> list[Window]:
    """The windows over a start token and a text of ``length`` tokens; each prediction is scored in one.

    Input i, 0 being the start token, predicts token i of the text; the last token is predicted and never an
    input.
    """
    all_windows: list[Window] = []
    scored = 0
    while scored < length:
        begin = len(all_windows) * stride
        end = min(begin + window, length)
        all_windows.append(Window(begin, end, end - scored))
        scored = end
    return all_windows


def _score(model: Model, rows: Sequence[ScoredRow], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's summed loss in nats and its number of scored tokens, [R] each."""
    if batch < 1:
        raise ValueError(f"batch {batch}: at least one row must fit")
    nll = np.zeros(len(rows))
    tokens = np.array([int(scored.sum()) for _, _, scored in rows], np.int64)
    for group in by_length([len(inputs) for inputs, _, _ in rows], batch, TOKEN_BUDGET):
        group = [i for i in group if tokens[i]]
        if group:
            packed = make_batch([rows[i] for i in group], model.context)
            (logprobs,) = model.token_logprobs([packed])
            real = packed.mask > 0
            nll[group] = np.bincount(packed.row[real], -logprobs[real].astype(np.float64), len(group))
    return nll, tokens


def make_batch(rows: Sequence[ScoredRow], context: int | None) -> Batch:
    """Pad rows to one batch.

    Unlike in ``collate`` the last target is no input, so that a window may fill the context. Raises UserError
    for a row longer than the context.
    """
    longest = max(len(inputs) for inputs, _, _ in rows)
    length = padded_length(longest)
    if context is not None:
        if longest > context:
            raise UserError(
                f"a row of {longest} tokens does not fit the model's context of {context}; "
                f"encode it with max_length={context}"
            )
        length = min(length, context)
    inputs = np.zeros((len(rows), length), np.int32)
    for r, (ids, _, _) in enumerate(rows):
        inputs[r, : len(ids)] = ids
    index = np.concatenate([r * length + np.flatnonzero(scored) for r, (_, _, scored) in enumerate(rows)])
    target = np.concatenate([targets[scored] for _, targets, scored in rows])
    row = np.repeat(np.arange(len(rows)), [scored.sum() for _, _, scored in rows])
    extra = padded_positions(len(index)) - len(index)
    flat = [np.pad(part, (0, extra)).astype(np.int32) for part in (index, target, row)]
    mask = np.pad(np.ones(len(index), np.float32), (0, extra))
    return Batch(inputs, flat[0], flat[1], flat[2], mask, np.ones_like(mask))


def embedded_texts() -> list[str]:
    """The embedded passages of plain English, written for this project and held out of its training data."""
    return [row["text"] for row in assets.rows("base_text.jsonl")]
