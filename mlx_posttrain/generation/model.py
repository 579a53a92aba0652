"""A model with its tokenizer and prompt format, which generates answers and scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.data import encode, pairs
from mlx_posttrain.data.batches import by_length, by_row, collate
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards.scorer import score_rows

BATCH = 16  # rows whose log-probabilities are computed at once


class LoadedModel:
    """A model that generates and scores. Open one with :func:`load`."""

    def __init__(self, name: str | Path, engine: str = "auto", dtype: str | None = None):
        self.model, self.tokenizer, self.source = open_model(name, engine, dtype, scores=None)
        self.name = str(name)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Return the text of one answer to each prompt, or of ``samples`` in order; see :meth:`answers`."""
        return [a["answer"] for a in self.answers(prompts, **options)]

    def answers(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        template: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield ``samples`` answers to each prompt: {"prompt", "answer", "tokens", "stopped"}, by batches.

        max_tokens: longest answer. temperature: 0 is greedy. template: prompt format; None: the run's own, a
        chat model's own, or none. ``tokens`` is the number of tokens, ``stopped`` whether the answer ended by
        itself. Raises UserError for a reward model and for a prompt that leaves no room in the context.
        """
        self._must_write()
        chosen, templated = template_for(self.source, self.tokenizer, template)
        turns = [(*self._system(templated), Turn("user", p)) for p in prompts]
        longest = self.model.context - 1 if self.model.context else None
        ids = encode.encode_prompts(turns, self.tokenizer, chosen, longest, templated=templated)
        generated = decoding.in_batches(
            self.model,
            ids,
            max_tokens=max_tokens,
            stop=stop_ids(self.tokenizer),
            temperature=temperature,
            top_p=top_p,
            samples=samples,
            seed=seed,
        )
        for i, g in enumerate(generated):
            text = self.tokenizer.decode(g.tokens).strip()
            yield {
                "prompt": prompts[i // samples],
                "answer": text,
                "tokens": len(g.tokens),
                "stopped": g.stopped,
            }

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        template: str | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> str:
        """Return the answer to a conversation of {"role", "content"} messages that ends with the user's.

        on_token(row, token id) is called for each token of the answer. A conversation that is too long for
        the context loses its oldest exchanges. Raises UserError for a reward model, and if the last message
        does not fit.
        """
        self._must_write()
        turns = [Turn(m["role"], m["content"]) for m in messages]
        if not turns or turns[-1].role != "user":
            raise UserError("chat: the last message must be the user's")
        chosen, templated = template_for(self.source, self.tokenizer, template)
        first = tuple(t for t in turns if t.role == "system") or self._system(templated)
        rest = [t for t in turns if t.role != "system"]
        ids = self._fit(first, rest, chosen, templated, max_tokens)
        generated = self.model.generate(
            [ids],
            max_tokens=max_tokens,
            stop=stop_ids(self.tokenizer),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=on_token,
        )[0]
        return self.tokenizer.decode(generated.tokens).strip()

    def logprobs(
        self, prompts: Sequence[str], completions: Sequence[str], *, template: str | None = None
    ) -> list[float]:
        """Return the log-probability of each completion given its prompt, in nats.

        It is the sum over the completion's tokens and the EOS after it, as in training. Raises UserError for
        a reward model, an empty completion, and a row longer than the context.
        """
        self._must_write()
        chosen, templated = template_for(self.source, self.tokenizer, template)
        system = self._system(templated)
        rows = [
            Conversation((*system, Turn("user", p), Turn("assistant", c)), templated)
            for p, c in zip(prompts, completions, strict=True)
        ]
        if any(not c for c in completions):
            raise UserError("logprobs: a completion has no text")
        length = self.model.context or 2**31
        examples, report = encode.encode_all(
            rows, self.tokenizer, templates=[chosen], max_length=length, truncate="drop"
        )
        if len(examples) < len(rows):
            why = report.refusal or f"a row is longer than the model's context of {length}: {report}"
            raise UserError(f"logprobs: {why}")
        sums = [0.0] * len(rows)
        for part in by_length([len(e.tokens) for e in examples], BATCH):
            batch = collate([examples[i] for i in part], self.model.context)
            for i, row in zip(part, by_row(batch, self.model.token_logprobs([batch])[0]), strict=True):
                sums[i] = float(np.sum(row, dtype=np.float64))
        return sums

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return a reward model's score of each completion of its prompt.

        Raises UserError for a model that is not a reward model, an empty completion, and a row longer than
        the context.
        """
        if not self.model.has_head:
            raise UserError(f"{self.name} is not a reward model: it has no scores")
        turns = [(*self._system(True), Turn("user", p)) for p in prompts]
        template = self.source.template or "instruction"
        rows = pairs.encode_answers(turns, completions, self.tokenizer, template, self.model.context)
        fitting = [row for row in rows if row is not None]
        if len(fitting) < len(rows):
            raise UserError(
                "score: a completion has no text, or does not fit the model's context with its prompt"
            )
        return score_rows(self.model, fitting, pad_id(self.model.config, self.tokenizer)).tolist()

    def _must_write(self) -> None:
        if self.model.has_head:
            raise UserError(f"{self.name} is a reward model: it scores texts and writes none")

    def _system(self, templated: bool) -> tuple[Turn, ...]:
        return (Turn("system", self.source.system),) if self.source.system and templated else ()

    def _fit(
        self, first: tuple[Turn, ...], turns: list[Turn], template: str, templated: bool, max_tokens: int
    ) -> list[int]:
        """Return the token ids of a conversation, without as many of its oldest exchanges as do not fit.

        They leave room for an answer. ``first``, the system turn, is never dropped.
        """
        context = self.model.context
        while True:
            limit = context - 1 if context and len(turns) == 1 else None
            conversation = [(*first, *turns)]
            ids = encode.encode_prompts(conversation, self.tokenizer, template, limit, templated=templated)[0]
            if context is None or len(turns) == 1 or len(ids) + min(max_tokens, context // 2) <= context:
                return ids
            turns = turns[2:]


def template_for(source: Source, tokenizer: Any, template: str | None) -> tuple[str, bool]:
    """Return (template, whether to apply it).

    The template is the one given, the run's, the chat model's own, or none, in this order of precedence.
    """
    chosen = template or source.template or ("chat" if getattr(tokenizer, "chat_template", None) else "none")
    return ("instruction", False) if chosen == "none" else (chosen, True)
