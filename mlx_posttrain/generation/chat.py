"""A conversation with a model in the terminal; answers stream."""

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
    chat goes on. options: as of LoadedModel.chat.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not end a chat
    messages: list[dict[str, str]] = []
    asked = 0
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
            answer = model.chat(messages, seed=seed + asked, on_token=printer, **options)
        except UserError as error:
            messages.pop()
            log(f"mlx-posttrain: {error}")
            continue
        asked += 1
        printer.finish()
        messages.append({"role": "assistant", "content": answer})


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
