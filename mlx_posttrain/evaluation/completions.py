"""What a model writes: its answers to rows, and its continuations of base text.

Everything here uses the :class:`~mlx_posttrain.engines.base.Model` protocol and returns one value per row or
sample, in the order of the rows, so that two models can be compared row by row (metrics.paired_bootstrap).
Every prompt and decoding setting is the same for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_posttrain.data import encode, formats, tasks
from mlx_posttrain.data.batches import by_length
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.engines.base import Generated, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation.metrics import seq_rep_n

# cached positions of a decode batch, 64 rows of 256 or 256 of 64: with GPT-2 124M they take 1.2 GB
DECODE_BUDGET = 16_384


class Answer(NamedTuple):
    """One answer of a model.

    ``text`` is without outer white space, ``tokens`` without the stop token, and ``stopped`` says whether the
    model ended the answer rather than the limit.
    """

    text: str
    tokens: list[int]
    stopped: bool


# answers


def generate_answers(
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
    prefix: str = "",
) -> list[Answer]:
    """``samples`` answers to each row's prompt; entry ``r * samples + s`` is sample s of row r.

    rows: conversations, whose last answer is generated, or rows of any format of data/formats.py, including
    those of ``tasks.load``; a row that is not templated is used as it is. Prompts of similar length decode
    together, at most ``batch`` rows at a time (samples of one prompt are never split), and fewer where they
    are long. A sampled text depends on ``seed``, ``batch``, ``max_tokens`` and the rows; two models with one
    tokenizer get the same random numbers. prefix: the beginning of every answer, which the model continues;
    it is part of the text but not of the tokens. An answer is shorter than ``max_tokens`` where prompt and
    answer fill the context. Raises UserError for a row without a prompt, or a prompt that leaves no room in
    the context.
    """
    prompts = _encode(_prompts(rows), tokenizer, template, model.context, prefix)
    completions = _generate(
        model,
        prompts,
        batch,
        stop=stop_ids(tokenizer),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
    )
    return [
        Answer((prefix + tokenizer.decode(c.tokens)).strip(), list(c.tokens), c.stopped) for c in completions
    ]


def generate_without_cache(
    model: Model, tokenizer: Any, rows: Sequence[Conversation], *, template: str, max_tokens: int
) -> list[list[int]]:
    """Greedy answers in which every token attends only to the one before it; a deliberate fault.

    This is what a decoder writes whose key/value cache stays empty, as that of transformers does in training
    mode with gradient checkpointing on. Such a decoder is a map from tokens to tokens: it must stop or run
    into a loop within V steps, whatever the weights. Returns the tokens of each row's answer without EOS.
    Differs from transformers in that each token is at position 0.
    """
    stop = stop_ids(tokenizer)
    last = np.array([ids[-1] for ids in _encode(_prompts(rows), tokenizer, template, model.context)])
    answers: list[list[int]] = [[] for _ in rows]
    unfinished = np.arange(len(rows))
    for _ in range(max_tokens):
        last = model.full_logits(last[:, None])[:, 0].argmax(-1)
        unfinished, last = unfinished[~np.isin(last, stop)], last[~np.isin(last, stop)]
        if not len(unfinished):
            break
        for row, token in zip(unfinished.tolist(), last.tolist(), strict=True):
            answers[row].append(token)
    return answers


def task_accuracy(
    rows: Sequence[Mapping[str, Any] | Conversation], answers: Sequence[Answer | str]
) -> np.ndarray:
    """1 for each answer that the row's checker accepts and 0 for each other: [len(answers)] float64.

    rows: R rows with a checker (``tasks.load``), or conversations made of them; answers: R answers or, with S
    samples, R * S in the order of ``generate_answers``; then ``.reshape(R, S).mean(1)`` has one value per
    row, which is what a bootstrap should draw. Range 0 to 1, ceiling 1. Raises ValueError where the numbers
    do not match, UserError for a row without a known checker.
    """
    if len(answers) % max(len(rows), 1) or len(answers) < len(rows):
        raise ValueError(f"{len(answers)} answers to {len(rows)} rows: every row needs the same number")
    samples = len(answers) // max(len(rows), 1)
    correct = []
    for i, answer in enumerate(answers):
        row = rows[i // samples]
        spec = row.extra if isinstance(row, Conversation) else row
        correct.append(tasks.check(spec, answer if isinstance(answer, str) else answer.text))
    return np.array(correct, np.float64)


def _prompts(rows: Sequence[Any]) -> list[tuple[tuple[Turn, ...], bool]]:
    """(turns before the answer, whether a template goes around them) of each row."""
    if any(isinstance(row, Mapping) for row in rows):
        rows, dropped = formats.parse_rows(rows, source="rows to answer")
        if dropped:  # leaving them out would shift every later answer to another row
            raise UserError(
                f"rows to answer: {sum(dropped.values())} cannot be used as questions "
                f"({', '.join(dropped)}); remove them first"
            )
    prompts = []
    for row in rows:
        if isinstance(row, Conversation):
            turns = row.turns[:-1] if row.turns and row.turns[-1].role == "assistant" else row.turns
        else:
            turns = row.prompt
        if not turns:
            raise UserError("a row has no prompt: plain text alone cannot be answered")
        prompts.append((tuple(turns), row.templated))
    return prompts


def _encode(
    prompts: Sequence[tuple[tuple[Turn, ...], bool]],
    tokenizer: Any,
    template: str,
    context: int | None,
    prefix: str = "",
) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in prompts]
    for templated in (True, False):
        places = [i for i, (_, flag) in enumerate(prompts) if flag is templated]
        room = None if context is None else context - 1
        encoded = (
            encode.encode_prompts(
                [prompts[i][0] for i in places], tokenizer, template, room, templated=templated, answer=prefix
            )
            if places
            else []
        )
        for i, row in zip(places, encoded, strict=True):
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
    """``model.generate`` over any number of prompts, in the order of the prompts.

    They decode in batches of similar length that fit DECODE_BUDGET.
    """
    if batch < 1 or samples < 1:
        raise ValueError(f"batch {batch}, samples {samples}: both must be at least 1")
    completions: list[Generated | None] = [None] * (len(prompts) * samples)
    limit = min(settings["max_tokens"], model.context or settings["max_tokens"])
    for number, group in enumerate(
        by_length([len(p) + limit for p in prompts], max(1, batch // samples), DECODE_BUDGET // samples)
    ):
        # generate() numbers the rows of each call from 0: with one seed for all calls, row i of every batch
        # would get the same random numbers.
        batch_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        generated = model.generate([prompts[i] for i in group], samples=samples, seed=batch_seed, **settings)
        for place, completion in enumerate(generated):
            completions[group[place // samples] * samples + place % samples] = completion
    return [c for c in completions if c is not None]


# continuations


def generate_continuations(
    model: Model,
    tokenizer: Any,
    openings: Sequence[str],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    batch: int = 256,
) -> list[list[int]]:
    """``max_tokens`` token ids after each opening; entry ``r * samples + s`` is sample s of opening r.

    Openings are used as they are, without a template or a repetition penalty. What ends a text is forbidden,
    and so never in a continuation: measures of repetition can only be compared at equal length, and what a
    model writes after the end of a text is not about that text. Raises UserError where an opening and
    ``max_tokens`` do not fit the context together.
    """
    if model.context is not None and max_tokens >= model.context:
        raise UserError(
            f"max_tokens {max_tokens} leaves no room for an opening in the model's context of "
            f"{model.context}; lower it"
        )
    room = None if model.context is None else model.context - max_tokens
    ids = encode.encode_prompts(
        [(Turn("user", text),) for text in openings], tokenizer, max_length=room, templated=False
    )
    completions = _generate(
        model,
        ids,
        batch,
        stop=None,
        forbidden=stop_ids(tokenizer),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
    )
    return [list(c.tokens) for c in completions]


def greedy_repetition(
    model: Model,
    tokenizer: Any,
    openings: Sequence[str],
    *,
    max_tokens: int = 64,
    n: int = 4,
    batch: int = 256,
) -> np.ndarray:
    """seq-rep-n of the greedy continuation of each opening: [R] float64.

    See ``generate_continuations`` for the continuations and metrics.seq_rep_n for formula, range and ceiling,
    here 1 - 1 / (max_tokens - n + 1). Source: Welleck et al. 2020, who continue 50 tokens by 100.
    """
    return np.array(
        [
            seq_rep_n(tokens, n)
            for tokens in generate_continuations(
                model, tokenizer, openings, max_tokens=max_tokens, batch=batch
            )
        ]
    )


def split_texts(texts: Sequence[str], words: int = 16) -> list[tuple[str, str]]:
    """(the first ``words`` words, the rest of the text) of each text; shorter texts are left out.

    The rest begins with the white space after the words.
    """
    found = []
    for text in texts:
        parts = text.split(maxsplit=words)
        if len(parts) > words:
            opening = text[: len(text) - len(parts[words])].rstrip()
            found.append((opening, text[len(opening) :]))
    return found
