"""Rows to records: which format a row has is told by its columns, or named in the recipe.

    alpaca             instruction, output | response, optionally input    Conversation   Alpaca (Taori et al.
    2023) messages           messages | conversations (role/content, or ShareGPT's from/value)  Conversation
    prompt_completion  prompt, completion | response                       Conversation, the text as it stands
    reasoning          question | problem | prompt, thinking | deepseek_reasoning | reasoning, answer |
    deepseek_solution | solution
                                                                           Conversation: the answer is <think>
                                                                           trace </think> answer
    question_answer    question, answer                                    Conversation text
    text                                                Conversation, the text as it stands preference
    prompt | question | instruction, chosen, rejected   Preference hh                 chosen, rejected: whole
    dialogues                   Preference     HH-RLHF (Bai et al. 2022) gsm8k              question, answer:
    steps, #### and the answer            Conversation, as reasoning (named in the recipe; Cobbe et al. 2021)
    prompt             prompt: a question to be answered (PPO)            Conversation without an answer
    chosen             chosen, optionally prompt: only the preferred answer    Conversation   (named in the
    recipe, to imitate one side of pairs) either             as preference: one of the two answers, by a fair
    coin    Conversation   (named in the recipe: a policy as good and bad as its data) labelled
    prompt, completion | response, label                Labelled       KTO (Ethayarajh et al. 2024)

What is missing from a row (an empty answer, no common prompt) drops the row and is counted; what shows that
the file is not what the recipe thinks it is (a list where text should be) stops with the row's number.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlx_posttrain.data.sources import nearest
from mlx_posttrain.data.templates import stable_hash
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError

Record = Conversation | Preference | Labelled
Row = Mapping[str, Any]

# Checked in this order: chosen/rejected decide before all else, and `instruction` before the prompt or text
# columns that many Alpaca files carry beside it, and a trace before the question and answer that it stands
# between. Each entry lists the columns that must be there, alternatives within a tuple.
FORMATS: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "question", "instruction"), ("chosen",), ("rejected",)),
    "hh": (("chosen",), ("rejected",)),
    "alpaca": (("instruction",), ("output", "response")),
    "messages": (("messages", "conversations"),),
    "labelled": (("prompt",), ("completion", "response"), ("label",)),
    "reasoning": (
        ("question", "problem", "prompt"),
        ("thinking", "deepseek_reasoning", "reasoning"),
        ("answer", "deepseek_solution", "solution"),
    ),
    "prompt_completion": (("prompt",), ("completion", "response")),
    "question_answer": (("question",), ("answer",)),
    "text": (("text",),),
    "prompt": (("prompt",),),
    "gsm8k": (("question",), ("answer",)),
    "chosen": (("chosen",),),
    "either": (("prompt", "question", "instruction"), ("chosen",), ("rejected",)),
}
#: What our side of data.columns may be called; other names reach checkers and reward functions only.
COLUMNS = {name for need in FORMATS.values() for alternatives in need for name in alternatives} | {
    "input",
    "margin",
}
_ROLE_NAMES = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "model"),
}
ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
NO_INPUT = {"<noinput>", "<no input>", "noinput", "no input", "n/a"}
THINK, END_THINK = "<think>", "</think>"  # DeepSeek-R1's marks around a trace (DeepSeek-AI 2025)
_HH_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Dropped(Exception):
    """A row that cannot be used though the file is sound; the message is the reason to count."""


def accepted() -> str:
    """Return one line that names every format and its columns."""
    return "; ".join(
        f"{name} ({', '.join('|'.join(alternatives) for alternatives in need)})"
        for name, need in FORMATS.items()
    )


def detect(columns: Iterable[str]) -> str:
    """Return the format whose columns are all there; UserError says what was found, what is accepted and how
    to map.
    """
    have = list(columns)
    for name, need in FORMATS.items():
        if name not in ("chosen", "either", "gsm8k") and all(
            any(c in have for c in alternatives) for alternatives in need
        ):
            return name
    raise UserError(
        f"columns {', '.join(have) or '(none)'} match no format; accepted: {accepted()}; "
        "rename with data.columns, for example {instruction: your_column, output: your_other_column}"
    )


def rename(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with the columns of the map (our name: the file's name) under our names."""
    if not columns:
        return dict(row)
    theirs = {v: k for k, v in columns.items()}
    kept = {k: v for k, v in row.items() if k not in theirs}
    return kept | {ours: row.get(name) for name, ours in theirs.items()}


def parse(row: Row, format: str, columns: Mapping[str, str] | None = None, where: str = "row") -> Record:
    """Return one row as its record.

    Raises Dropped (reason) for a row without an answer or prompt, UserError (starting with ``where``) for a
    value of the wrong type.
    """
    return _PARSERS[_known(format)](rename(row, columns or {}), where)


def parse_rows(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    source: str = "data",
) -> tuple[list[Record], Counter[str]]:
    """Return the records of ``rows`` in order, and how many rows were dropped for which reason.

    ``format`` "auto" looks at the columns that occur in any row. Raises UserError for unknown columns, for a
    row of the wrong type (by its number, from 1), and if no row is left.
    """
    columns = columns or {}
    have = list(dict.fromkeys(name for row in rows for name in row))
    for ours, name in columns.items():
        if name not in have:
            known = f"{nearest(name, have)} (there are {', '.join(have)})"
            raise UserError(f"{source}: data.columns maps {ours} to {name!r}, which is not a column{known}")
        near = [] if ours in COLUMNS else difflib.get_close_matches(ours, sorted(COLUMNS), n=1, cutoff=0.75)
        if near:  # a name that is like none of ours may be meant for a reward function
            raise UserError(
                f"{source}: data.columns names {ours!r}, which no format reads; did you mean {near[0]!r}?"
            )
    try:
        chosen = detect(rename(dict.fromkeys(have), columns)) if format == "auto" else _known(format)
    except UserError as e:
        raise UserError(f"{source}: {e}") from e
    missing = [a for a in FORMATS[chosen] if not any(c in rename(dict.fromkeys(have), columns) for c in a)]
    if missing:
        lacks = ", ".join("|".join(a) for a in missing)
        raise UserError(
            f"{source}: format {chosen} needs the column {lacks}, found {', '.join(have)}; "
            "rename with data.columns"
        )
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            records.append(parse(row, chosen, columns, f"{source}, row {number}"))
        except Dropped as e:
            dropped[str(e)] += 1
    if rows and not records:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.most_common())
        raise UserError(f"{source}: none of the {len(rows)} rows can be used as {chosen} ({reasons})")
    return records, dropped


def _known(format: str) -> str:
    if format not in FORMATS:
        raise UserError(
            f"unknown data format {format!r}{nearest(format, list(FORMATS))} (there are auto, "
            f"{', '.join(FORMATS)})"
        )
    return format


# Values


def _text(row: Row, name: str, where: str) -> str:
    """Return a column as text; a number is written out (a CSV or Parquet answer may well be one), a missing
    value is empty.
    """
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "" if value != value else str(value)
    raise UserError(f"{where}: column {name!r} must be text, found {type(value).__name__}")


def _content(text: str) -> str:
    """Return the text of a turn: outer white space is the template's affair, and line ends are \\n whatever
    machine wrote the file.
    """
    return text.replace("\r\n", "\n").strip()


def _first(row: Row, names: Iterable[str]) -> str:
    """Return the first of the alternative columns that the row has (the last name if it has none)."""
    found = ""
    for found in names:
        if found in row:
            break
    return found


def _need(text: str, reason: str) -> str:
    if not text.strip():
        raise Dropped(reason)
    return text


def _extra(row: Row, *used: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in used}


def _messages(value: Any, name: str, where: str) -> tuple[Turn, ...]:
    """Return a list of messages as turns; both {role, content} and ShareGPT's {from, value} are read."""
    if not isinstance(value, list):
        raise UserError(f"{where}: column {name!r} must be a list of messages, found {type(value).__name__}")
    turns = []
    for message in value:
        if not isinstance(message, dict) or not (
            {"role", "content"} <= message.keys() or {"from", "value"} <= message.keys()
        ):
            raise UserError(
                f"{where}: a message in {name!r} must have role and content (or from and "
                f"value), found {str(message)[:80]}"
            )
        role, key = (message["role"], "content") if "role" in message else (message["from"], "value")
        if role not in ROLES:
            raise Dropped(f"role {role!r}")
        turns.append(Turn(ROLES[role], _content(_text(message, key, where))))
    return tuple(turns)


def _until_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns up to the last answer; what a user said after it has nothing to train on."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise Dropped("no assistant turn")
    _need(turns[last].content, "empty answer")
    return turns[: last + 1]


# One parser per format


def _alpaca(row: Row, where: str) -> Conversation:
    answer = _first(row, ("output", "response"))
    question = _content(_text(row, "instruction", where))
    context = _content(_text(row, "input", where))
    if context.lower() in NO_INPUT:
        context = ""
    prompt = _need("\n\n".join(part for part in (question, context) if part), "empty prompt")
    turns = (
        Turn("user", prompt),
        Turn("assistant", _need(_content(_text(row, answer, where)), "empty answer")),
    )
    return Conversation(turns, extra=_extra(row, "instruction", "input", answer))


def _prompt_completion(row: Row, where: str) -> Conversation:
    """An empty prompt is allowed: the completion is then a text to continue from nothing."""
    answer = _first(row, ("completion", "response"))
    extra = _extra(row, "prompt", answer)
    if isinstance(row.get("prompt"), list):  # TRL's conversational form
        completion = row.get(answer)
        last = (
            _messages(completion, answer, where)
            if isinstance(completion, list)
            else (Turn("assistant", _text(row, answer, where)),)
        )
        return Conversation(_until_answer(_messages(row["prompt"], "prompt", where) + last), extra=extra)
    prompt, completion = _text(row, "prompt", where), _need(_text(row, answer, where), "empty answer")
    return Conversation((Turn("user", prompt), Turn("assistant", completion)), templated=False, extra=extra)


def _chat(row: Row, where: str) -> Conversation:
    name = _first(row, ("messages", "conversations"))
    if row.get(name) is None:
        raise Dropped("no messages")
    return Conversation(_until_answer(_messages(row[name], name, where)), extra=_extra(row, name))


def _plain_text(row: Row, where: str) -> Conversation:
    text = _need(_text(row, "text", where), "empty text")
    return Conversation((Turn("assistant", text),), templated=False, extra=_extra(row, "text"))


def _question_answer(row: Row, where: str) -> Conversation:
    """The answer also stays in ``extra``: it is what a checker or a reward function compares with."""
    question = _need(_content(_text(row, "question", where)), "empty prompt")
    answer = _need(_content(_text(row, "answer", where)), "empty answer")
    return Conversation((Turn("user", question), Turn("assistant", answer)), extra=_extra(row, "question"))


def _reasoning(row: Row, where: str) -> Conversation:
    """A trace and the answer it leads to, as DeepSeek-R1 writes them; the answer also stays in ``extra``,
    under its own name.
    """
    question, trace, answer = (_first(row, names) for names in FORMATS["reasoning"])
    asked = _need(_content(_text(row, question, where)), "empty prompt")
    thought = _need(_content(_text(row, trace, where)), "empty trace")
    said = _need(_content(_text(row, answer, where)), "empty answer")
    return _thought(asked, thought, said, _extra(row, question, trace))


def _gsm8k(row: Row, where: str) -> Conversation:
    """Steps and answer stand in one column, parted by ``####``; the calculator's marks ``<<48/2=24>>`` in the
    steps are left out.
    """
    steps, mark, answer = _text(row, "answer", where).rpartition("####")
    if not mark:
        raise Dropped("no #### before the answer")
    steps = _need(_content(re.sub(r"<<[^<>]*>>", "", steps)), "empty trace")
    asked = _need(_content(_text(row, "question", where)), "empty prompt")
    return _thought(asked, steps, _need(_content(answer), "empty answer"), _extra(row, "question"))


def _thought(asked: str, trace: str, answer: str, extra: dict[str, Any]) -> Conversation:
    whole = f"{THINK}\n{trace}\n{END_THINK}\n{answer}"
    return Conversation((Turn("user", asked), Turn("assistant", whole)), extra=extra | {"answer": answer})


def _preference(row: Row, where: str) -> Preference:
    """``chosen`` and ``rejected`` are text, or messages whose last is the answer and whose earlier ones, if
    any, are the prompt.
    """
    name = _first(row, FORMATS["preference"][0])
    if isinstance(row.get(name), list):
        prompt = _messages(row[name], name, where)
    else:
        parts = [_content(_text(row, name, where))]
        if name == "instruction":
            parts.append(_content(_text(row, "input", where)))
        prompt = (Turn("user", "\n\n".join(part for part in parts if part)),)
    chosen_prompt, chosen = _side(row, "chosen", where)
    rejected_prompt, rejected = _side(row, "rejected", where)
    if chosen_prompt != rejected_prompt:
        raise Dropped("chosen and rejected answer different prompts")
    if not any(turn.content for turn in chosen_prompt or prompt):
        raise Dropped("empty prompt")
    used = (name, "chosen", "rejected", *(("input",) if name == "instruction" else ()))
    return _pair(chosen_prompt or prompt, chosen, rejected, _extra(row, *used))


def _side(row: Row, name: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """Return (turns before the answer, the answer) of one side of a pair."""
    if not isinstance(row.get(name), list):
        return (), _content(_text(row, name, where))
    turns = _messages(row[name], name, where)
    if not turns or turns[-1].role != "assistant":
        raise Dropped("a side of the pair does not end with an answer")
    return turns[:-1], turns[-1].content


def _hh(row: Row, where: str) -> Preference:
    """Split at the last assistant turn; the dialogue before it must be the same on both sides."""
    sides = []
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), list):
            turns = _messages(row[name], name, where)
        else:
            turns = _dialogue(_text(row, name, where).replace("\r\n", "\n"))
        if not turns or turns[-1].role != "assistant":
            raise Dropped("a side of the pair does not end with an answer")
        sides.append(turns)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("chosen and rejected answer different prompts")
    if len(chosen) < 2:
        raise Dropped("empty prompt")
    return _pair(chosen[:-1], chosen[-1].content, rejected[-1].content, _extra(row, "chosen", "rejected"))


def _prompt_alone(row: Row, where: str) -> Conversation:
    """A prompt that a policy is to answer: text, or messages whose last is the user's."""
    name = "prompt"
    if isinstance(row.get(name), list):
        turns = _messages(row[name], name, where)
    else:
        turns = (Turn("user", _content(_text(row, name, where))),)
    if not turns or turns[-1].role == "assistant":
        raise Dropped("a prompt that ends with an answer")
    _need(turns[-1].content, "empty prompt")
    return Conversation(turns, extra=_extra(row, name))


def _chosen(row: Row, where: str) -> Conversation:
    """The preferred answer alone, of a pair with a prompt or of a whole dialogue: what SFT before a reward
    model imitates.
    """
    prompts = [n for n in FORMATS["preference"][0] if n in row]
    if prompts:
        turns, answer = _side(row, "chosen", where)
        prompt = row[prompts[0]]
        before = turns or (
            _messages(prompt, prompts[0], where)
            if isinstance(prompt, list)
            else (Turn("user", _content(str(prompt))),)
        )
        turns = (*before, Turn("assistant", _need(answer, "empty answer")))
    elif isinstance(row.get("chosen"), list):
        turns = _until_answer(_messages(row["chosen"], "chosen", where))
    else:
        turns = _until_answer(_dialogue(_text(row, "chosen", where).replace("\r\n", "\n")))
    if len(turns) < 2 or not turns[0].content:
        raise Dropped("empty prompt")
    return Conversation(turns, extra=_extra(row, "chosen", "rejected", *prompts))


def _either(row: Row, where: str) -> Conversation:
    """One side of a pair; which one depends on the row alone, so that neither order nor number of rows
    changes it.
    """
    pair = _preference(row, where)
    answer = pair.chosen if stable_hash((pair.prompt, pair.chosen, pair.rejected), 0) % 2 else pair.rejected
    return Conversation((*pair.prompt, Turn("assistant", answer)), extra=pair.extra)


def _dialogue(text: str) -> tuple[Turn, ...]:
    """Return the turns of a ``\\n\\nHuman: ... \\n\\nAssistant: ...`` dialogue."""
    before, *pieces = _HH_MARK.split(text)
    if before.strip() or not pieces:
        raise Dropped("not a Human/Assistant dialogue")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Turn(roles[mark], content.strip()) for mark, content in zip(pieces[::2], pieces[1::2], strict=True)
    )


def _pair(prompt: tuple[Turn, ...], chosen: str, rejected: str, extra: dict[str, Any]) -> Preference:
    _need(chosen, "empty answer")
    _need(rejected, "empty answer")
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    return Preference(prompt, chosen, rejected, extra=extra)


def _labelled(row: Row, where: str) -> Labelled:
    answer = _first(row, ("completion", "response"))
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row["prompt"], "prompt", where)
    else:
        prompt = (Turn("user", _need(_content(_text(row, "prompt", where)), "empty prompt")),)
    before, completion = _side(row, answer, where)
    _need(completion, "empty answer")
    return Labelled(
        prompt + before,
        completion,
        _label(row.get("label"), where),
        extra=_extra(row, "prompt", answer, "label"),
    )


def _label(value: Any, where: str) -> bool:
    if value is None:
        raise Dropped("no label")
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"{where}: label must be true or false (1 or 0), found {str(value)[:40]!r}")
    return found


_PARSERS: dict[str, Callable[[Row, str], Record]] = {
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "messages": _chat,
    "text": _plain_text,
    "preference": _preference,
    "hh": _hh,
    "labelled": _labelled,
    "reasoning": _reasoning,
    "gsm8k": _gsm8k,
    "question_answer": _question_answer,
    "prompt": _prompt_alone,
    "chosen": _chosen,
    "either": _either,
}
