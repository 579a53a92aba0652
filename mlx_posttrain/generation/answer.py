"""Answers from a model: a batch of prompts, or a conversation that streams."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

from mlx_posttrain.console import say
from mlx_posttrain.data import encode
from mlx_posttrain.data.types import Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source


def template_for(source: Source, tokenizer: Any, template: str | None) -> tuple[str, bool]:
    """(template, whether to apply it): what was asked for, a run's own, a chat model's own, or the plain
    text.
    """
    chosen = template or source.template or ("chat" if getattr(tokenizer, "chat_template", None) else "none")
    return ("instruction", False) if chosen == "none" else (chosen, True)


def answer(
    name: str,
    prompts: list[str],
    *,
    engine: str = "auto",
    template: str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    samples: int = 1,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """``samples`` answers to each prompt: {"prompt", "answer", "tokens", "stopped"} in order, as each decode
    batch ends.

    ``stopped`` tells whether the answer ended by itself. Raises UserError for an unknown model or a prompt
    beyond the context.
    """
    model, tokenizer, source = open_model(name, engine)
    chosen, templated = template_for(source, tokenizer, template)
    room = model.context - 1 if model.context else None
    before = (Turn("system", source.system),) if source.system and templated else ()
    ids = encode.encode_prompts(
        [(*before, Turn("user", p)) for p in prompts], tokenizer, chosen, room, templated=templated
    )
    completions = decoding.in_batches(
        model,
        ids,
        max_tokens=max_tokens,
        stop=encode.eos_id(tokenizer),
        temperature=temperature,
        top_p=top_p,
        samples=samples,
        seed=seed,
    )
    for i, c in enumerate(completions):
        text = tokenizer.decode(c.tokens).strip()
        yield {"prompt": prompts[i // samples], "answer": text, "tokens": len(c.tokens), "stopped": c.stopped}


def chat(
    name: str,
    *,
    engine: str,
    template: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Read lines from standard input and stream answers to standard output until the input ends.

    A line that leaves no room for an answer in the model's context is refused, and the chat goes on.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not end a chat
    model, tokenizer, source = open_model(name, engine)
    chosen, templated = template_for(source, tokenizer, template)
    before = (Turn("system", source.system),) if source.system and templated else ()
    turns: list[Turn] = []
    asked = 0
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/new":
            turns = []
            continue
        try:
            turns, ids = _fitting(
                before, [*turns, Turn("user", line)], tokenizer, chosen, templated, model.context, max_tokens
            )
        except UserError as error:
            say(f"mlx-posttrain: {error}")
            continue
        printer = _Printer(tokenizer)
        completion = model.generate(
            [ids],
            max_tokens=max_tokens,
            stop=encode.eos_id(tokenizer),
            temperature=temperature,
            top_p=top_p,
            seed=seed + asked,
            on_token=printer,
        )[0]
        asked += 1
        printer.finish()
        turns.append(Turn("assistant", tokenizer.decode(completion.tokens).strip()))


def _fitting(
    before: tuple[Turn, ...],
    turns: list[Turn],
    tokenizer: Any,
    template: str,
    templated: bool,
    context: int | None,
    max_tokens: int,
) -> tuple[list[Turn], list[int]]:
    """What is remembered of a conversation after ``before``, which is never forgotten, and its token ids.
    Raises UserError when the last question does not fit by itself.
    """
    # A long conversation forgets its oldest exchange first.
    while True:
        limit = context - 1 if context and len(turns) == 1 else None
        ids = encode.encode_prompts([(*before, *turns)], tokenizer, template, limit, templated=templated)[0]
        if context is None or len(turns) == 1 or len(ids) + min(max_tokens, context // 2) <= context:
            return turns, ids
        turns = turns[2:]


class _Printer:
    """Prints tokens as text arrives; a character whose bytes are not all there yet waits."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = ""

    def __call__(self, row: int, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens).lstrip()
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(self.shown) :])
            sys.stdout.flush()
            self.shown = text

    def finish(self) -> None:
        print(flush=True)
