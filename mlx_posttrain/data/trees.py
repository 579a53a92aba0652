"""Trees of messages, as of Open Assistant, to conversations: from each root along the best answers.

Two forms: a table with one message a row (message_id, parent_id, text, role), and one tree a row, nested in
``prompt`` and ``replies``. At each message the reply with the lowest ``rank`` goes on (0 is the best; without
ranks the first), which gives one conversation a tree, as openassistant-guanaco has them. Messages that were
deleted or failed review are left out with what follows them. Source: Köpf et al. 2023, "OpenAssistant
Conversations".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from mlx_posttrain.console import log
from mlx_posttrain.errors import UserError

Row = dict[str, Any]
TABLE = frozenset(("message_id", "parent_id", "text", "role"))


def is_table(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are the messages of trees."""
    return set(columns) >= TABLE


def threads(rows: Iterable[Row], source: str) -> Iterator[Row]:
    """The rows with trees as conversations in the column ``messages``; other rows as they are."""
    rest = iter(rows)
    head = next(rest, None)
    if head is None:
        return
    if is_table(head):
        yield from _of_table([head, *rest], source)
        return
    for row in chain([head], rest):
        root = row.get("prompt")
        if isinstance(root, dict) and isinstance(root.get("replies"), list):
            path = _path(root, lambda message: message.get("replies"))
            yield {**{k: v for k, v in row.items() if k != "prompt"}, "messages": path}
        else:
            yield row


def _of_table(rows: list[Row], source: str) -> Iterator[Row]:
    """Every row's place in its tree is looked up, so they are all held."""
    replies: dict[str, list[Row]] = {}
    roots = [row for row in rows if row.get("parent_id") in (None, "")]
    others = [row for row in rows if row.get("parent_id") not in (None, "")]
    for row in others:
        replies.setdefault(str(row["parent_id"]), []).append(row)
    known = {str(row.get("message_id")) for row in rows}
    lost = sum(str(row["parent_id"]) not in known for row in others)
    if lost:
        log(f"{source}: {lost:,} messages answer one that is not in the file; they are left out")
    if not roots:
        raise UserError(
            f"{source}: every message has a parent_id, so no conversation has a beginning; the first "
            "message of each has none"
        )
    said = ("message_id", "parent_id", "text", "role", "rank", "deleted", "review_result")
    for root in roots:
        messages = _path(root, lambda message: replies.get(str(message.get("message_id"))))
        yield {**{k: v for k, v in root.items() if k not in said}, "messages": messages}


def _path(root: Mapping[str, Any], replies: Callable[[Mapping[str, Any]], Any]) -> list[Row]:
    """The messages from the root along the best replies."""
    found: list[Row] = []
    seen: set[int] = set()
    message: Mapping[str, Any] | None = root if _usable(root) else None
    while message is not None and id(message) not in seen:
        seen.add(id(message))
        found.append({"role": message.get("role"), "content": message.get("text")})
        among = replies(message)
        message = _best([m for m in among if _usable(m)] if isinstance(among, list) else [])
    return found


def _usable(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and not message.get("deleted")
        and message.get("review_result", True) is not False
    )


def _best(messages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The reply with the lowest rank, the first of equal ones; those without a rank come last."""

    def rank(message: Mapping[str, Any]) -> float:
        value = str(message.get("rank"))  # a CSV file has text
        return float(value) if value.replace(".", "", 1).isdecimal() else float("inf")

    return min(messages, key=rank, default=None)
