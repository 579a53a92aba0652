"""Answers from a model: a batch of prompts, or a conversation that streams."""

from __future__ import annotations

import sys
from typing import Any

from mlx_posttrain.data import encode
from mlx_posttrain.data.types import Turn
from mlx_posttrain.loading import Source, open_model


def template_for(source: Source, tokenizer: Any, template: str | None) -> tuple[str, bool]:
    """(template, whether to apply it): what was asked for, a run's own, a chat model's own, or the plain text."""
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
) -> list[dict[str, Any]]:
    """``samples`` answers to each prompt: {"prompt", "answer", "tokens", "stopped"} in order.

    ``stopped`` tells whether the answer ended by itself. Raises UserError for an unknown model or a prompt beyond the context.
    """
    model, tokenizer, source = open_model(name, engine)
    chosen, templated = template_for(source, tokenizer, template)
    room = model.context - 1 if model.context else None
    ids = encode.encode_prompts([(Turn("user", p),) for p in prompts], tokenizer, chosen, room, templated=templated)
    completions = model.generate(
        ids, max_tokens=max_tokens, stop=encode.eos_id(tokenizer), temperature=temperature, top_p=top_p, samples=samples, seed=seed
    )
    return [
        {"prompt": prompts[i // samples], "answer": tokenizer.decode(c.tokens).strip(), "tokens": len(c.tokens), "stopped": c.stopped}
        for i, c in enumerate(completions)
    ]


def chat(name: str, *, engine: str, template: str | None, max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Read lines from standard input and stream answers to standard output until the input ends."""
    model, tokenizer, source = open_model(name, engine)
    chosen, templated = template_for(source, tokenizer, template)
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
        turns.append(Turn("user", line))
        ids = _fitting(turns, tokenizer, chosen, templated, model.context, max_tokens)
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


def _fitting(turns: list[Turn], tokenizer: Any, template: str, templated: bool, context: int | None, max_tokens: int) -> list[int]:
    # A long conversation forgets its oldest exchange first; the last question must fit by itself.
    while True:
        limit = context - 1 if context and len(turns) == 1 else None
        ids = encode.encode_prompts([tuple(turns)], tokenizer, template, limit, templated=templated)[0]
        if context is None or len(turns) == 1 or len(ids) + min(max_tokens, context // 2) <= context:
            return ids
        del turns[:2]


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
