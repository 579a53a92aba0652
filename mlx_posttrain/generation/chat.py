"""A conversation with a model in the terminal, with streaming answers."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

from mlx_posttrain.console import log, shown
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import LoadedModel

HELP = """\
/system TEXT   start over with a system prompt; without TEXT, with the model's own
/reset         start over; what was said is forgotten (/new does the same)
/help          this list
/exit          end the chat, as an empty line or Ctrl-D does"""


def chat(model: LoadedModel, *, seed: int = 0, **options: Any) -> None:
    """Read lines from standard input and stream answers to standard output until the input ends.

    ``HELP`` has the commands; any other line is said to the model. A line that leaves no room for an answer
    in the model's context is refused, and the chat continues. options: as of LoadedModel.chat.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end a chat
    begin: list[dict[str, str]] = []
    messages: list[dict[str, str]] = []
    answered = 0
    if sys.stdin.isatty():
        log(f"talking to {model.name}: type a message; /help lists commands, an empty line ends")
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("", "/exit", "/quit"):
            return
        command, _, rest = line.partition(" ")
        if command == "/help":
            log(HELP)
            continue
        if command == "/system" or line in ("/reset", "/new"):
            if command == "/system":
                begin = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            messages = [*begin]
            log("starting over" + (", with this system prompt" if begin else ""))
            continue
        if re.fullmatch("/[a-z]+", line):
            log(f"there is no command {line}; /help lists them")
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
            sys.stdout.write(shown(text[len(self.printed) :]))
            sys.stdout.flush()
            self.printed = text

    def finish(self) -> None:
        print(flush=True)
