"""Who answers the questions of ``synthesize``: a model that the engine loads, or one behind an address."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_posttrain.console import log
from mlx_posttrain.data import encode
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.generation.model import template_for
from mlx_posttrain.generation.server import Answer, Server
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source

if TYPE_CHECKING:
    from mlx_posttrain.generation.synthesize import Settings

CHUNK = 64  # questions between two writes of the output: what a crash or Ctrl-C can cost

Chat = tuple[Turn, ...]


class Local:
    """A teacher that the engine loads.

    ``identity``: what tells it from others of its name.
    """

    def __init__(self, name: str, engine: str, settings: Settings, dtype: str | None = None):
        self.model, self.tokenizer, source = open_model(name, engine, dtype)
        self.template, self.templated = template_for(source, self.tokenizer, settings.template)
        self.identity = {"weights": _weights_hash(source)}
        self.system = settings.system or source.system
        self.seed: int | None = settings.seed or 0
        self.settings = settings

    def answers(self, asked: Sequence[Chat], begin: int) -> Iterator[list[list[Answer] | None]]:
        """Yield ``samples`` answers to each question from ``begin`` on, CHUNK questions at a time.

        None stands for a question beyond the context.
        """
        settings, context = self.settings, self.model.context
        for first in range(begin, len(asked), CHUNK):
            chats = asked[first : first + CHUNK]
            ids = encode.encode_prompts(chats, self.tokenizer, self.template, templated=self.templated)
            fitting = [context is None or len(row) < context for row in ids]
            # One seed per chunk: a resumed command samples the same candidates as an uninterrupted one.
            entropy = np.random.SeedSequence([self.seed or 0, first])
            completions = decoding.in_batches(
                self.model,
                [row for row, fits in zip(ids, fitting, strict=True) if fits],
                max_tokens=settings.max_tokens,
                samples=settings.samples,
                stop=stop_ids(self.tokenizer),
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=int(entropy.generate_state(1)[0]),
            )
            found = (Answer(self.tokenizer.decode(c.tokens).strip(), c.stopped) for c in completions)
            yield [list(islice(found, settings.samples)) if fits else None for fits in fitting]


class Remote:
    """A teacher behind an address, which applies its own prompt format.

    Raises UserError for settings that only a loaded teacher takes.
    """

    template: str | None = None
    templated = True

    def __init__(self, server: Server, settings: Settings):
        if settings.template is not None:
            raise UserError(
                "--template belongs to a teacher that is loaded here; a server applies its model's own"
            )
        self.identity = {"url": server.url}
        self.system, self.seed = settings.system, settings.seed
        self.server, self.settings = server, settings

    def answers(self, asked: Sequence[Chat], begin: int) -> Iterator[list[list[Answer] | None]]:
        """Yield ``samples`` answers to each question from ``begin`` on, one question at a time.

        Raises UserError as ``Server.ask``, and where the server does not take the first question.
        """
        found = self.server.ask(self._requests(asked, begin))
        for number in range(begin, len(asked)):
            answers = list(islice(found, self.settings.samples))
            refused = [a.refusal for a in answers if a.refusal is not None]
            if refused and number == 0:
                raise UserError(f"{self.server.url} does not take the first question: {refused[0]}")
            if refused:
                log(f"question {number + 1}: {self.server.url} does not take it: {refused[0]}")
            yield [answers]

    def _requests(self, asked: Sequence[Chat], begin: int) -> Iterator[dict[str, Any]]:
        """The body of every request; each has its own seed, if there is one."""
        for number in range(begin, len(asked)):
            for sample in range(self.settings.samples):
                body: dict[str, Any] = {
                    "messages": [{"role": turn.role, "content": turn.content} for turn in asked[number]],
                    "temperature": self.settings.temperature,
                    "top_p": self.settings.top_p,
                    "max_tokens": self.settings.max_tokens,
                }
                if self.seed is not None:
                    entropy = np.random.SeedSequence([self.seed, number, sample])
                    body["seed"] = int(entropy.generate_state(1)[0]) >> 1  # servers take 31 bits
                yield body


def _weights_hash(source: Source) -> str:
    """Return 16 hex digits of a hash over the teacher's weight files: a name alone may change its meaning."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (source.folder, source.adapter):
        for file in sorted(folder.glob("*.safetensors")) if folder is not None else []:
            with file.open("rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
