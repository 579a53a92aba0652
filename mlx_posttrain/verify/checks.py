"""One line of the table of ``verify``, and when it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PASSED, FAILED, SKIPPED = "pass", "FAIL", "skipped"


@dataclass(frozen=True)
class Check:
    """One line of the table; ``measured`` of one that was skipped says why."""

    name: str
    expected: str
    measured: str
    tolerance: str
    verdict: str


def within(name: str, expected: float, measured: float, tolerance: float, form: str = ".4f") -> Check:
    """A figure that may be ``tolerance`` away from the expected one; one that is not finite fails."""
    verdict = PASSED if abs(measured - expected) <= tolerance else FAILED
    return Check(name, format(expected, form), format(measured, form), f"± {tolerance:.1g}", verdict)


def skipped(name: str, why: str) -> Check:
    """A check that could not be made."""
    return Check(name, "", why, "", SKIPPED)


def failed(checks: Iterable[Check]) -> bool:
    """Whether a check failed; one that was skipped did not."""
    return any(check.verdict == FAILED for check in checks)
