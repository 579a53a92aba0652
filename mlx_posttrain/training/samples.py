"""What a run writes to samples.jsonl after each evaluation: texts and scores for the eye."""

from __future__ import annotations

from collections.abc import Callable

from mlx_posttrain.console import log
from mlx_posttrain.data import encode, mixture
from mlx_posttrain.data.tokens import stop_ids
from mlx_posttrain.data.types import Conversation, Labelled, Preference, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.rewards.scorer import score_rows
from mlx_posttrain.training.session import Session

Samples = Callable[[Session], Callable[[int], None]]


def default_for(session: Session) -> Samples:
    """What a method that names none writes: scores of pairs for a classifier, else answers."""
    return pair_scores if session.method.saves(session.recipe) == "classifier" else answers


def answers(session: Session) -> Callable[[int], None]:
    """A function of the step that answers the recipe's prompts, or the first held-out rows'.

    A row may be a conversation, whose last turn is what is wanted, a preference pair, whose chosen answer is,
    or a labelled answer, which is if it is good.
    """
    recipe, dataset, model = session.recipe, session.dataset, session.model
    assert dataset is not None
    data, sample, tokenizer = recipe.data, recipe.sample, session.facts.tokenizer
    length = (model.context or data.max_length) - 1
    rows = [_question(row) for row in dataset.held_out_rows]
    if sample.prompts:
        template = mixture.first(next(iter(data.parts.values())).template)
        templated = not dataset.untemplated
        rows = [((Turn("user", p),), templated, None) for p in sample.prompts]
        encoded = encode.encode_prompts([r[0] for r in rows], tokenizer, template, templated=templated)
    else:
        rows = [] if data.pack or not sample.count else rows
        names = mixture.templates(dataset.held_out_rows[: len(rows)], data)
        ways = [(turns, templated, name) for (turns, templated, _), name in zip(rows, names, strict=True)]
        found = mixture.try_prompts(ways, tokenizer)
        asked = [(row, ids) for row, ids in zip(rows, found, strict=True) if not isinstance(ids, UserError)]
        refusals = [error for error in found if isinstance(error, UserError)]
        if refusals:
            log(
                f"samples: {len(refusals)} of {len(rows)} held-out rows cannot be asked and are left out: "
                f"{refusals[0]}"
            )
        asked = asked[: sample.count]
        rows, encoded = [row for row, _ in asked], [ids for _, ids in asked]
    prompts = [p[-length:] for p in encoded]

    def write(step: int) -> None:
        if not prompts:
            return
        generated = model.generate(
            prompts,
            max_tokens=sample.max_tokens,
            stop=stop_ids(tokenizer),
            temperature=sample.temperature,
            seed=recipe.seed,
        )
        for (turns, _, wanted), answer in zip(rows, generated, strict=True):
            session.run.sample(
                {
                    "step": step,
                    "prompt": turns[-1].content if turns else "",
                    "answer": tokenizer.decode(answer.tokens).strip(),
                    "stopped": answer.stopped,
                    "wanted": wanted,
                }
            )

    return write


def _question(row: Conversation | Preference | Labelled) -> tuple[tuple[Turn, ...], bool, str | None]:
    """(turns before the answer, whether a template goes around them, the answer that is wanted)."""
    if isinstance(row, Preference):
        return row.prompt, row.templated, row.chosen
    if isinstance(row, Labelled):
        return row.prompt, row.templated, row.completion if row.label else None
    return row.turns[:-1], row.templated, row.turns[-1].content


def pair_scores(session: Session) -> Callable[[int], None]:
    """A function of the step that scores both answers of the first held-out pairs."""
    assert session.dataset is not None
    pairs = session.dataset.held_out[: session.recipe.sample.count]

    def write(step: int) -> None:
        if not pairs:
            return
        rows = [side.tokens for pair in pairs for side in (pair.chosen, pair.rejected)]
        scores = score_rows(session.model, rows, session.facts.pad)
        for i, pair in enumerate(pairs):
            session.run.sample(
                {
                    "step": step,
                    "prompt": pair.row.prompt[-1].content,
                    "chosen": pair.row.chosen,
                    "rejected": pair.row.rejected,
                    "chosen_score": float(scores[2 * i]),
                    "rejected_score": float(scores[2 * i + 1]),
                }
            )

    return write
