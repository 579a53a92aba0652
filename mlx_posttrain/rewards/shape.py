"""The reward functions that a recipe can name without a file of its own: what an answer looks like.

Parameters after the ``*`` are the ``args`` of a recipe, the others before it columns of the data. Lengths are
in tokens of the policy, the stop token included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards import answers
from mlx_posttrain.rewards import json_schema as schemas
from mlx_posttrain.rewards.functions import Scores, rows
from mlx_posttrain.rewards.verify import verify
from mlx_posttrain.rl.advantages import overlong_penalty

LONGEST_MATCHED = 20_000  # characters that a regular expression is tried on

Positive = Annotated[int, Field(ge=1)]


def format(
    prompts: list[str],
    completions: list[str],
    *,
    pattern: Literal["think"] | None = None,
    tags: Annotated[list[Annotated[str, Field(pattern=r"^\w[\w-]*$")]], Field(min_length=1)] | None = None,
    regex: str | None = None,
    opened: bool = False,
) -> Scores:
    r"""Return 1 where the answer has the form, else 0. One of three forms, ``think`` if none is given.

    - ``pattern: think``: ``<think>...</think>`` once, at the beginning, then an answer; neither is blank.
    - ``tags: [think, answer]``: exactly these blocks in this order, each once and not blank, and nothing but
      white space around them. With ``think`` and ``answer`` this is the form of DeepSeek-R1 (DeepSeek-AI
      2025, section 2.2.2).
    - ``regex``: the whole text, at most LONGEST_MATCHED characters, matches; ``.`` matches line breaks too. A
      pattern that backtracks without end meets the time limit.

    ``opened``: the prompt ends with the first opening tag, so the answer begins inside it.
    """
    if sum(one is not None for one in (pattern, tags, regex)) > 1:
        raise UserError("pattern, tags and regex exclude each other: give one")
    if tags and len(set(tags)) < len(tags):
        raise UserError(f"tags {', '.join(tags)}: each block stands once, so give each name once")
    if regex is not None:
        if opened:
            raise UserError("opened belongs to pattern and tags: a regex says itself how the text begins")
        try:
            compiled = re.compile(regex, re.DOTALL)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"regex {regex!r} is no regular expression: {error}") from None
        return [
            float(len(text) <= LONGEST_MATCHED and compiled.fullmatch(text) is not None)
            for text in completions
        ]
    names, rest = (tags, False) if tags else (["think"], True)
    return [float(_has_blocks(f"<{names[0]}>" * opened + text, names, rest)) for text in completions]


def _has_blocks(text: str, names: Sequence[str], rest: bool) -> bool:
    """Return whether the text is the blocks in their order, with more text after them if ``rest``."""
    marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    for i, mark in enumerate(marks):
        before, found, text = text.partition(mark)
        inside = i % 2 == 1  # where something must stand, as between blocks nothing may
        if not found or bool(before.strip()) != inside:
            return False
    return bool(text.strip()) == rest


def json(
    prompts: list[str],
    completions: list[str],
    schema: Sequence[Any] | None = None,
    *,
    json_schema: dict[str, Any] | None = None,
) -> Scores:
    """Return 1 where the answer is JSON that follows the schema, else 0.

    The text after a thought counts, with or without a Markdown fence around all of it. The schema is
    ``json_schema``, or else the row's column ``schema``, a mapping or its JSON text; without any, all JSON
    counts. rewards/json_schema.py has the keywords that are understood.
    """
    if json_schema is not None:
        schemas.check(json_schema)
    found: Scores = []
    for text, row in zip(completions, rows(len(completions), schema=schema)):
        wanted = json_schema if json_schema is not None else schemas.read(row.get("schema"))
        found.append(float(schemas.follows(answers.after_thought(text), wanted)))
    return found


def length(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    target_length: Sequence[Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    form: Literal["exact", "max", "cosine"] = "exact",
    target: Positive | None = None,
    alpha: Annotated[float, Field(ge=0)] = 0.0003,
    delta: float = 0.5,
    max_length: Positive | None = None,
    right: tuple[float, float] = (2.0, 1.0),
    wrong: tuple[float, float] = (-10.0, 0.0),
    exceeded: float = -10.0,
) -> Scores:
    """Return what an answer of n tokens is worth for its length.

    - ``exact``: -alpha |target - n|, the second term of L1-Exact (Aggarwal & Welleck 2025, eq. 1); the first
      is ``exact_answer``, added with weight 1.
    - ``max``: 1[right] clip(alpha (target - n) + delta, 0, 1), L1-Max (eq. 2).
    - ``cosine``: b + (a - b)(1 + cos(pi n / max_length)) / 2, from a at length 0 to b at ``max_length``,
      where (a, b) is ``right`` or ``wrong``; ``exceeded`` from ``max_length`` on, whatever the answer (Yeo et
      al. 2025, section 4.2; the defaults are the paper's).

    The target is ``target``, or else the row's column ``target_length``. Whether an answer is right is for
    ``verify`` to say, by the row's own rule. None without a target, or without a rule where one is needed.
    """
    if form == "cosine" and max_length is None:
        raise UserError("form cosine needs max_length, in tokens: the recipe's rollout.max_tokens")
    if form != "cosine" and max_length is not None:
        raise UserError(f"max_length belongs to form cosine; form {form} has a target")
    if form == "cosine" and target is not None:
        raise UserError("target belongs to the forms exact and max; form cosine has a max_length")
    found: Scores = []
    goals = [target] * len(completions) if target is not None else target_length or [None] * len(completions)
    each = rows(len(completions), **(columns or {}))
    for text, ids, wanted, row in zip(completions, completion_ids, goals, each, strict=True):
        n = len(ids)
        if form == "cosine":
            assert max_length is not None
            if n >= max_length:
                found.append(exceeded)
                continue
            verdict = _right(row, text)
            start, end = right if verdict else wrong
            scale = (1 + math.cos(math.pi * n / max_length)) / 2
            found.append(None if verdict is None else end + (start - end) * scale)
        elif not isinstance(wanted, int | float) or math.isnan(wanted):
            found.append(None)
        elif form == "exact":
            found.append(-alpha * abs(wanted - n))
        else:
            verdict = _right(row, text)
            clipped = min(1.0, max(0.0, alpha * (wanted - n) + delta))
            found.append(None if verdict is None else verdict * clipped)
    return found


def _right(row: Mapping[str, Any], text: str) -> bool | None:
    return verify(
        {"output": row.get("reference_answer"), **{k: v for k, v in row.items() if v is not None}}, text
    )


def overlong(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    max_length: Positive,
    cache: Positive | None = None,
) -> Scores:
    """Return the soft overlong punishment of DAPO (Yu et al. 2025, eq. 13) for an answer of n tokens.

    0 up to max_length - cache, then (max_length - cache - n) / cache, down to -1 at ``max_length`` and
    beyond. ``cache`` is a fifth of ``max_length``, as in the paper, if it is not given.
    """
    if cache is None:
        cache = max(1, max_length // 5)
    if cache > max_length:
        raise UserError(f"cache {cache} is longer than max_length {max_length}")
    lengths = np.array([len(ids) for ids in completion_ids], float)
    return [float(score) for score in overlong_penalty(lengths, max_length, cache)]


def repetition(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    *,
    n: Positive,
    penalty: Annotated[float, Field(le=0)] = -1.0,
) -> Scores:
    """Return ``penalty`` times the share of tokens that lie in an n-gram seen before in the answer.

    Yeo et al. 2025 (appendix, algorithm 1) give a penalty to each of these tokens as its own reward, -0.05
    with n 40; this is its mean over the answer's tokens. An answer of n tokens or fewer gets 0.
    """
    return [penalty * _repeated(ids, n) for ids in completion_ids]


def _repeated(ids: Sequence[int], n: int) -> float:
    seen: set[tuple[int, ...]] = set()
    count = end = 0  # end: of the last n-gram that was a repetition
    for begin in range(len(ids) - n + 1):
        ngram = tuple(ids[begin : begin + n])
        if ngram in seen:
            count += begin + n - max(begin, end)
            end = begin + n
        seen.add(ngram)
    return count / len(ids) if ids else 0.0
