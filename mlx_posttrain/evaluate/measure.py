"""What a model does on rows: its answers, the loss of its responses, the loss of base text, the loops of its
greedy continuations.

Everything here asks the :class:`~mlx_posttrain.engines.base.Model` protocol and returns one value per row, in
the rows' order, so that two models can be compared row by row (metrics.paired_bootstrap). Every prompt,
window and decoding setting is the same for every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain.data import encode, formats, tasks, templates
from mlx_posttrain.data.batches import LENGTH_MULTIPLE, POSITION_MULTIPLE, Batch, by_length, round_up
from mlx_posttrain.data.types import Conversation, Example, Labelled, Preference, Turn
from mlx_posttrain.engines.base import DeviceBatch, Generated, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluate.metrics import seq_rep_n
from mlx_posttrain.losses.sft import token_logprobs
from mlx_posttrain.ops import ops

TOKEN_BUDGET = 2048  # padded tokens of a scoring batch: with GPT-2's vocabulary their logits take 0.4 GB
# cached positions of a decode batch, 64 rows of 256 or 256 of 64: with GPT-2 124M they take 1.2 GB
DECODE_BUDGET = 16_384
KL_BUDGET = 512  # of two models at once, and in float32 on the host


class Answer(NamedTuple):
    """What the model said: its text without outer white space, its token ids without the stop token, whether
    it ended by itself.
    """

    text: str
    tokens: list[int]
    stopped: bool


class RowLoss(NamedTuple):
    """Negative log-likelihood of each row's scored tokens in nats, [R] float64, and how many they are, [R]
    int64.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """[R] mean loss of each row, nan for a row without tokens; weighted by ``tokens`` its mean is
        ``mean``.
        """
        return np.divide(self.nll, self.tokens, out=np.full(len(self.nll), np.nan), where=self.tokens > 0)

    @property
    def mean(self) -> float:
        """Nats per token over all rows, each token counting once; nan where there is no token."""
        return float(self.nll.sum() / self.tokens.sum()) if self.tokens.sum() else float("nan")


class Window(NamedTuple):
    """Inputs ``begin`` to ``end`` of a sequence, of whose predictions the last ``fresh`` are scored."""

    begin: int
    end: int
    fresh: int


# answers


def answers(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Conversation | Preference | Labelled | Mapping[str, Any]],
    *,
    template: str,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 256,
    begin: str = "",
) -> list[Answer]:
    """``samples`` answers to each row's prompt; entry ``r * samples + s`` is sample s of row r.

    rows: conversations (asked for their last answer), or rows of any format of data/formats.py,
    ``tasks.load`` among them; a row that is not templated is asked as it stands. Prompts of similar length
    decode together, at most ``batch`` rows at a time (one prompt's samples are never split), and fewer where
    they are long. A sampled text depends on ``seed``, on ``batch``, on ``max_tokens`` and on the rows; two
    models with one tokenizer meet the same random numbers. ``begin`` is put into the model's mouth: every
    answer goes on from it, and it is part of the text and not of the tokens. An answer is shorter than
    ``max_tokens`` where prompt and answer fill the context. Raises UserError for a row without a prompt, or a
    prompt that leaves no room in the context.
    """
    prompts = _encode(_prompts(rows), tokenizer, template, model.context)
    if begin:
        lead = templates.TEMPLATES[template].lead if template in templates.TEMPLATES else ""
        prompts = [p + tokenizer(lead + begin, add_special_tokens=False)["input_ids"] for p in prompts]
    completions = _generate(
        model,
        prompts,
        batch,
        stop=encode.eos_id(tokenizer),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
    )
    return [
        Answer((begin + tokenizer.decode(c.tokens)).strip(), list(c.tokens), c.stopped) for c in completions
    ]


def answers_without_cache(
    model: Model, tokenizer: Any, rows: Sequence[Conversation], *, template: str, max_tokens: int
) -> list[list[int]]:
    """Greedy answers of which every token saw the one before it and nothing else: a fault, made on purpose to
    be shown.

    It is what a decoder writes whose key/value cache stays empty, as transformers' does in training mode with
    gradient checkpointing on. Such a decoder is a map from tokens to tokens: it must stop or run into a loop
    within V steps, whatever the weights. Tokens of each row's answer, without EOS. Differs from transformers
    in that each token stands at position 0.
    """
    stop = encode.eos_id(tokenizer)
    last = np.array([ids[-1] for ids in _encode(_prompts(rows), tokenizer, template, model.context)])
    found: list[list[int]] = [[] for _ in rows]
    going = np.arange(len(rows))
    for _ in range(max_tokens):
        last = model.full_logits(last[:, None])[:, 0].argmax(-1)
        going, last = going[last != stop], last[last != stop]
        if not len(going):
            break
        for row, token in zip(going.tolist(), last.tolist(), strict=True):
            found[row].append(token)
    return found


def task_accuracy(
    rows: Sequence[Mapping[str, Any] | Conversation], found: Sequence[Answer | str]
) -> np.ndarray:
    """1 for each answer that the row's checker accepts, 0 for each other: [len(found)] float64.

    rows: R rows with a checker (``tasks.load``), or conversations made of them; found: R answers or, with S
    samples, R * S in the order of ``answers``; then ``.reshape(R, S).mean(1)`` has one value per row, which
    is what a bootstrap should draw. Range 0 to 1, ceiling 1. Raises ValueError where the numbers do not fit,
    UserError for a row without a known checker.
    """
    if len(found) % max(len(rows), 1) or len(found) < len(rows):
        raise ValueError(f"{len(found)} answers to {len(rows)} rows: every row needs as many as the others")
    samples = len(found) // max(len(rows), 1)
    right = []
    for i, answer in enumerate(found):
        row = rows[i // samples]
        spec = row.extra if isinstance(row, Conversation) else row
        right.append(tasks.check(spec, answer if isinstance(answer, str) else answer.text))
    return np.array(right, np.float64)


def _prompts(rows: Sequence[Any]) -> list[tuple[tuple[Turn, ...], bool]]:
    """Return for each row (turns before the answer, whether a template goes around them)."""
    if any(isinstance(row, Mapping) for row in rows):
        rows, dropped = formats.parse_rows(rows, source="rows to answer")
        if dropped:  # leaving them out would shift every later answer to another row
            raise UserError(
                f"rows to answer: {sum(dropped.values())} cannot be asked "
                f"({', '.join(dropped)}); remove them first"
            )
    found = []
    for row in rows:
        if isinstance(row, Conversation):
            turns = row.turns[:-1] if row.turns and row.turns[-1].role == "assistant" else row.turns
        else:
            turns = row.prompt
        if not turns:
            raise UserError("a row has no prompt: text alone has nothing to answer")
        found.append((tuple(turns), row.templated))
    return found


def _encode(
    prompts: Sequence[tuple[tuple[Turn, ...], bool]], tokenizer: Any, template: str, context: int | None
) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in prompts]
    for templated in (True, False):
        which = [i for i, (_, flag) in enumerate(prompts) if flag is templated]
        room = None if context is None else context - 1
        found = (
            encode.encode_prompts(
                [prompts[i][0] for i in which], tokenizer, template, room, templated=templated
            )
            if which
            else []
        )
        for i, row in zip(which, found, strict=True):
            ids[i] = row
    return ids


def _generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    batch: int,
    *,
    samples: int = 1,
    seed: int = 0,
    **settings: Any,
) -> list[Generated]:
    """``model.generate`` over any number of prompts, in batches of similar length that fit DECODE_BUDGET, in
    the prompts' order.
    """
    if batch < 1 or samples < 1:
        raise ValueError(f"batch {batch}, samples {samples}: both must be at least 1")
    found: list[Generated | None] = [None] * (len(prompts) * samples)
    limit = min(settings["max_tokens"], model.context or settings["max_tokens"])
    for number, group in enumerate(
        by_length([len(p) + limit for p in prompts], max(1, batch // samples), DECODE_BUDGET // samples)
    ):
        # generate() numbers the rows of each call from 0: with one seed, row i of every batch would be dealt
        # the same random numbers.
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        completions = model.generate([prompts[i] for i in group], samples=samples, seed=own, **settings)
        for place, completion in enumerate(completions):
            found[group[place // samples] * samples + place % samples] = completion
    return [c for c in found if c is not None]


# likelihood


def response_loss(model: Model, examples: Sequence[Example], batch: int = 32) -> RowLoss:
    """Loss of each example's trained tokens, as supervised training counts it: [R] sums of nats, [R] numbers
    of tokens.

    examples: encoded rows (data/encode.py), EOS included where an answer ends. A row without a trained token
    has 0 of both. At most ``batch`` rows are scored at once, and fewer where they are long. Raises UserError
    for a row beyond the model's context.
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
    """Loss of every token of each text on its own, for perplexity: [R] sums of nats, [R] numbers of tokens.

    ``by_window`` gives a value for each window instead of each text, in their order: of one long text a
    bootstrap can draw nothing else. What it then says is of more of the same text, and a little too sure
    where neighbouring windows are alike.

    The protocol. A text's L tokens stand after one start token (BOS where the tokenizer begins texts with it,
    else EOS: how GPT-2 saw documents begin), which is seen and not scored; no EOS is put at the end. The
    model reads windows of at most ``window`` tokens (default: the context, at most 512), which begin every
    ``stride`` tokens (default: ``window``), and a window scores those predictions that no earlier one did:
    all ``window`` in the first, ``stride`` in each later one, fewer in the last. So each of the L tokens is
    scored exactly once, and after the first window with at least ``window - stride`` tokens to its left.
    ``stride = window`` makes disjoint windows, cheap and a little too high, because each begins with little
    to go by; a smaller stride costs window / stride times as much. Texts never share a window.
    metrics.perplexity(*loss) is the figure per token, which depends on the tokenizer: compare models that
    share one.

    Texts without a token have 0 of both. Raises UserError for a window beyond the context or a stride outside
    1 to window. Source: sliding windows as in Baevski & Auli 2019, "Adaptive Input Representations for Neural
    Language Modeling".
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
    """KL(base || tuned) over the whole vocabulary, summed over each text's tokens: [R] nats, [R] numbers of
    tokens.

    Windows and ``by_window`` as in ``base_text_loss``. Range 0 (nothing changed) upwards; it sees what
    perplexity cannot, a model that predicts the text as well as before but would say other things. Both
    models must share the tokenizer. Raises UserError where they do not.
    """
    if base.config.get("vocab_size") != tuned.config.get("vocab_size"):
        raise UserError(
            "the two models have vocabularies of different size: a KL between them has no meaning"
        )
    rows, owner = _text_rows(base, tokenizer, texts, window, stride)
    sums = np.zeros(len(rows))
    for group in by_length([len(inputs) for inputs, _, _ in rows], 32, KL_BUDGET):
        packed = _batch([rows[i] for i in group], base.context)
        (p,), (q,) = (model.apply(_all_logprobs, [packed]) for model in (base, tuned))
        each = (np.exp(p["logprobs"]) * (p["logprobs"] - q["logprobs"])).sum(-1, dtype=np.float64)
        real = packed.weight > 0
        sums[group] = np.bincount(packed.row[real], each[real], len(group))
    kl = RowLoss(sums, np.array([int(scored.sum()) for _, _, scored in rows], np.int64))
    return kl if by_window else _per_text(*kl, owner, len(texts))


def _all_logprobs(model: Model, batch: DeviceBatch) -> dict[str, Any]:
    logits = model.logits(batch)
    return {"logprobs": ops(logits).log_softmax(logits, axis=-1)}


def last_words(
    model: Model, tokenizer: Any, texts: Sequence[str], batch: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Whether greedy decoding ends each text with its own last word, [R] 0 or 1, and what that word costs,
    [R] nats.

    The last word and the space before it are what is scored, all its tokens together; what stands before is
    given. Raises UserError for a text of one word. Of a text beyond the context its end is read. Source:
    LAMBADA (Paperno et al. 2016), as lm-eval-harness scores it.
    """
    rows = []
    start = encode.bos_ids(tokenizer)
    for number, text in enumerate(texts, 1):
        before, space, word = text.rstrip().rpartition(" ")
        if not before.strip():
            raise UserError(f"text {number} has no word before its last one")
        ids, last = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in (before, space + word)
        )
        sequence = np.array([*start, *ids, *last], np.int32)[-(model.context or len(text)) - 1 :]
        rows.append(
            (sequence[:-1], sequence[1:], np.arange(len(sequence) - 1) >= len(sequence) - 1 - len(last))
        )
    right, nll = np.ones(len(rows)), np.zeros(len(rows))
    for group in by_length([len(inputs) for inputs, _, _ in rows], batch, TOKEN_BUDGET):
        packed = _batch([rows[i] for i in group], model.context)
        (found,) = model.apply(_target_and_top, [packed])
        real = packed.weight > 0
        nll[group] = np.bincount(packed.row[real], -found["logprobs"][real].astype(np.float64), len(group))
        right[group] = (
            np.bincount(packed.row[real], found["top"][real] != packed.target[real], len(group)) == 0
        )
    return right, nll


def _target_and_top(model: Model, batch: DeviceBatch) -> dict[str, Any]:
    logits = model.logits(batch)
    return {"logprobs": token_logprobs(logits, batch.target), "top": ops(logits).argmax(logits, axis=-1)}


def _text_rows(
    model: Model, tokenizer: Any, texts: Sequence[str], window: int | None, stride: int | None
) -> tuple[list[_Row], list[int]]:
    """Return the windows over all texts as rows, and the text that each belongs to."""
    window = min(model.context or 512, 512) if window is None else window
    stride = window if stride is None else stride
    if window < 1 or (model.context is not None and window > model.context):
        raise UserError(
            f"window {window}: it must lie between 1 and the model's context of {model.context} tokens"
        )
    if not 1 <= stride <= window:
        raise UserError(
            f"stride {stride}: it must lie between 1 and the window of {window}, or tokens "
            "would not be scored"
        )
    start = encode.bos_ids(tokenizer) or [encode.eos_id(tokenizer)]
    rows, owner = [], []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        sequence = np.array([*start, *ids], np.int32)
        for begin, end, fresh in windows(len(ids), window, stride):
            scored = np.arange(begin, end) >= end - fresh
            rows.append((sequence[begin:end], sequence[begin + 1 : end + 1], scored))
            owner.append(number)
    return rows, owner


def _per_text(values: np.ndarray, tokens: np.ndarray, owner: list[int], texts: int) -> RowLoss:
    if not owner:
        return RowLoss(np.zeros(texts), np.zeros(texts, np.int64))
    return RowLoss(np.bincount(owner, values, texts), np.bincount(owner, tokens, texts).astype(np.int64))


def windows(length: int, window: int, stride: int) -> list[Window]:
    """Return the windows over a text of ``length`` tokens and the start token before it, each prediction
    fresh in exactly one.

    Input i, 0 being the start token, predicts token i of the text; the last token is predicted and never an
    input.
    """
    found: list[Window] = []
    scored = 0
    while scored < length:
        begin = len(found) * stride
        end = min(begin + window, length)
        found.append(Window(begin, end, end - scored))
        scored = end
    return found


# inputs, the token that each should predict, whether that is scored: [T] each
_Row = tuple[np.ndarray, np.ndarray, np.ndarray]


def _score(model: Model, rows: Sequence[_Row], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's summed loss and number of scored tokens."""
    if batch < 1:
        raise ValueError(f"batch {batch}: at least one row must fit")
    nll = np.zeros(len(rows))
    tokens = np.array([int(scored.sum()) for _, _, scored in rows], np.int64)
    for group in by_length([len(inputs) for inputs, _, _ in rows], batch, TOKEN_BUDGET):
        group = [i for i in group if tokens[i]]
        if group:
            packed = _batch([rows[i] for i in group], model.context)
            (logprobs,) = model.token_logprobs([packed])
            real = packed.weight > 0
            nll[group] = np.bincount(packed.row[real], -logprobs[real].astype(np.float64), len(group))
    return nll, tokens


def _batch(rows: Sequence[_Row], context: int | None) -> Batch:
    """Pad rows to one batch; unlike ``collate`` the last target is no input, so a window may fill the
    context.
    """
    longest = max(len(inputs) for inputs, _, _ in rows)
    length = round_up(longest, LENGTH_MULTIPLE)
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
    extra = round_up(len(index), POSITION_MULTIPLE) - len(index)
    flat = [np.pad(part, (0, extra)).astype(np.int32) for part in (index, target, row)]
    weight = np.pad(np.ones(len(index), np.float32), (0, extra))
    return Batch(inputs, flat[0], flat[1], weight, flat[2])


# continuations


def continuations(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 256,
) -> list[list[int]]:
    """Token ids that follow each opening, ``max_tokens`` of them always; entry ``r * samples + s`` is sample
    s of opening r.

    Openings are continued as they stand, no template around them and no repetition penalty. EOS is forbidden,
    and so is never in a continuation: measures of repetition compare only equal lengths, and what a model
    says after the end of a text is not about it. Raises UserError where an opening and ``max_tokens`` do not
    fit the context together.
    """
    if model.context is not None and max_tokens >= model.context:
        raise UserError(
            f"max_tokens {max_tokens} leaves no room for an opening in the model's context of "
            f"{model.context}; lower it"
        )
    room = None if model.context is None else model.context - max_tokens
    ids = encode.encode_prompts(
        [(Turn("user", text),) for text in prompts], tokenizer, max_length=room, templated=False
    )
    completions = _generate(
        model,
        ids,
        batch,
        stop=None,
        forbidden=(encode.eos_id(tokenizer),),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
    )
    return [list(c.tokens) for c in completions]


def repetition(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    n: int = 4,
    batch: int = 256,
) -> np.ndarray:
    """seq-rep-n of the greedy continuation of each opening: [R] float64.

    See ``continuations`` for how they are made and metrics.seq_rep_n for formula, range and ceiling, here 1 -
    1 / (max_tokens - n + 1). Source: Welleck et al. 2020, who continue 50 tokens by 100.
    """
    return np.array(
        [
            seq_rep_n(tokens, n)
            for tokens in continuations(model, tokenizer, prompts, max_tokens=max_tokens, batch=batch)
        ]
    )


def openings(texts: Sequence[str], words: int = 16) -> list[str]:
    """The first ``words`` words of each text, without the white space after them; a shorter text is left
    out.
    """
    found = [text.split(maxsplit=words) for text in texts]
    return [
        text[: len(text) - len(parts[words])].rstrip()
        for text, parts in zip(texts, found, strict=True)
        if len(parts) > words
    ]


def base_text() -> list[str]:
    """The embedded held-out passages of plain English, written for this project and in no training data of
    it.
    """
    lines = (
        (resources.files("mlx_posttrain.assets") / "base_text.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [json.loads(line)["text"] for line in lines if line.strip()]
