"""One parser for each row format: a row with the format's columns becomes a record.

Each parser takes (row, where); ``where`` names the file and row in an error. It raises Dropped for a row that
lacks something, and UserError for a value of the wrong type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlx_posttrain.data.templates import stable_hash
from mlx_posttrain.data.thoughts import split_thought, with_thought
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError

Record = Conversation | Preference | Labelled
Row = Mapping[str, Any]

#: Alternative names of the columns that more than one place reads.
PROMPT_COLUMNS = ("prompt", "question", "instruction")  # of a pair
REASONING_COLUMNS = (
    ("question", "problem", "prompt"),
    ("thinking", "deepseek_reasoning", "reasoning"),
    ("answer", "deepseek_solution", "solution"),
)
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message
_ROLE_NAMES = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "model"),
}
ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
NO_INPUT = {"<noinput>", "<no input>", "noinput", "no input", "n/a"}
_HH_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Dropped(Exception):
    """A row that cannot be used although the file is sound; the message is the reason to count."""


# Values


def _text(row: Row, name: str, where: str) -> str:
    """Return a column as text.

    A number is written out (an answer in a CSV or Parquet file may well be one); a missing value is empty.
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
    """Return the text of a turn, without outer white space (the template's task) and with \\n line ends."""
    return text.replace("\r\n", "\n").strip()


def _first(row: Row, names: Iterable[str]) -> str:
    """Return the first of the alternative columns that the row has, or the last name if it has none."""
    name = ""
    for name in names:
        if name in row:
            break
    return name


def _require(text: str, reason: str) -> str:
    """Return ``text``. Raises Dropped with the reason if it is empty."""
    if not text.strip():
        raise Dropped(reason)
    return text


def _extra(row: Row, *used: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in used}


def _messages(value: Any, name: str, where: str) -> tuple[Turn, ...]:
    """Return the turns of a list of messages, {role, content} or ShareGPT's {from, value}.

    An answer's thought may stand under a key of its own. A message with weight 0 is not trained.
    """
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
        if not isinstance(role, str):
            raise UserError(f"{where}: a message's role must be text, found {type(role).__name__}")
        if role not in ROLES:
            raise Dropped(f"role {role[:40]!r}")
        content = _content(_text(message, key, where))
        if ROLES[role] == "assistant":
            thoughts = [t for name in THOUGHT_KEYS if isinstance(t := message.get(name), str) and t.strip()]
            if thoughts and content and not split_thought(content)[0]:
                content = with_thought(_content(thoughts[0]), content)
        turns.append(Turn(ROLES[role], content, _weight(message, where)))
    return tuple(turns)


def _weight(message: Row, where: str) -> bool:
    """Return whether a message is trained: False for a weight of 0, as in OpenAI's fine-tuning format."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where}: a message's weight must be 0 or 1, found {str(weight)[:40]!r}")
    return weight != 0


def _until_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Return the turns up to the last answer: a user turn after it has nothing to train on."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise Dropped("no assistant turn")
    _require(turns[last].content, "empty answer")
    return turns[: last + 1]


# One parser per format


def _alpaca(row: Row, where: str) -> Conversation:
    answer = _first(row, ("output", "response"))
    question = _content(_text(row, "instruction", where))
    context = _content(_text(row, "input", where))
    if context.lower() in NO_INPUT:
        context = ""
    prompt = _require("\n\n".join(part for part in (question, context) if part), "empty prompt")
    turns = (
        Turn("user", prompt),
        Turn("assistant", _require(_content(_text(row, answer, where)), "empty answer")),
    )
    return Conversation(turns, extra=_extra(row, "instruction", "input", answer))


def _prompt_completion(row: Row, where: str) -> Conversation:
    """Parse a prompt and its completion, as text or messages.

    An empty prompt is allowed; the completion is then a text without a beginning.
    """
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
    prompt, completion = _text(row, "prompt", where), _require(_text(row, answer, where), "empty answer")
    return Conversation((Turn("user", prompt), Turn("assistant", completion)), templated=False, extra=extra)


def _chat(row: Row, where: str) -> Conversation:
    name = _first(row, ("messages", "conversations"))
    if row.get(name) is None:
        raise Dropped("no messages")
    return Conversation(_until_answer(_messages(row[name], name, where)), extra=_extra(row, name))


def _plain_text(row: Row, where: str) -> Conversation:
    text = _require(_text(row, "text", where), "empty text")
    return Conversation((Turn("assistant", text),), templated=False, extra=_extra(row, "text"))


def _question_answer(row: Row, where: str) -> Conversation:
    """Parse a question and its answer.

    The answer also stays in ``extra``, for checkers and reward functions to compare with.
    """
    question = _require(_content(_text(row, "question", where)), "empty prompt")
    answer = _require(_content(_text(row, "answer", where)), "empty answer")
    return Conversation((Turn("user", question), Turn("assistant", answer)), extra=_extra(row, "question"))


def _reasoning(row: Row, where: str) -> Conversation:
    """Parse a question, a trace and the answer it leads to, written as DeepSeek-R1 does.

    The answer also stays in ``extra``, under its own name.
    """
    question_column, trace_column, answer_column = (_first(row, names) for names in REASONING_COLUMNS)
    question = _require(_content(_text(row, question_column, where)), "empty prompt")
    trace = _require(_content(_text(row, trace_column, where)), "empty trace")
    answer = split_thought(_require(_content(_text(row, answer_column, where)), "empty answer"))[1]
    return _with_trace(question, trace, answer, _extra(row, question_column, trace_column))


def _gsm8k(row: Row, where: str) -> Conversation:
    """Parse a GSM8K row, whose one column holds the steps, ``####`` and the answer.

    The calculator marks ``<<48/2=24>>`` in the steps are removed.
    """
    steps, mark, answer = _text(row, "answer", where).rpartition("####")
    if not mark:
        raise Dropped("no #### before the answer")
    steps = _require(_content(re.sub(r"<<[^<>]*>>", "", steps)), "empty trace")
    question = _require(_content(_text(row, "question", where)), "empty prompt")
    return _with_trace(question, steps, _require(_content(answer), "empty answer"), _extra(row, "question"))


def _with_trace(question: str, trace: str, answer: str, extra: dict[str, Any]) -> Conversation:
    turns = (Turn("user", question), Turn("assistant", with_thought(trace, answer)))
    return Conversation(turns, extra=extra | {"answer": answer})


def _preference(row: Row, where: str) -> Preference:
    """Parse a pair of answers to one prompt.

    ``chosen`` and ``rejected`` are text, or messages that end with the answer; any earlier messages are the
    prompt. A column ``system``, as in Orca DPO Pairs, is the system turn of a prompt that has none.
    """
    name = _first(row, PROMPT_COLUMNS)
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
    asked, system = chosen_prompt or prompt, row.get("system")
    if isinstance(system, str) and system.strip() and asked[0].role != "system":
        asked, used = (Turn("system", _content(system)), *asked), (*used, "system")
    return _pair(asked, chosen, rejected, _extra(row, *used))


def _side(row: Row, name: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """Return (turns before the answer, answer) of one side of a pair."""
    if not isinstance(row.get(name), list):
        return (), _content(_text(row, name, where))
    turns = _messages(row[name], name, where)
    if not turns or turns[-1].role != "assistant":
        raise Dropped("a side of the pair does not end with an answer")
    return turns[:-1], turns[-1].content


def _hh(row: Row, where: str) -> Preference:
    """Parse two dialogues that differ in the last assistant turn only."""
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
    """Parse a prompt for a policy to answer: text, or messages that end with the user's."""
    name = "prompt"
    if isinstance(row.get(name), list):
        turns = _messages(row[name], name, where)
    else:
        turns = (Turn("user", _content(_text(row, name, where))),)
    if not turns or turns[-1].role == "assistant":
        raise Dropped("a prompt that ends with an answer")
    _require(turns[-1].content, "empty prompt")
    return Conversation(turns, extra=_extra(row, name))


def _chosen(row: Row, where: str) -> Conversation:
    """Parse the preferred answer alone, of a pair with a prompt or of a whole dialogue.

    SFT before a reward model imitates it.
    """
    prompts = [n for n in PROMPT_COLUMNS if n in row]
    if prompts:
        turns, answer = _side(row, "chosen", where)
        prompt = row[prompts[0]]
        before = turns or (
            _messages(prompt, prompts[0], where)
            if isinstance(prompt, list)
            else (Turn("user", _content(str(prompt))),)
        )
        turns = (*before, Turn("assistant", _require(answer, "empty answer")))
    elif isinstance(row.get("chosen"), list):
        turns = _until_answer(_messages(row["chosen"], "chosen", where))
    else:
        turns = _until_answer(_dialogue(_text(row, "chosen", where).replace("\r\n", "\n")))
    if len(turns) < 2 or not turns[0].content:
        raise Dropped("empty prompt")
    return Conversation(turns, extra=_extra(row, "chosen", "rejected", *prompts))


def _either(row: Row, where: str) -> Conversation:
    """Parse one side of a pair, drawn by the row's own text.

    So neither the order nor the number of rows changes the draw.
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
    _require(chosen, "empty answer")
    _require(rejected, "empty answer")
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    return Preference(prompt, chosen, rejected, extra=extra)


def _labelled(row: Row, where: str) -> Labelled:
    answer = _first(row, ("completion", "response"))
    if isinstance(row.get("prompt"), list):
        prompt = _messages(row["prompt"], "prompt", where)
    else:
        prompt = (Turn("user", _require(_content(_text(row, "prompt", where)), "empty prompt")),)
    before, completion = _side(row, answer, where)
    _require(completion, "empty answer")
    return Labelled(
        prompt + before,
        completion,
        _label(row.get("label"), where),
        extra=_extra(row, "prompt", answer, "label"),
    )


def _label(value: Any, where: str) -> bool:
    if value is None:
        raise Dropped("no label")
    labels = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    label = labels.get(str(value).strip().lower())
    if label is None:
        raise UserError(f"{where}: label must be true or false (1 or 0), found {str(value)[:40]!r}")
    return label


PARSERS: dict[str, Callable[[Row, str], Record]] = {
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
