"""Lists of messages to turns: OpenAI's and ShareGPT's, with the many names that roles have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_posttrain.convert.files import parse_json
from mlx_posttrain.data.cells import Dropped, Row, content, extra, filled, first, peek, require, text
from mlx_posttrain.data.thoughts import from_marks, split_thought, with_thought, without_marks
from mlx_posttrain.data.types import Turn
from mlx_posttrain.errors import UserError

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message
_ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "bing", "bard", "claude", "model", "ai"),
}
#: In any case: {name of a role: ours}.
ROLES = {name: role for role, names in _ROLE_NAMES.items() for name in names}
#: Roles of what a tool is asked and answers, in ShareGPT's and OpenAI's data.
TOOL_ROLES = (
    "tool",
    "tool_call",
    "tool_response",
    "tool_result",
    "function",
    "function_call",
    "function-call",
    "function_response",
    "function-response",
    "observation",
    "ipython",
)
TOOL_KEYS = ("tool_calls", "function_call")
TOOL_CALLS = "tool calls, which are not supported"  # the one reason, whatever the format
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
SYSTEM_COLUMNS = ("system", "system_prompt")
#: Columns that stand before a prompt of text.
EARLIER = (*SYSTEM_COLUMNS, "history")


def as_list(value: Any) -> list[Any] | None:
    """The messages that a column holds, None where it holds none.

    They are a list, JSON of one as text, or one list for each key, as Parquet files of ``datasets`` have it.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parse_json(value)
        except ValueError:
            return None
        return value if isinstance(value, list) and value and all(map(_has_role, value)) else None
    if isinstance(value, dict):
        return _rows_of(value)
    return value if isinstance(value, list) else None


def _has_role(message: Any) -> bool:
    return isinstance(message, dict) and any(key in message for key in ROLE_KEYS)


def _rows_of(lists: Mapping[str, Any]) -> list[Any] | None:
    sizes = {len(value) if isinstance(value, list) else -1 for value in lists.values()}
    if not _has_role(lists) or len(sizes) != 1 or -1 in sizes:
        return None
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def turns(value: Any, name: str, where: str) -> tuple[Turn, ...]:
    """The turns of a column of messages.

    An answer's thought may stand under a key of its own. A message with weight 0 is not trained. Raises
    Dropped for a role that nobody has, for tool calls, and for content other than text.
    """
    messages = as_list(value)
    if messages is None:
        kind = type(value).__name__
        if isinstance(value, str) and value.lstrip()[:2] in ("[{", "{'"):
            kind = "Python's notation; write it with json.dumps"
        raise UserError(f"{where}: column {name!r} must be a list of messages, found {kind}")
    for message in messages:
        if not (_has_role(message) and any(key in message for key in (*CONTENT_KEYS, *TOOL_KEYS))):
            raise UserError(
                f"{where}: a message in {name!r} must have role and content (or from and "
                f"value), found {str(message)[:80]}"
            )
    if any(map(_uses_tools, messages)):
        raise Dropped(TOOL_CALLS)
    return tuple(_turn(message, where) for message in messages)


def have_tools(row: Row, columns: Iterable[str]) -> bool:
    """Whether there is a tool call in the messages of any of these columns."""
    found = (as_list(peek(row, name)) or [] for name in columns)
    return any(_uses_tools(m) for some in found for m in some if _has_role(m))


def _uses_tools(message: Row) -> bool:
    role, parts = message[first(message, ROLE_KEYS)], message.get("content")
    kinds = [part.get("type") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return (
        (isinstance(role, str) and _spelling(role) in TOOL_ROLES)
        or any(filled(message.get(key)) and message[key] != "[]" for key in TOOL_KEYS)
        or "tool_use" in kinds
        or "tool_result" in kinds
    )


def _spelling(role: str) -> str:
    return role.strip().lower()


def _turn(message: Row, where: str) -> Turn:
    role, key = message[first(message, ROLE_KEYS)], first(message, CONTENT_KEYS)
    if not isinstance(role, str):
        raise UserError(f"{where}: a message's role must be text, found {type(role).__name__}")
    if _spelling(role) not in ROLES:
        raise Dropped(f"an unknown role {role[:40]!r}")
    ours, thoughts = ROLES[_spelling(role)], [message.get(name) for name in THOUGHT_KEYS]
    if isinstance(message.get(key), list):
        said, thought = _parts(message[key], where)
        thoughts.insert(0, thought)
    else:
        said = text(message, key, where)
    if ours != "assistant":
        said = without_marks(said) if ours == "system" else said
        return Turn(ours, content(said), _weight(message, where))
    answer = from_marks(content(said))
    found = [thought for thought in thoughts if isinstance(thought, str) and thought.strip()]
    if found and answer and not split_thought(answer)[0]:
        answer = with_thought(content(found[0]), answer)
    return Turn(ours, answer, _weight(message, where))


def _parts(parts: Sequence[Any], where: str) -> tuple[str, str]:
    """(text, thought) of a message in parts, {"type": "text", "text": ...}; joined as chat templates do."""
    said, thought = "", ""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(part, str):
            said += part
        elif not isinstance(part, dict):
            raise UserError(f"{where}: a part of a message must be an object with type and text")
        elif kind in ("thinking", "reasoning"):
            thought += text(part, first(part, ("thinking", "reasoning", "text")), where)
        elif kind in ("text", "input_text", "output_text"):
            said += text(part, "text", where)
        else:
            raise Dropped("a message with something other than text, such as an image")
    return said, thought


def _weight(message: Row, where: str) -> bool:
    """Whether a message is trained: False for a weight of 0, as in OpenAI's fine-tuning format."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{where}: a message's weight must be 0 or 1, found {str(weight)[:40]!r}")
    return weight != 0


def until_answer(found: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns up to the last answer: a user turn after it has nothing to train on."""
    last = max((i for i, turn in enumerate(found) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise Dropped("no assistant turn")
    require(found[last].content, "an empty answer")
    return found[: last + 1]


def only_asked(rows: Iterable[Row], columns: Mapping[str, str]) -> str | None:
    """The file's name of the column of messages in which only users speak: prompts, not conversations.

    None where somebody answers. columns: {our name: the file's name}.
    """
    names = [columns.get(name, name) for name in ("messages", "conversations", "conversation")]
    found: set[str] = set()
    for row in rows:
        name = first(row, names)
        said = as_list(peek(row, name)) or []
        roles = {ROLES.get(_spelling(str(m[first(m, ROLE_KEYS)]))) if _has_role(m) else None for m in said}
        if not said or not roles <= {"user", "system"} or "user" not in roles:
            return None
        found.add(name)
    return found.pop() if len(found) == 1 else None


def asked(row: Row, name: str, where: str) -> tuple[Turn, ...]:
    """The turns of a prompt: messages, or the user's text after the turns of ``history``.

    See :func:`after_system` for the columns that stand before it.
    """
    if as_list(peek(row, name)) is not None:
        return after_system(row, turns(row.get(name), name, where))
    return earlier(row, where, content(text(row, name, where)))


def earlier(row: Row, where: str, question: str) -> tuple[Turn, ...]:
    """The user's question as a turn, with the system prompt and the history that the row has before it."""
    return after_system(row, (*_history(row, where), Turn("user", question)))


def after_system(row: Row, found: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with the row's system prompt before them, where they have none of their own."""
    name = first(row, SYSTEM_COLUMNS)
    if not isinstance(said := peek(row, name), str) or (found and found[0].role == "system"):
        return found
    said = content(without_marks(row[name]))
    return (Turn("system", said), *found) if said else found


def rest(row: Row, *used: str) -> dict[str, Any]:
    """The row's other columns, also without those that stand before a prompt and are read."""
    return extra(row, *used, *(name for name in EARLIER if name in getattr(row, "read", EARLIER)))


def _history(row: Row, where: str) -> tuple[Turn, ...]:
    """The turns of ``history``: messages, or Alpaca's pairs of a question and its answer."""
    value = peek(row, "history")
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parse_json(value)
        except ValueError:
            return ()
    if not isinstance(value, list):  # a text of another kind, for instance: nobody says who speaks
        return ()
    row.get("history")
    if all(map(_has_role, value)):
        return turns(value, "history", where)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(
            f"{where}: column 'history' must be a list of pairs [question, answer], or of messages"
        )
    sides = [{"question": question, "answer": answer} for question, answer in value]
    return tuple(
        Turn(role, content(require(text(side, key, f"{where}, history"), "an empty turn in the history")))
        for side in sides
        for role, key in (("user", "question"), ("assistant", "answer"))
    )
