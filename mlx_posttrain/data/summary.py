"""What training rows look like as a whole: how long answers are, how even the tasks, how sound the labels.

Nothing is dropped here; quality.py does that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_posttrain.data.cells import Record
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn

TASK_COLUMNS = ("family", "category", "task")
FIRST_WORDS = 2  # of an instruction, which stand for its task where no column names it


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summarize`.

    words: of each kind of answer, the fewest words, the quantiles at 5, 50 and 95 %, and the most. tasks:
    rows of each task, the largest first; empty where rows have no instruction. tasks_by: what names them.
    labels: counts of pairs or labels by what is doubtful, see :func:`check_pairs`, :func:`check_labels`.
    """

    rows: int
    words: dict[str, tuple[int, int, int, int, int]]
    tasks: dict[str, int]
    tasks_by: str
    labels: dict[str, int]

    @property
    def effective_tasks(self) -> float:
        """How many tasks of equal size are as varied: the exponential of the entropy (Hill 1973)."""
        shares = np.array(list(self.tasks.values())) / max(1, sum(self.tasks.values()))
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

    def lines(self) -> list[str]:
        """The summary in words."""
        text = [
            f"words of {kind}: {least} to {most}, median {middle}; 90% have {low} to {high}"
            for kind, (least, low, middle, high, most) in self.words.items()
        ]
        if self.tasks:
            total = sum(self.tasks.values())
            largest = ", ".join(f"{name!r} {n / total:.0%}" for name, n in list(self.tasks.items())[:3])
            text.append(
                f"tasks by {self.tasks_by}: {len(self.tasks)} (effective number "
                f"{self.effective_tasks:.1f}); largest {largest}"
            )
        if self.labels:
            text.append("labels: " + ", ".join(f"{name} {count}" for name, count in self.labels.items()))
        return text


def summarize(rows: Sequence[Record]) -> Summary:
    """Length variety, task balance and label checks of conversations, pairs or labelled answers.

    A task is what the first of TASK_COLUMNS that every row has calls it, else the FIRST_WORDS words that the
    row's first question begins with.
    """
    answers: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if isinstance(row, Preference):
            answers["chosen answers"].append(row.chosen)
            answers["rejected answers"].append(row.rejected)
        elif isinstance(row, Labelled):
            answers["answers labelled good" if row.label else "answers labelled bad"].append(row.completion)
        elif row.turns[-1].role == "assistant":
            answers["answers" if len(row.turns) > 1 else "texts"].append(row.turns[-1].content)
    pairs = [row for row in rows if isinstance(row, Preference)]
    labelled = [row for row in rows if isinstance(row, Labelled)]
    tasks, tasks_by = _tasks(rows)
    return Summary(
        len(rows),
        {kind: _quantiles(texts) for kind, texts in answers.items()},
        tasks,
        tasks_by,
        (check_pairs(pairs) if pairs else {}) | (check_labels(labelled) if labelled else {}),
    )


def check_pairs(rows: Sequence[Preference]) -> dict[str, int]:
    """Numbers of pairs whose label is doubtful or says nothing; texts count without case and spacing.

    "longer chosen" are those whose chosen answer has more words, which at far from half teach length.
    "contradicted" are those of which another pair of the same prompt says the opposite, "repeated" those that
    occurred before, and "under several prompts" those whose two answers stand under another prompt as well.
    """
    keys = [(_prompt_key(row.prompt), _key(row.chosen), _key(row.rejected)) for row in rows]
    known = set(keys)
    prompts: dict[tuple[str, str], set[str]] = defaultdict(set)
    for prompt, chosen, rejected in keys:
        prompts[min(chosen, rejected), max(chosen, rejected)].add(prompt)
    return {
        "pairs": len(rows),
        "longer chosen": sum(len(row.chosen.split()) > len(row.rejected.split()) for row in rows),
        "without prompt": sum(not prompt for prompt, _, _ in keys),
        "equal sides": sum(chosen == rejected for _, chosen, rejected in keys),
        "contradicted": sum(c != r and (prompt, r, c) in known for prompt, c, r in keys),
        "repeated": len(keys) - len(known),
        "under several prompts": sum(len(prompts[min(c, r), max(c, r)]) > 1 for _, c, r in keys),
    }


def check_labels(rows: Sequence[Labelled]) -> dict[str, int]:
    """Numbers of good and bad answers, and of labels that are doubtful; texts count without case and spacing.

    KTO wants good to bad, each times its weight, between 1 to 1 and 4 to 3 (Ethayarajh et al. 2024): a set
    far from that needs the weights. "contradicted" are answers to a prompt that have both labels, "repeated"
    those that occurred before with the same label.
    """
    keys = [(_prompt_key(row.prompt), _key(row.completion), row.label) for row in rows]
    known = set(keys)
    good = sum(row.label for row in rows)
    return {
        "good": good,
        "bad": len(rows) - good,
        "without prompt": sum(not prompt for prompt, _, _ in keys),
        "contradicted": sum((prompt, answer, not label) in known for prompt, answer, label in keys),
        "repeated": len(keys) - len(known),
    }


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _prompt_key(turns: Sequence[Turn]) -> str:
    return _key("\n".join(turn.content for turn in turns))


def _quantiles(texts: Sequence[str]) -> tuple[int, int, int, int, int]:
    counts = [len(text.split()) for text in texts]
    least, low, middle, high, most = np.quantile(counts, [0, 0.05, 0.5, 0.95, 1], method="nearest")
    return int(least), int(low), int(middle), int(high), int(most)


def _tasks(rows: Sequence[Record]) -> tuple[dict[str, int], str]:
    """Rows of each task, the largest first, and what names the tasks."""
    for column in TASK_COLUMNS:
        names = [row.extra.get(column) for row in rows]
        if rows and all(isinstance(name, str) and name for name in names):
            return dict(Counter(map(str, names)).most_common()), column
    questions = [
        next((t.content for t in turns if t.role == "user" and t.content.strip()), None)
        for turns in (row.turns if isinstance(row, Conversation) else row.prompt for row in rows)
    ]
    begun = [" ".join(question.lower().split()[:FIRST_WORDS]) for question in questions if question]
    return dict(Counter(begun).most_common()), "their first words"
