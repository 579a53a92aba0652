"""A conversation with a model in the terminal, with streaming answers."""

from __future__ import annotations

import io
import sys
from typing import Any

from mlx_posttrain.console import log
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import LoadedModel


def chat(model: LoadedModel, *, seed: int = 0, **options: Any) -> None:
    """Read lines from standard input and stream answers to standard output until the input ends.

    ``/new`` starts over. A line that leaves no room for an answer in the model's context is refused, and the
    chat continues. options: as of LoadedModel.chat.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end a chat
    messages: list[dict[str, str]] = []
    answered = 0
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        printer = _Printer(model.tokenizer)
        try:
            answer = model.chat(messages, seed=seed + answered, on_token=printer, **options)
        except UserError as error:
            messages.pop()
            log(f"mlx-posttrain: {error}")
            continue
        answered += 1
        printer.finish()
        messages.append({"role": "assistant", "content": answer})


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
