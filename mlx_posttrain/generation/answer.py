"""Answers from a model, to a batch of prompts or in a chat that streams."""

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
    """Return (template, whether to apply it).

    The template is the one given, the run's, the chat model's own, or none, in this order of precedence.
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
    """Yield ``samples`` answers to each prompt, in order, as each decoded batch ends.

    An answer is {"prompt", "answer", "tokens", "stopped"}, with the number of tokens and whether the answer
    ended by itself. Raises UserError for an unknown model, and for a prompt longer than the context.
    """
    model, tokenizer, source = open_model(name, engine)
    chosen, templated = template_for(source, tokenizer, template)
    longest = model.context - 1 if model.context else None
    system = (Turn("system", source.system),) if source.system and templated else ()
    ids = encode.encode_prompts(
        [(*system, Turn("user", p)) for p in prompts], tokenizer, chosen, longest, templated=templated
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

    A line that leaves no room for an answer in the model's context is refused, and the chat continues.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end a chat
    model, tokenizer, source = open_model(name, engine)
    chosen, templated = template_for(source, tokenizer, template)
    system = (Turn("system", source.system),) if source.system and templated else ()
    turns: list[Turn] = []
    answered = 0
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
            turns, ids = _fit(
                system, [*turns, Turn("user", line)], tokenizer, chosen, templated, model.context, max_tokens
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
            seed=seed + answered,
            on_token=printer,
        )[0]
        answered += 1
        printer.finish()
        turns.append(Turn("assistant", tokenizer.decode(completion.tokens).strip()))


def _fit(
    system: tuple[Turn, ...],
    turns: list[Turn],
    tokenizer: Any,
    template: str,
    templated: bool,
    context: int | None,
    max_tokens: int,
) -> tuple[list[Turn], list[int]]:
    """Return (the turns that fit into the context, their token ids with ``system`` before them).

    The oldest exchanges of a long conversation are dropped, the system turn never. Raises UserError if the
    last question does not fit by itself.
    """
    while True:
        limit = context - 1 if context and len(turns) == 1 else None
        ids = encode.encode_prompts([(*system, *turns)], tokenizer, template, limit, templated=templated)[0]
        if context is None or len(turns) == 1 or len(ids) + min(max_tokens, context // 2) <= context:
            return turns, ids
        turns = turns[2:]


class _Printer:
    """Prints tokens as they arrive, each character once all of its bytes are known."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.printed = ""

    def __call__(self, row: int, token: int) -> None:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens).lstrip()
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(self.printed) :])
            sys.stdout.flush()
            self.printed = text

    def finish(self) -> None:
        print(flush=True)
