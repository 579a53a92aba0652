"""Which training rows are dropped, and why: kept for whoever asks, beside the lines that say it.

Rows pass through a reader, filters, and a tokenizer, each of which may drop some. Inside ``collect()`` they
add what they drop to one Counter, {reason: rows}; outside it nothing is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_COUNTER: ContextVar[Counter[str] | None] = ContextVar("drops", default=None)


@contextmanager
def collect() -> Iterator[Counter[str]]:
    """A Counter that fills with what is dropped inside."""
    counter: Counter[str] = Counter()
    token = _COUNTER.set(counter)
    try:
        yield counter
    finally:
        _COUNTER.reset(token)


def add(reasons: Mapping[str, int]) -> None:
    """Count rows dropped from training, by reason; reasons without rows are left out."""
    counter = _COUNTER.get()
    if counter is not None:
        counter.update({reason: count for reason, count in reasons.items() if count})
