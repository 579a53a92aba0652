"""The type of a finding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: Whether the data support a finding, contradict it, or are not enough to say.
Verdict = Literal["yes", "no", "cannot say"]


@dataclass
class Finding:
    """A question, the answer in a sentence, a verdict, the numbers behind it, and charts by name."""

    question: str
    sentence: str
    verdict: Verdict
    stats: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The finding without its charts, for JSON."""
        return {
            "question": self.question,
            "sentence": self.sentence,
            "verdict": self.verdict,
            "figures": self.stats,
        }
