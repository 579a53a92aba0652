"""Parsers of rows with judged answers: pairs, answers with a label, steps with labels.

See :class:`mlx_posttrain.data.cells.Format` for what a parser takes and raises.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_posttrain.convert.files import parse_json
from mlx_posttrain.data import messages
from mlx_posttrain.data.cells import (
    Dropped,
    Noted,
    Record,
    Row,
    content,
    filled,
    first,
    peek,
    reads,
    require,
    text,
)
from mlx_posttrain.data.messages import EARLIER, SYSTEM_COLUMNS
from mlx_posttrain.data.parsers import INPUTS, instruction
from mlx_posttrain.data.templates import stable_hash
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError

#: Alternative names of a pair's prompt.
PROMPT_COLUMNS = ("prompt", "question", "instruction", "input", "trajectory", "conversations")
SIDES = (("chosen",), ("rejected",))
#: Columns that are read later: how much better an answer is.
LATER = ("margin", "score_chosen", "score_rejected")
_HH_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@reads(
    "preference",
    PROMPT_COLUMNS,
    *SIDES,
    may=(*INPUTS, *EARLIER, *LATER),
    example={"system": "Be brief.", "question": "What is 2 + 3?", "chosen": "5", "rejected": "A number."},
)
def preference(row: Row, where: str) -> Preference:
    """Orca DPO Pairs, UltraFeedback binarised: a prompt, the better answer and the worse one.

    ``chosen`` and ``rejected`` are text, or messages that end with the answer; any earlier messages are the
    prompt.
    """
    row = _turn_by_turn(row)
    prompt, used = _prompt(row, where)
    chosen_prompt, chosen = _side(row, "chosen", where)
    rejected_prompt, rejected = _side(row, "rejected", where)
    if chosen_prompt != rejected_prompt:
        raise Dropped("chosen and rejected answer different prompts")
    asked = messages.after_system(row, chosen_prompt) if chosen_prompt else prompt
    if not any(turn.content for turn in chosen_prompt or prompt if turn.role != "system"):
        raise Dropped("an empty prompt")
    return _pair(asked, chosen, rejected, messages.rest(row, *used, "chosen", "rejected"))


def _prompt(row: Row, where: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """(the turns of a pair's prompt, the columns that they stand in)."""
    name = first(row, PROMPT_COLUMNS)
    value = peek(row, name)
    if isinstance(value, str) and (said := _said(value)) and said[-1] == Turn("assistant", ""):
        row.get(name)  # rm-static and full-hh of Dahoas
        return messages.after_system(row, said[:-1]), (name,)
    if name != "instruction" or messages.as_list(value) is not None:
        return messages.asked(row, name, where), (name,)
    about = first(row, INPUTS)
    return messages.earlier(row, where, instruction(row, about, where)), (name, about)


def _turn_by_turn(row: Row) -> Row:
    """The row with messages for texts that are JSON lists of what each side said, as LMSYS has them."""
    names = ("prompt", "chosen", "rejected")
    asked, *sides = (_texts(peek(row, name)) for name in names)
    if asked is None or None in sides:
        return row
    if any(len(side or ()) != len(asked) for side in sides):
        raise Dropped("as many answers as questions are needed")
    if not all(map(filled, (*asked, *(part for side in sides for part in side or ())))):
        raise Dropped("an empty turn")
    roles = ("user", "assistant")
    said = {
        name: [
            {"role": role, "content": part}
            for pair in zip(asked, side or (), strict=True)
            for role, part in zip(roles, pair, strict=True)
        ]
        for name, side in zip(names[1:], sides, strict=True)
    }
    changed = Noted({**row, "prompt": asked[0], **said})
    if isinstance(row, Noted):
        changed.read = row.read
    return changed


def _texts(value: Any) -> list[str | None] | None:
    """The texts of a JSON list of them, of which some may be null; None for another value."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = parse_json(value)
    except ValueError:
        return None
    texts = isinstance(found, list) and found and all(isinstance(part, str | None) for part in found)
    return found if texts else None


def _side(row: Row, name: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """(turns before the answer, answer) of one side of a pair: text, messages or one message."""
    value = peek(row, name)
    one = isinstance(value, dict) and any(isinstance(value.get(key), str) for key in messages.ROLE_KEYS)
    if messages.as_list(value) is None and not one:
        return (), content(text(row, name, where))
    row.get(name)
    turns = _ends_with_answer(messages.turns([value] if one else value, name, where))
    return turns[:-1], turns[-1].content


def _ends_with_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if not turns or turns[-1].role != "assistant":
        raise Dropped("a side of the pair does not end with an answer")
    return turns


def _dialogue(row: Row, name: str, where: str) -> tuple[Turn, ...]:
    """The turns of a dialogue: messages, or text as ``\\n\\nHuman: ... \\n\\nAssistant: ...``."""
    if messages.as_list(peek(row, name)) is not None:
        return messages.turns(row.get(name), name, where)
    said = _said(text(row, name, where))
    if not said:
        raise Dropped("not a Human/Assistant dialogue")
    return said


def _said(dialogue: str) -> tuple[Turn, ...]:
    """The turns of ``\\n\\nHuman: ... \\n\\nAssistant: ...``; none of another text."""
    before, *pieces = _HH_MARK.split(dialogue.replace("\r\n", "\n"))
    roles = {"Human": "user", "Assistant": "assistant"}
    said = zip(pieces[::2], pieces[1::2], strict=True)
    return () if before.strip() else tuple(Turn(roles[mark], content.strip()) for mark, content in said)


@reads(
    "hh",
    *SIDES,
    may=(*SYSTEM_COLUMNS, *LATER),
    example={
        "chosen": "\n\nHuman: What is 2 + 3?\n\nAssistant: 5",
        "rejected": "\n\nHuman: What is 2 + 3?\n\nAssistant: A number.",
    },
)
def _hh(row: Row, where: str) -> Preference:
    """HH-RLHF: two dialogues, as text or messages, that differ in the last answer only."""
    chosen, rejected = (_ends_with_answer(_dialogue(row, name, where)) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("chosen and rejected answer different prompts")
    if len(chosen) < 2:
        raise Dropped("an empty prompt")
    prompt = messages.after_system(row, chosen[:-1])
    return _pair(prompt, chosen[-1].content, rejected[-1].content, messages.rest(row, "chosen", "rejected"))


@reads(
    "chosen",
    ("chosen",),
    may=("rejected", *PROMPT_COLUMNS, *INPUTS, *EARLIER),
    detected=False,
    example={"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "A number."},
)
def _chosen(row: Row, where: str) -> Conversation:
    """The better answer of a pair alone, to be imitated before a reward model or a policy learns from pairs.

    Of a pair with a prompt or of a whole dialogue.
    """
    used: tuple[str, ...] = ()
    if any(name in row for name in PROMPT_COLUMNS):
        prompt, used = _prompt(row, where)
        before, answer = _side(row, "chosen", where)
        turns = messages.after_system(row, before) if before else prompt
        turns = (*turns, Turn("assistant", require(answer, "an empty answer")))
    else:
        turns = messages.after_system(row, messages.until_answer(_dialogue(row, "chosen", where)))
    if not any(turn.content for turn in turns[:-1] if turn.role != "system"):
        raise Dropped("an empty prompt")
    row.get("rejected")
    return Conversation(turns, extra=messages.rest(row, "chosen", "rejected", *used))


@reads(
    "either",
    PROMPT_COLUMNS,
    *SIDES,
    may=(*INPUTS, *EARLIER),
    detected=False,
    example={"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "A number."},
)
def _either(row: Row, where: str) -> Conversation:
    """One answer of a pair, by a fair coin: for a policy as good and as bad as its data.

    Drawn by the row's own text, so neither the order nor the number of rows changes the draw.
    """
    pair = preference(row, where)
    answer = pair.chosen if stable_hash((pair.prompt, pair.chosen, pair.rejected), 0) % 2 else pair.rejected
    return Conversation((*pair.prompt, Turn("assistant", answer)), extra=pair.extra)


def _pair(prompt: tuple[Turn, ...], chosen: str, rejected: str, kept: dict[str, Any]) -> Preference:
    require(chosen, "an empty answer")
    require(rejected, "an empty answer")
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    return Preference(prompt, chosen, rejected, extra=kept)


@reads(
    "labelled",
    ("prompt",),
    ("completion", "response"),
    ("label",),
    may=EARLIER,
    example={"prompt": "What is 2 + 3?", "completion": "A number.", "label": False},
)
def _labelled(row: Row, where: str) -> Labelled:
    """KTO: a prompt, one answer, and whether it is a good one (true or false, 1 or 0)."""
    answer = first(row, ("completion", "response"))
    prompt = messages.asked(row, "prompt", where)
    before, completion = _side(row, answer, where)
    require("".join(turn.content for turn in (*prompt, *before) if turn.role != "system"), "an empty prompt")
    require(completion, "an empty answer")
    kept = messages.rest(row, "prompt", answer, "label")
    return Labelled(prompt + before, completion, _label(row.get("label"), where), extra=kept)


def _label(value: Any, where: str) -> bool:
    if value is None:
        raise Dropped("no label")
    labels = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    label = labels.get(str(value).strip().lower())
    if label is None:
        raise UserError(f"{where}: label must be true or false (1 or 0), found {str(value)[:40]!r}")
    return label


@reads(
    "stepwise",
    ("prompt",),
    ("completions",),
    ("labels",),
    example={
        "prompt": "What is 2 + 3?",
        "completions": ["Two and three more.", "6"],
        "labels": [True, False],
    },
)
def _stepwise(row: Row, where: str) -> Record:
    """A prompt and steps with a label each, as in TRL; recognised, and no method learns from them yet."""
    raise UserError(
        f"{where}: these rows are stepwise (prompt, completions, labels: one label for each step), and no "
        "method learns from labelled steps yet; name another format with data.format"
    )
