"""``mlx-posttrain synthesize``: a teacher's answers to your questions, the good ones kept, as a data set for
``08_distill``.

Rejection sampling (Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning"; DeepSeek-AI
2025, section 2.3.3): sample n candidates to each question, keep those that the row's own rule accepts
(evaluation/verify.py), or, where a reward model judges, the best one of the n; drop near duplicates among
what is kept of one question. Every row says where it comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import __version__, runs
from mlx_posttrain.console import log
from mlx_posttrain.data import encode, formats, quality, sources
from mlx_posttrain.data.pairs import encode_answers
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import reasoning
from mlx_posttrain.generation.model import template_for
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards import verify
from mlx_posttrain.rewards.scorer import score_rows

CHUNK = 64  # questions asked before what was kept of them is written: what a crash or Ctrl-C costs


@dataclass
class Settings:
    """How candidates are drawn and chosen. ``keep`` bounds what is kept of one question; ``near`` None keeps
    near duplicates.
    """

    samples: int = 8
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 512
    template: str | None = None
    system: str | None = None
    reward: str | None = None
    keep: int = 1
    near: float | None = 0.7
    thoughts: bool = False
    seed: int = 0


def synthesize(
    teacher: str,
    prompts: str,
    output: Path,
    settings: Settings,
    *,
    engine: str = "auto",
    limit: int | None = None,
    format: str = "auto",
) -> Counter[str]:
    """Write ``output`` (JSONL) with the chosen answers; returns what became of the candidates.

    prompts: questions in any source and format that recipes know. A row has question, thinking (where the
    answer has a thought), answer, response and provenance: teacher, its weights' hash, seed, sample number,
    settings, how it was chosen. Without a reward model every question needs a rule that can check its answer;
    those without are counted and left out. An output that is there already goes on after its last question,
    if it was written by the same command. A question that is asked twice gets no near duplicate of its first
    answers. Raises UserError for rows that ask nothing, for an output of other settings, and where no
    question can be judged.
    """
    rows = list(formats_of(prompts, format, limit, settings.seed))
    told: Counter[str] = Counter(questions=len(rows))
    if settings.reward is None:
        judged = [row for row in rows if verify.kind(row.extra) is not None]
        told["questions without a rule"] = len(rows) - len(judged)
        rows = judged
        if not rows:
            raise UserError(
                f"{prompts}: no answer to these questions can be checked; give a reward model with "
                "--reward, or rows with an answer"
            )
    model, tokenizer, source = open_model(teacher, engine)
    template, templated = template_for(source, tokenizer, settings.template)
    system = settings.system or source.system
    judge = open_model(settings.reward, engine, scores=True) if settings.reward else None
    stamp = {
        "teacher": teacher,
        "weights": _hash(source),
        "samples": settings.samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "keep": settings.keep,
        "near": settings.near,
        "thoughts": settings.thoughts,
        "prompts": prompts,
        "format": format,
        "template": template,
        "system": system,
        "seed": settings.seed,
        "chosen_by": settings.reward or "rule",
        "mlx_posttrain": __version__,
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    begin = _begun(output, stamp)
    # what is written of a question, which may be asked more than once
    known: defaultdict[str, list[str]] = defaultdict(list)
    if begin:
        log(f"{output}: going on after {begin} questions")
        for earlier in runs.read_jsonl(output):
            known[quality.normalised(earlier["question"])].append(earlier["response"])
    for first in range(begin, len(rows), CHUNK):
        part = rows[first : first + CHUNK]
        done, numbers = first + len(part), list(range(first, first + len(part)))
        asked = [((Turn("system", system),) if system and templated else ()) + _question(row) for row in part]
        ids = encode.encode_prompts(asked, tokenizer, template, templated=templated)
        if model.context is not None:
            fitting = [i for i, row in enumerate(ids) if len(row) < model.context]
            told["questions beyond the context"] += len(ids) - len(fitting)
            numbers = [numbers[i] for i in fitting]
            part, asked, ids = (
                [part[i] for i in fitting],
                [asked[i] for i in fitting],
                [ids[i] for i in fitting],
            )
        # A seed of its own for each chunk: a resumed run draws the same candidates as one that was not cut
        # off.
        own = int(np.random.SeedSequence([settings.seed, first]).generate_state(1)[0])
        completions = list(
            decoding.in_batches(
                model,
                ids,
                max_tokens=settings.max_tokens,
                samples=settings.samples,
                stop=encode.eos_id(tokenizer),
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=own,
            )
        )
        written = []
        for i, row in enumerate(part):
            drawn = completions[i * settings.samples : (i + 1) * settings.samples]
            texts = [tokenizer.decode(c.tokens).strip() for c in drawn]
            fate = [None if c.stopped else "not ended" for c in drawn]
            if settings.thoughts:
                fate = [
                    f or (None if reasoning.split_thought(t) else "no thought")
                    for f, t in zip(fate, texts, strict=True)
                ]
            scores = None
            if judge is None:
                fate = [
                    f or (None if verify.verify(row.extra, t) else "wrong")
                    for f, t in zip(fate, texts, strict=True)
                ]
            else:
                scores = _scores(judge, asked[i], texts, template)
                fate = [
                    f or ("not scored" if not np.isfinite(s) else None)
                    for f, s in zip(fate, scores, strict=True)
                ]
            others = known[quality.normalised(_question(row)[-1].content)]
            for number in _chosen(texts, fate, scores, settings, others):
                score = None if scores is None else float(scores[number])
                others.append(texts[number])
                written.append(
                    _row(
                        row,
                        texts[number],
                        {**stamp, "question": numbers[i], "sample": number, "score": score},
                    )
                )
            told.update("kept" if f is None else f for f in fate)
        _append(output, written, {"stamp": stamp, "questions": done})
        log(f"{done} of {len(rows)} questions, {told['kept']} candidates kept")
    told["written"] = sum(1 for _ in output.open(encoding="utf-8")) if output.is_file() else 0
    return told


def formats_of(prompts: str, format: str, limit: int | None, seed: int) -> Iterator[Conversation]:
    """The questions of a source as conversations; ``extra`` has what a rule needs. Raises UserError for rows
    with two answers or none asked.
    """
    rows = sources.load_rows(prompts, limit=limit, seed=seed)
    parsed, dropped = formats.parse_rows(rows, format=format, source=prompts)
    for reason, count in dropped.items():
        log(f"{prompts}: {count} rows dropped: {reason}")
    for row in parsed:
        if isinstance(row, Conversation) and sum(turn.role == "user" for turn in row.turns) > 1:
            log(f"{prompts}: a question with a dialogue before it is left out")
            continue
        if not isinstance(row, Conversation) or not _question(row):
            raise UserError(
                f"{prompts}: these rows ask no question with one answer; accepted: {formats.accepted()}"
            )
        if row.turns[-1].role == "assistant":
            row.extra.setdefault("answer", row.turns[-1].content)
        yield row


def _question(row: Conversation) -> tuple[Turn, ...]:
    return row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns


def _scores(
    judge: tuple[Any, Any, Source], asked: tuple[Turn, ...], texts: Sequence[str], template: str
) -> np.ndarray:
    model, tokenizer, source = judge
    rows = encode_answers([asked] * len(texts), texts, tokenizer, source.template or template, model.context)
    scores = np.full(len(texts), np.nan)
    known = [i for i, row in enumerate(rows) if row is not None]
    scores[known] = score_rows(model, [r for r in rows if r is not None], pad_id(model.config, tokenizer))
    return scores


def _chosen(
    texts: Sequence[str],
    fate: list[str | None],
    scores: np.ndarray | None,
    settings: Settings,
    known: Sequence[str] = (),
) -> list[int]:
    """Numbers of the candidates to keep, the best (or else the first) ones first; marks in ``fate`` why
    others are not kept.

    known: what was kept of the same question before.
    """
    order = [i for i, f in enumerate(fate) if f is None]
    if scores is not None:
        order.sort(key=lambda i: -scores[i])
    if settings.near is not None:
        nears = list(quality.near_duplicates([*known, *(texts[i] for i in order)], settings.near))[
            len(known) :
        ]
        for i, near in zip(list(order), nears, strict=True):
            if near:
                order.remove(i)
                fate[i] = "near duplicate"
    for i in order[settings.keep :]:
        fate[i] = "not needed"
    return order[: settings.keep]


def _row(row: Conversation, text: str, provenance: dict[str, Any]) -> dict[str, Any]:
    thought = reasoning.split_thought(text)
    question = _question(row)[-1].content
    parts = {"thinking": thought[0], "answer": thought[1]} if thought else {"answer": text}
    rule: dict[str, Any] = {
        k: row.extra[k]
        for k in ("checker", "numbers", "target", "instruction_id_list", "kwargs")
        if k in row.extra
    }
    wanted = {"wanted": row.extra["answer"]} if row.extra.get("answer") else {}
    return {"question": question, **parts, "response": text, **wanted, **rule, "provenance": provenance}


def _begun(output: Path, stamp: dict[str, Any]) -> int:
    """How many questions an earlier, interrupted command with the same settings finished. Rows beyond its
    last note are taken away.
    """
    note = output.with_name(output.name + ".state.json")
    if not output.exists():  # a note alone is of a file that was deleted
        return 0
    if not note.is_file():
        raise UserError(f"{output} exists: choose another file, or delete it")
    try:
        state = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{note} is damaged: choose another file, or delete it and {output.name}") from None
    if state["stamp"] != stamp:
        other = sorted(k for k in stamp if stamp[k] != state["stamp"].get(k))
        raise UserError(
            f"{output} was begun with other settings ({', '.join(other)}): choose another file, "
            f"or delete it and {note.name}"
        )
    rows = runs.read_jsonl(output)
    kept = [r for r in rows if r["provenance"]["question"] < state["questions"]]
    runs.write_text(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    return int(state["questions"])


def _append(output: Path, rows: list[dict[str, Any]], state: dict[str, Any]) -> None:
    try:
        with output.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    runs.write_text(
        output.with_name(output.name + ".state.json"), json.dumps(state, ensure_ascii=False) + "\n"
    )


def _hash(source: Source) -> str:
    """The first 16 hex digits of a hash over the teacher's weight files: names change, weights do not lie."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (source.folder, source.adapter):
        for file in sorted(folder.glob("*.safetensors")) if folder is not None else []:
            with file.open("rb") as f:
                while block := f.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
