"""Parsers of rows with judged answers: pairs, answers with a label, steps with labels.

See :class:`mlx_posttrain.data.cells.Format` for what a parser takes and raises.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_posttrain.data import messages
from mlx_posttrain.data.cells import Dropped, Record, Row, content, first, peek, reads, require, text
from mlx_posttrain.data.messages import EARLIER, SYSTEM_COLUMNS
from mlx_posttrain.data.parsers import INPUTS, instruction
from mlx_posttrain.data.templates import stable_hash
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError

#: Alternative names of a pair's prompt.
PROMPT_COLUMNS = ("prompt", "question", "instruction", "input")
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
    if name != "instruction" or messages.as_list(peek(row, name)) is not None:
        return messages.asked(row, name, where), (name,)
    about = first(row, INPUTS)
    return messages.earlier(row, where, instruction(row, about, where)), (name, about)


def _side(row: Row, name: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """(turns before the answer, answer) of one side of a pair."""
    if messages.as_list(peek(row, name)) is None:
        return (), content(text(row, name, where))
    turns = _ends_with_answer(messages.turns(row.get(name), name, where))
    return turns[:-1], turns[-1].content


def _ends_with_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if not turns or turns[-1].role != "assistant":
        raise Dropped("a side of the pair does not end with an answer")
    return turns


def _dialogue(row: Row, name: str, where: str) -> tuple[Turn, ...]:
    """The turns of a dialogue: messages, or text as ``\\n\\nHuman: ... \\n\\nAssistant: ...``."""
    if messages.as_list(peek(row, name)) is not None:
        return messages.turns(row.get(name), name, where)
    before, *pieces = _HH_MARK.split(text(row, name, where).replace("\r\n", "\n"))
    if before.strip() or not pieces:
        raise Dropped("not a Human/Assistant dialogue")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Turn(roles[mark], content.strip()) for mark, content in zip(pieces[::2], pieces[1::2], strict=True)
    )


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
