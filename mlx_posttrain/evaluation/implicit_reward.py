"""What a preference-optimised policy learned, and at what distance from its start.

Its implicit reward of an answer is beta times log pi(y|x) - log pi_ref(y|x) (Rafailov et al. 2023, eq. 5):
like a reward model's score it should be higher for the better answer, so it is held to the same baselines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mlx_posttrain import runs
from mlx_posttrain.console import log
from mlx_posttrain.data import batches
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Example, Pair
from mlx_posttrain.engines.base import Generated, Model
from mlx_posttrain.evaluation import preference
from mlx_posttrain.evaluation.metrics import bootstrap
from mlx_posttrain.training.session import Session
from mlx_posttrain.training.setup import load_reference

T = TypeVar("T")

#: Held-out prompts that are answered by policy and reference at the end.
PROMPTS = 64
#: Nats by which the chosen answers' log-probability must have fallen before it is called displacement.
DISPLACED = 1.0


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
    firsts = list({pair.prompt: pair for pair in reversed(pairs)}.values())[::-1][:PROMPTS]
    prompts = [pair.chosen.tokens[: pair.chosen.answer_start] for pair in firsts]
    answers = _sample(session, session.model, prompts)
    rows = [_example(*both) for both in zip(prompts, answers, strict=True)]
    judged, sampled = (_logprobs(session, session.model, of) for of in (sides, rows))

    def by_reference(model: Model) -> tuple[np.ndarray, np.ndarray, list[Generated]]:
        return (
            _logprobs(session, model, sides),
            _logprobs(session, model, rows),
            _sample(session, model, prompts),
        )

    judged_ref, sampled_ref, answers_ref = ask_reference(session, by_reference)
    rewards = implicit_rewards(recipe.preference, sides, judged, judged_ref)
    found = preference.compare_with_baselines(
        rewards[::2], rewards[1::2], [pair.row for pair in pairs], dataset.train_rows, recipe.seed
    )
    kl = bootstrap(sampled - sampled_ref, seed=recipe.seed)
    length, length_ref = (float(np.mean([len(one.tokens) for one in of])) for of in (answers, answers_ref))
    moved = displacement(session.run.metrics())
    figures = {"kl": kl, "prompts": len(prompts), "length": length, "reference_length": length_ref}
    text = json.dumps({**found.to_dict(), **figures, **moved}, indent=2) + "\n"
    runs.write_text(session.run.folder / "report.json", text)
    _write_samples(session, firsts, answers, answers_ref)
    lines = [
        f"implicit reward, {_formula(recipe.preference)}:",
        *found.lines(),
        f"KL to the reference on {len(prompts)} held-out prompts: {kl.mean:.2f} [{kl.low:.2f}, "
        f"{kl.high:.2f}] nats "
        f"an answer; answers of {length:.1f} tokens, the reference's of {length_ref:.1f}",
    ]
    log("\n".join([*lines, *([displacement_sentence(moved)] if moved else [])]))
    return {"accuracy": found.accuracy.mean, "kl": kl.mean, "answer_length": length}


def implicit_rewards(
    section: Any, examples: Sequence[Example], logps: np.ndarray, ref_logps: np.ndarray
) -> np.ndarray:
    """[R] rewards of answers as the loss sees them.

    section: the recipe's ``preference``; logps, ref_logps: [R] under policy and reference, in nats. Without a
    reference in the loss the reward is beta times the log-prob that it compares: of SimPO and ORPO a token's
    mean.
    """
    values = logps - ref_logps if section.objective.reference else logps
    if section.by_length:
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
    return function(load_reference(session.engine, session.recipe, session.folder))


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


def displacement_sentence(moved: Mapping[str, float]) -> str:
    """Whether the margin came from chosen answers rising or rejected ones falling, in words."""
    chosen, rejected, margin = moved["chosen_moved"], moved["rejected_moved"], moved["margin_moved"]
    text = (
        f"held-out log-probs moved by {chosen:+.1f} nats for chosen answers, {rejected:+.1f} for rejected: "
        f"the margin by {margin:+.1f}"
    )
    if margin > 0 and chosen < -DISPLACED:
        return (
            f"{text}. Chosen answers became less likely while the margin grew (likelihood displacement, "
            f"Razin et "
            "al. 2024): other answers gained. A higher preference.beta or preference.sft_weight counters it"
        )
    return text


def _formula(section: Any) -> str:
    """What the implicit reward of a section's loss is, in words."""
    of = "of a token on average" if section.by_length else "of an answer"
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
    session: Session, pairs: Sequence[Pair], answers: Sequence[Generated], theirs: Sequence[Generated]
) -> None:
    """Put the first answers beside the reference's in samples.jsonl."""
    decode = session.facts.tokenizer.decode
    for pair, ours, other in list(zip(pairs, answers, theirs, strict=True))[: session.recipe.sample.count]:
        session.run.sample(
            {
                "prompt": pair.row.prompt[-1].content if pair.row.prompt else "",
                "answer": decode(ours.tokens).strip(),
                "reference_answer": decode(other.tokens).strip(),
                "wanted": pair.row.chosen,
            }
        )
