"""What a preference-optimised policy learned, and at what distance from its start.

Its implicit reward of an answer is beta times log pi(y|x) - log pi_ref(y|x) (Rafailov et al. 2023, eq. 5):
like a reward model's score it should be higher for the better answer, so it is held to the same baselines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mlx_posttrain import runs
from mlx_posttrain.console import log
from mlx_posttrain.data import batches
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Example, Judged, Pair, Turn
from mlx_posttrain.engines.base import Generated, Model
from mlx_posttrain.evaluation import preference
from mlx_posttrain.evaluation.metrics import Interval, bootstrap
from mlx_posttrain.training.session import Session
from mlx_posttrain.training.setup import load_reference

T = TypeVar("T")
Item = TypeVar("Item", Pair, Judged)

#: Held-out prompts that are answered by policy and reference at the end.
PROMPTS = 64
#: Nats by which the chosen answers' log-probability must have fallen before it is called displacement.
DISPLACED = 1.0


@dataclass(frozen=True)
class Compared:
    """The policy beside its reference on held-out prompts.

    judged, judged_ref: [R] log-probs in nats of the answers asked about, under policy and reference. kl: nats
    an answer, of answers that the policy samples to ``prompts`` prompts. length, reference_length: tokens of
    both models' answers on average, ``answers`` and ``answers_ref``.
    """

    judged: np.ndarray
    judged_ref: np.ndarray
    kl: Interval
    answers: Sequence[Generated]
    answers_ref: Sequence[Generated]

    @property
    def prompts(self) -> int:
        """How many prompts were answered."""
        return len(self.answers)

    @property
    def length(self) -> float:
        """Mean tokens of the policy's answers."""
        return float(np.mean([len(one.tokens) for one in self.answers]))

    @property
    def reference_length(self) -> float:
        """Mean tokens of the reference's answers."""
        return float(np.mean([len(one.tokens) for one in self.answers_ref]))

    def figures(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {name: getattr(self, name) for name in ("kl", "prompts", "length", "reference_length")}

    def line(self) -> str:
        """The figures in words."""
        return (
            f"KL to the reference on {self.prompts} held-out prompts: {self.kl.mean:.2f} [{self.kl.low:.2f}, "
            f"{self.kl.high:.2f}] nats an answer; answers of {self.length:.1f} tokens, the reference's of "
            f"{self.reference_length:.1f}"
        )


def compare(session: Session, examples: Sequence[Example], asked: Sequence[Example]) -> Compared:
    """Log-probs of some answers, and answers sampled to the prompts of others, under policy and reference."""
    prompts = [example.tokens[: example.answer_start] for example in asked]
    answers = _sample(session, session.model, prompts)
    rows = [_example(*both) for both in zip(prompts, answers, strict=True)]
    judged, sampled = (_logprobs(session, session.model, of) for of in (examples, rows))

    def by_reference(model: Model) -> tuple[np.ndarray, np.ndarray, list[Generated]]:
        return (
            _logprobs(session, model, examples),
            _logprobs(session, model, rows),
            _sample(session, model, prompts),
        )

    judged_ref, sampled_ref, answers_ref = ask_reference(session, by_reference)
    kl = bootstrap(sampled - sampled_ref, seed=session.recipe.seed)
    return Compared(judged, judged_ref, kl, answers, answers_ref)


def first_of_each_prompt(items: Sequence[Item]) -> list[Item]:
    """The first item of each prompt, of the first PROMPTS prompts."""
    return list({item.prompt: item for item in reversed(items)}.values())[::-1][:PROMPTS]


def report(session: Session) -> dict[str, Any]:
    """Judge held-out pairs by the implicit reward, sample beside the reference, and write report.json.

    Returns accuracy, KL (nats an answer) and answer length (tokens) for result.json; an empty dict without
    held-out pairs.
    """
    dataset, recipe = session.dataset, session.recipe
    assert dataset is not None
    pairs: Sequence[Pair] = dataset.held_out
    if not pairs:
        return {}
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    firsts = first_of_each_prompt(pairs)
    beside = compare(session, sides, [pair.chosen for pair in firsts])
    rewards = implicit_rewards(recipe.preference, sides, beside.judged, beside.judged_ref)
    found = preference.compare_with_baselines(
        rewards[::2], rewards[1::2], [pair.row for pair in pairs], dataset.train_rows, recipe.seed
    )
    lines = [f"implicit reward, {_formula(recipe.preference)}:", *found.lines()]
    remedy = "A higher preference.beta or preference.sft_weight counters it"
    wanted = [(pair.row.prompt, pair.row.chosen) for pair in firsts]
    return {"accuracy": found.accuracy.mean, **tell(session, found.to_dict(), lines, beside, wanted, remedy)}


def tell(
    session: Session,
    found: Mapping[str, Any],
    lines: Sequence[str],
    beside: Compared,
    wanted: Sequence[tuple[tuple[Turn, ...], str | None]],
    remedy: str,
) -> dict[str, Any]:
    """Write report.json and samples, and print the report; returns figures for result.json.

    found, lines: what held-out answers told, as numbers and in words. wanted: of the first prompts their
    turns and a good answer, where there is one. remedy: against likelihood displacement.
    """
    moved = displacement(session.run.metrics())
    text = json.dumps({**found, **beside.figures(), **moved}, indent=2) + "\n"
    runs.write_text(session.run.folder / "report.json", text)
    _write_samples(session, wanted, beside)
    log("\n".join([*lines, beside.line(), *([displacement_sentence(moved, remedy)] if moved else [])]))
    return {"kl": beside.kl.mean, "answer_length": beside.length}


def implicit_rewards(
    section: Any, examples: Sequence[Example], logps: np.ndarray, ref_logps: np.ndarray
) -> np.ndarray:
    """[R] rewards of answers: beta times the log-ratio of the whole answer (Rafailov et al. 2023, eq. 5).

    section: the recipe's ``preference``; logps, ref_logps: [R] under policy and reference, in nats. Without a
    reference in the loss the reward is beta times the log-prob that it compares: of SimPO and ORPO a token's
    mean.
    """
    values = logps - ref_logps if section.objective.reference else logps
    if section.objective.length:
        values = values / np.array([max(1, sum(e.trained[1:])) for e in examples])
    return section.strength * values


def ask_reference(session: Session, function: Callable[[Model], T]) -> T:
    """``function`` of the model that the policy is compared with: the recipe's ``reference``, or the start.

    With a new adapter that is the same model, adapter off; otherwise a second one, for as long as this takes.
    """
    adapter = getattr(session.recipe, "adapter", None)
    if session.recipe.reference is None and adapter is not None and adapter.path is None:
        with session.model.adapters_off():
            return function(session.model)
    return function(load_reference(session.engine, session.recipe, session.folder, session.facts))


def displacement(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How far the held-out log-probs of either answer moved from the first to the last evaluation.

    ``chosen_moved``, ``rejected_moved`` and ``margin_moved``, in nats an answer; empty with fewer than two
    evaluations.
    """
    names = ("eval/logps/chosen", "eval/logps/rejected")
    evaluations = [record for record in records if names[0] in record]
    if len(evaluations) < 2:
        return {}
    chosen, rejected = (evaluations[-1][name] - evaluations[0][name] for name in names)
    return {"chosen_moved": chosen, "rejected_moved": rejected, "margin_moved": chosen - rejected}


def displacement_sentence(moved: Mapping[str, float], remedy: str = "") -> str:
    """Whether the margin came from chosen answers rising or rejected ones falling, in words.

    remedy: the end of the sentence where it came from the latter alone.
    """
    chosen, rejected, margin = moved["chosen_moved"], moved["rejected_moved"], moved["margin_moved"]
    text = (
        f"held-out log-probs moved by {chosen:+.1f} nats for chosen answers, {rejected:+.1f} for rejected: "
        f"the margin by {margin:+.1f}"
    )
    if margin > 0 and chosen < -DISPLACED:
        return (
            f"{text}. Chosen answers became less likely while the margin grew (likelihood displacement, "
            f"Razin et al. 2024): other answers gained. {remedy}"
        )
    return text


def _formula(section: Any) -> str:
    """What the implicit reward of a section's loss is, in words."""
    of = "of a token on average" if section.objective.length else "of an answer"
    what = "log-ratio to the reference" if section.objective.reference else "log-probability"
    return f"{section.strength:g} times the {what} {of}"


def _sample(session: Session, model: Model, prompts: Sequence[Sequence[int]]) -> list[Generated]:
    """One answer to each prompt at temperature 1."""
    return model.generate(
        prompts,
        max_tokens=session.recipe.sample.max_tokens,
        stop=stop_ids(session.facts.tokenizer),
        temperature=1.0,
        seed=session.recipe.seed,
    )


def _example(prompt: Sequence[int], answer: Generated) -> Example:
    """The tokens that were sampled, the stop token included, marked behind their prompt."""
    ids = [*answer.tokens, *([] if answer.stop is None else [answer.stop])]
    return Example((*prompt, *ids), (False,) * len(prompt) + (True,) * len(ids))


def _logprobs(session: Session, model: Model, examples: Sequence[Example]) -> np.ndarray:
    """[R] log-probs of the examples' trained tokens under a model, in nats."""
    train, found = session.recipe.train, np.zeros(len(examples))
    lengths = [len(e.tokens) for e in examples]
    for rows in batches.for_evaluation(lengths, train.batch_size, train.token_budget):
        batch = batches.collate([examples[i] for i in rows], session.facts.context)
        (values,) = model.token_logprobs([batch])
        found[rows] = [of_row.sum(dtype=np.float64) for of_row in batches.by_row(batch, values)]
    return found


def _write_samples(
    session: Session, wanted: Sequence[tuple[tuple[Turn, ...], str | None]], beside: Compared
) -> None:
    """Put the first answers beside the reference's in samples.jsonl."""
    decode = session.facts.tokenizer.decode
    shown = list(zip(wanted, beside.answers, beside.answers_ref, strict=True))
    for (prompt, good), ours, other in shown[: session.recipe.sample.count]:
        session.run.sample(
            {
                "prompt": prompt[-1].content if prompt else "",
                "answer": decode(ours.tokens).strip(),
                "reference_answer": decode(other.tokens).strip(),
                "wanted": good,
            }
        )
