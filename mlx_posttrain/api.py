"""The Python API: train, load, evaluate, compare. The command line is a thin user of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import config, methods, runs
from mlx_posttrain.data import encode, pairs
from mlx_posttrain.data.batches import by_length, by_row, collate
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.engines.base import Loss
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards import functions
from mlx_posttrain.rewards.scorer import score_rows
from mlx_posttrain.training.loop import Callbacks
from mlx_posttrain.training.method import Method

BATCH = 16  # rows whose log-probabilities are computed at once


@dataclass(frozen=True)
class Run:
    """A run directory: ``folder``, and what is in it."""

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, one for each step and each evaluation."""
        return runs.Run(self.folder).metrics()

    @property
    def result(self) -> dict[str, Any]:
        """The figures of the final evaluation; {} for a run that is not finished."""
        path = self.folder / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def model(self, engine: str = "auto", dtype: str | None = None) -> LoadedModel:
        """The trained model, opened as by :func:`load`."""
        return load(self.folder, engine, dtype)


class LoadedModel:
    """A model that generates and scores. Open one with :func:`load`."""

    def __init__(self, name: str | Path, engine: str = "auto", dtype: str | None = None):
        self.model, self.tokenizer, self.source = open_model(name, engine, dtype or "float32", scores=None)
        self.name = str(name)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """The text of one answer to each prompt, or of ``samples`` answers in order; see :meth:`answers`."""
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
        """``samples`` answers to each prompt: {"prompt", "answer", "tokens", "stopped"}, as batches end.

        max_tokens: longest answer. temperature: 0 is greedy. template: prompt format; None: the run's own, a
        chat model's own, or none. ``stopped`` tells whether the answer ended by itself. Raises UserError for
        a reward model and for a prompt that leaves no room in the context.
        """
        self._must_write()
        chosen, templated = template_for(self.source, self.tokenizer, template)
        turns = [(*self._system(templated), Turn("user", p)) for p in prompts]
        room = self.model.context - 1 if self.model.context else None
        ids = encode.encode_prompts(turns, self.tokenizer, chosen, room, templated=templated)
        generated = decoding.in_batches(
            self.model,
            ids,
            max_tokens=max_tokens,
            stop=encode.eos_id(self.tokenizer),
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
        """The answer to a conversation of {"role", "content"} messages, the last of them the user's.

        on_token(row, token id) is called as the answer grows. A conversation that is too long for the context
        loses its oldest exchanges. Raises UserError for a reward model, and when the last message does not
        fit.
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
            stop=encode.eos_id(self.tokenizer),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=on_token,
        )[0]
        return self.tokenizer.decode(generated.tokens).strip()

    def logprobs(
        self, prompts: Sequence[str], completions: Sequence[str], *, template: str | None = None
    ) -> list[float]:
        """Log-probability of each completion given its prompt, in nats: its tokens and its end summed, as
        trained.

        Raises UserError for a reward model, an empty completion, and a row beyond the context.
        """
        self._must_write()
        chosen, templated = template_for(self.source, self.tokenizer, template)
        before = self._system(templated)
        rows = [
            Conversation((*before, Turn("user", p), Turn("assistant", c)), templated)
            for p, c in zip(prompts, completions, strict=True)
        ]
        if any(not c for c in completions):
            raise UserError("logprobs: a completion has no text")
        length = self.model.context or 2**31
        examples, report = encode.encode_all(
            rows, self.tokenizer, templates=[chosen], max_length=length, truncate="drop"
        )
        if len(examples) < len(rows):
            raise UserError(f"logprobs: a row is longer than the model's context of {length}: {report}")
        sums = [0.0] * len(rows)
        for part in by_length([len(e.tokens) for e in examples], BATCH):
            batch = collate([examples[i] for i in part], self.model.context)
            for i, row in zip(part, by_row(batch, self.model.token_logprobs([batch])[0]), strict=True):
                sums[i] = float(np.sum(row, dtype=np.float64))
        return sums

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """A reward model's score of each completion of its prompt.

        Raises UserError for a model that is none, an empty completion, and a row beyond the context.
        """
        if not self.model.has_head:
            raise UserError(f"{self.name} is no reward model: it has no scores")
        turns = [(*self._system(True), Turn("user", p)) for p in prompts]
        template = self.source.template or "instruction"
        rows = pairs.encode_answers(turns, completions, self.tokenizer, template, self.model.context)
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            raise UserError(
                "score: a completion has no text, or does not fit the model's context with its prompt"
            )
        return score_rows(self.model, known, pad_id(self.model.config, self.tokenizer)).tolist()

    def _must_write(self) -> None:
        if self.model.has_head:
            raise UserError(f"{self.name} is a reward model: it scores texts and writes none")

    def _system(self, templated: bool) -> tuple[Turn, ...]:
        return (Turn("system", self.source.system),) if self.source.system and templated else ()

    def _fit(
        self, first: tuple[Turn, ...], turns: list[Turn], template: str, templated: bool, max_tokens: int
    ) -> list[int]:
        """Token ids of a conversation that leaves room for an answer, without its oldest exchanges if need
        be.
        """
        context = self.model.context
        while True:
            limit = context - 1 if context and len(turns) == 1 else None
            whole = [(*first, *turns)]
            ids = encode.encode_prompts(whole, self.tokenizer, template, limit, templated=templated)[0]
            if context is None or len(turns) == 1 or len(ids) + min(max_tokens, context // 2) <= context:
                return ids
            turns = turns[2:]


def template_for(source: Source, tokenizer: Any, template: str | None) -> tuple[str, bool]:
    """(template, whether to apply it): what was asked for, a run's own, a chat model's own, or plain text."""
    chosen = template or source.template or ("chat" if getattr(tokenizer, "chat_template", None) else "none")
    return ("instruction", False) if chosen == "none" else (chosen, True)


def load(name: str | Path, engine: str = "auto", dtype: str | None = None) -> LoadedModel:
    """Open a run, a model or adapter folder, ``tiny``, or a hub id.

    engine: mlx, torch or auto. dtype: float32, bfloat16 or float16; None: float32. Raises UserError saying
    what is missing and what to do.
    """
    return LoadedModel(name, engine, dtype)


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    loss: Loss | None = None,
    reward: Callable[..., Sequence[float | None]] | None = None,
    on_step: Callable[[Run, dict[str, Any]], object] | None = None,
    on_evaluate: Callable[[Run, dict[str, Any]], object] | None = None,
    on_save: Callable[[Run, Path], object] | None = None,
) -> Run:
    """Run a recipe to the end and return its run directory.

    recipe: a shipped recipe's name, a YAML file, or its keys; with ``resume`` the folder of an unfinished
    run. overrides: dotted keys, as ``{"train.steps": 6}``. loss: ``loss(model, batch) -> (scalar, metrics)``
    in place of the method's; see methods/sft.py. reward: ``f(prompts, completions, **columns) -> list of
    float or None`` in place of the recipe's rewards. on_step, on_evaluate, on_save: called as the run goes
    on, see :class:`~mlx_posttrain.training.loop.Callbacks`; one that returns True ends training after a
    checkpoint, and the run is finished with the weights so far.

    Raises UserError for every foreseeable failure; Ctrl-C saves and raises it too.
    """
    if resume:
        if isinstance(recipe, Mapping) or overrides:
            raise UserError(
                "resume=True continues a run with its own recipe: give its folder and no overrides"
            )
        _, raw = runs.reopen(recipe)
        chosen = methods.parse_recipe({**raw, "output": str(recipe)}, str(Path(recipe) / "recipe.yaml"))
    else:
        chosen = _recipe(recipe, dict(overrides or {}), reward)

    def hook(function: Callable[[Run, Any], object] | None) -> Callable[[Any, Any], object] | None:
        return None if function is None else lambda run, value: function(Run(run.folder), value)

    callbacks = Callbacks(hook(on_step), hook(on_evaluate), hook(on_save))
    method = methods.get(chosen.method)
    methods.run(chosen, resume, callbacks, method if loss is None else _with_loss(method, loss))
    return Run(Path(chosen.output))


def _recipe(recipe: str | Path | Mapping[str, Any], overrides: dict[str, Any], reward: Any) -> Any:
    if isinstance(recipe, Mapping):
        raw, where = copy.deepcopy(dict(recipe)), "recipe"
        parent, output = None, f"runs/{raw.get('method', 'recipe')}"
    else:
        path = config.find_recipe(str(recipe))
        raw, where, parent, output = config.read_yaml(path), path.name, path.parent, f"runs/{path.stem}"
    for key, value in overrides.items():
        section, last = config.holder(raw, key)
        section[last] = str(value) if isinstance(value, Path) else value
    if reward is not None:
        raw["reward"] = [{"function": functions.register(reward)}]
    return methods.parse_recipe(raw, where, folder=parent, output=output)


def _with_loss(method: Method, loss: Loss) -> Method:
    """The method with another loss."""
    if method.trains_on is None:
        raise UserError(f"{method.name} trains nothing itself, so it takes no loss")
    if method.algorithm is None:
        return replace(method, loss=lambda recipe: loss)
    algorithm = method.algorithm
    return replace(method, algorithm=lambda recipe: replace(algorithm(recipe), loss=loss))


def evaluate(name: str | Path, *, engine: str = "auto", **suite: Any) -> Any:
    """Ask and read one model: right answers, losses, perplexity, repetition, each with its interval.

    suite: its keys, listed by ``mlx-posttrain keys suite``. Returns as :func:`compare`.
    """
    return compare([name], engine=engine, **suite)


def compare(
    names: Sequence[str | Path], *, labels: Sequence[str] | None = None, engine: str = "auto", **suite: Any
) -> Any:
    """Measure several models on the same questions and texts with the same decoding; the first is the
    baseline.

    Returns an evaluate.comparison.Comparison: ``.table()`` is text, ``.to_dict()`` everything. Raises
    UserError for an unknown key of the suite and for a model that cannot be opened.
    """
    from mlx_posttrain.evaluate import suite as module

    settings = config.parse(dict(suite), module.SuiteSection, "settings")
    return module.compare([str(n) for n in names], settings, engine, labels)
