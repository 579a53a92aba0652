"""``mlx-posttrain synthesize``: a teacher's good answers to your questions, as a data set for ``08_distill``.

Rejection sampling (Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning"; DeepSeek-AI
2025, section 2.3.3): sample n candidates for each question and keep those that the row's own rule accepts
(rewards/verify.py) or, with a reward model, the best of the n; drop near duplicates among the candidates kept
for one question. Every row records its provenance. The teacher is a model that the engine loads, or one
behind an address (generation/server.py).
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import __version__, jsonl, runs
from mlx_posttrain.console import log
from mlx_posttrain.convert.files import read_json
from mlx_posttrain.data import formats, quality, sources
from mlx_posttrain.data.advice import USUAL
from mlx_posttrain.data.pairs import encode_answers
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import reasoning
from mlx_posttrain.generation import teachers
from mlx_posttrain.generation.server import Server
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import Source
from mlx_posttrain.models.tokenizer import pad_id
from mlx_posttrain.rewards import verify
from mlx_posttrain.rewards.scorer import score_rows


@dataclass
class Settings:
    """How candidates are sampled and chosen.

    ``keep``: candidates kept for one question at most. ``near``: similarity of near duplicates, None to keep
    them. ``require_thought``: keep only answers of the form ``<think> ... </think> answer``. ``seed``: None
    is 0 for a model that is loaded, and none for a server.
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
    require_thought: bool = False
    seed: int | None = None


def synthesize(
    teacher: str,
    prompts: str,
    output: Path,
    settings: Settings,
    *,
    engine: str = "auto",
    limit: int | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    server: Server | None = None,
    dtype: str | None = None,
) -> Counter[str]:
    """Write the chosen answers to ``output`` (JSONL) and return the counts of candidates by outcome.

    prompts: questions in any source and format that recipes accept; ``columns`` as data.columns. A written
    row has question, thinking (if the answer has a thought), answer, response and provenance: teacher, hash
    of its weights, seed, sample number, settings and how it was chosen. Without a reward model every question
    needs a rule that can check its answer; questions without one are counted and left out. If the same
    command was interrupted, it continues the existing output after its last question. A question that occurs
    twice gets no near duplicate of its first answers. server: where ``teacher`` is asked, instead of being
    loaded. dtype: of a teacher that is loaded; None: its own. Raises UserError for rows without a question,
    for an output of other settings, if no question can be judged, for a dtype beside a server, and as
    ``Server.ask``.
    """
    rows = list(read_questions(prompts, format, limit, settings.seed or 0, columns))
    counts: Counter[str] = Counter(questions=len(rows))
    if settings.reward is None:
        judged = [row for row in rows if verify.kind(row.extra) is not None]
        counts["questions without a rule"] = len(rows) - len(judged)
        if not judged:
            if long := verify.unjudged(row.extra for row in rows):
                raise UserError(
                    f"{prompts}: {long}; give a reward model with --reward, or rows with short answers"
                )
            raise UserError(
                f"{prompts}: no answer to these questions can be checked; give a reward model with "
                "--reward, or rows with an answer"
            )
        rows = judged
    if server is not None and dtype is not None:
        raise UserError("--dtype belongs to a teacher that is loaded here; a server has its own")
    source: teachers.Local | teachers.Remote = (
        teachers.Local(teacher, engine, settings, dtype)
        if server is None
        else teachers.Remote(server, settings)
    )
    reward_model = open_model(settings.reward, engine, scores=True) if settings.reward else None
    provenance = {
        "teacher": teacher,
        **source.identity,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "keep": settings.keep,
        "near": settings.near,
        "thoughts": settings.require_thought,
        "prompts": prompts,
        "format": format,
        "template": source.template,
        "system": source.system,
        "seed": source.seed,
        "chosen_by": settings.reward or "rule",
        "mlx_posttrain": __version__,
        **({"dtype": dtype} if dtype else {}),
        **({"columns": dict(columns)} if columns else {}),
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    begin = _questions_done(output, provenance)
    # the responses written for each question, which may occur more than once
    responses: defaultdict[str, list[str]] = defaultdict(list)
    if begin:
        log(f"{output}: continuing after {begin} questions")
        for earlier in jsonl.read(output):
            responses[quality.normalised(earlier["question"])].append(earlier["response"])
    first_turn = (Turn("system", source.system),) if source.system and source.templated else ()
    asked = [first_turn + _question(row) for row in rows]
    spoke, done = time.monotonic(), begin
    for answered in source.answers(asked, begin):
        written = []
        if beyond := sum(candidates is None for candidates in answered):
            counts["questions beyond the context"] += beyond
        for question, candidates in enumerate(answered, done):
            if candidates is None:
                continue
            row, texts = rows[question], [c.text for c in candidates]
            # Why each candidate is rejected, None while it is not.
            rejections = [None if c.stopped else "refused" if c.refusal else "not ended" for c in candidates]
            if settings.require_thought:
                rejections = [
                    r or (None if reasoning.split_thought(t) else "no thought")
                    for r, t in zip(rejections, texts, strict=True)
                ]
            scores = None
            if reward_model is None:
                rejections = [
                    r or (None if verify.verify(row.extra, t) else "wrong")
                    for r, t in zip(rejections, texts, strict=True)
                ]
            else:
                scores = _score(reward_model, asked[question], texts, source.template)
                rejections = [
                    r or ("not scored" if not np.isfinite(s) else None)
                    for r, s in zip(rejections, scores, strict=True)
                ]
            earlier_texts = responses[quality.normalised(_question(row)[-1].content)]
            for number in _choose(texts, rejections, scores, settings, earlier_texts):
                score = None if scores is None else float(scores[number])
                earlier_texts.append(texts[number])
                written.append(
                    _row(
                        row,
                        texts[number],
                        {**provenance, "question": question, "sample": number, "score": score},
                    )
                )
            counts.update("kept" if r is None else r for r in rejections)
        done += len(answered)
        _append(output, written, {"stamp": provenance, "questions": done})
        if done == len(rows) or time.monotonic() - spoke > 10:
            log(f"{done} of {len(rows)} questions, {counts['kept']} candidates kept")
            spoke = time.monotonic()
    counts["written"] = len(jsonl.read(output))
    return counts


def read_questions(
    prompts: str, format: str, limit: int | None, seed: int, columns: Mapping[str, str] | None = None
) -> Iterator[Conversation]:
    """Yield the questions of a source as conversations, whose ``extra`` has the columns that rules need.

    Raises UserError for rows that are not a question with one answer or none.
    """
    rows = sources.load_rows(prompts, limit=limit, seed=seed)
    parsed, dropped = formats.parse_rows(
        rows, format=format, columns=columns, source=prompts, setting="--columns"
    )
    for reason, count in dropped.items():
        log(f"{prompts}: {count} rows dropped: {reason}")
    for row in parsed:
        if isinstance(row, Conversation) and sum(turn.role == "user" for turn in row.turns) > 1:
            log(f"{prompts}: left out a question with a dialogue before it")
            continue
        if not isinstance(row, Conversation) or not _question(row):
            raise UserError(f"{prompts}: these rows ask no question with one answer; {USUAL}")
        if row.turns[-1].role == "assistant":
            row.extra.setdefault("answer", row.turns[-1].content)
        yield row


def _question(row: Conversation) -> tuple[Turn, ...]:
    """Return the turns of a row without its answer."""
    return row.turns[:-1] if row.turns[-1].role == "assistant" else row.turns


def _score(
    reward_model: tuple[Any, Any, Source], turns: tuple[Turn, ...], texts: Sequence[str], template: str | None
) -> np.ndarray:
    """Return the reward model's scores of the answers ``texts`` to ``turns``, nan for those too long."""
    model, tokenizer, source = reward_model
    chosen = source.template or template or "instruction"
    rows = encode_answers([turns] * len(texts), texts, tokenizer, chosen, model.context)
    scores = np.full(len(texts), np.nan)
    fitting = [i for i, row in enumerate(rows) if row is not None]
    scores[fitting] = score_rows(model, [r for r in rows if r is not None], pad_id(model.config, tokenizer))
    return scores


def _choose(
    texts: Sequence[str],
    rejections: list[str | None],
    scores: np.ndarray | None,
    settings: Settings,
    earlier: Sequence[str] = (),
) -> list[int]:
    """Return the numbers of the candidates to keep, the best ones first, without scores in their order.

    rejections: why a candidate is rejected, else None; the reasons for candidates not kept are added.
    earlier: candidates kept before for the same question.
    """
    order = [i for i, r in enumerate(rejections) if r is None]
    if scores is not None:
        order.sort(key=lambda i: -scores[i])
    if settings.near is not None:
        duplicates = list(quality.near_duplicates([*earlier, *(texts[i] for i in order)], settings.near))
        for i, duplicate in zip(list(order), duplicates[len(earlier) :], strict=True):
            if duplicate:
                order.remove(i)
                rejections[i] = "near duplicate"
    for i in order[settings.keep :]:
        rejections[i] = "not needed"
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
    reference = {"wanted": row.extra["answer"]} if row.extra.get("answer") else {}
    return {"question": question, **parts, "response": text, **reference, **rule, "provenance": provenance}


def _questions_done(output: Path, provenance: dict[str, Any]) -> int:
    """Return the number of questions that an interrupted command with the same settings finished.

    Rows of later questions are removed from the output. Raises UserError for a file that the same command did
    not write.
    """
    state_file = output.with_name(output.name + ".state.json")
    if not output.exists():  # a state file alone belongs to an output that was deleted
        return 0
    if not state_file.is_file():
        raise UserError(f"{output} exists: choose another file, or delete it")
    damaged = UserError(f"{state_file} is damaged: choose another file, or delete it and {output.name}")
    try:
        state = read_json(state_file)
    except UserError:
        raise damaged from None
    stamp, questions = state.get("stamp"), state.get("questions")
    if not isinstance(stamp, dict) or not isinstance(questions, int):
        raise damaged
    if stamp != provenance:
        different = sorted(k for k in provenance if provenance[k] != stamp.get(k))
        raise UserError(
            f"{output} was begun with other settings ({', '.join(different)}): choose another file, "
            f"or delete it and {state_file.name}"
        )

    def finished(row: dict[str, Any]) -> bool:
        origin = row.get("provenance")
        number = origin.get("question") if isinstance(origin, dict) else None
        return not isinstance(number, int) or number < questions

    for number, row in enumerate(jsonl.read(output), 1):
        if finished(row) and not all(isinstance(row.get(key), str) for key in ("question", "response")):
            raise UserError(
                f"{output}, row {number}: not a row that this command wrote; put it right, or delete the file"
            )
    try:
        jsonl.keep(output, finished)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    return questions


def _append(output: Path, rows: list[dict[str, Any]], state: dict[str, Any]) -> None:
    try:
        jsonl.append(output, rows)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    runs.write_text(output.with_name(output.name + ".state.json"), json.dumps(state) + "\n")
