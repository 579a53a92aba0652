"""What a run writes to samples.jsonl after each evaluation: texts and scores for the eye."""

from __future__ import annotations

from collections.abc import Callable

from mlx_posttrain.data import encode
from mlx_posttrain.data.types import Turn
from mlx_posttrain.rewards.scorer import score_rows
from mlx_posttrain.training.setup import Session


def answers(session: Session) -> Callable[[int], None]:
    """A function of the step that answers the recipe's prompts, or the first held-out rows'."""
    recipe, dataset, model, tokenizer = (
        session.recipe,
        session.dataset,
        session.model,
        session.facts.tokenizer,
    )
    assert dataset is not None
    data, sample, held_out = recipe.data, recipe.sample, dataset.held_out_rows
    template = data.template if isinstance(data.template, str) else data.template[0]
    rows = [] if data.pack or sample.prompts else held_out[: sample.count]
    wanted: list[str | None] = [c.turns[-1].content for c in rows]
    asked = [c.turns[:-1] for c in rows]
    if sample.prompts:
        asked = [(Turn("user", p),) for p in sample.prompts]
        wanted = [None] * len(asked)
    templated = held_out[0].templated if held_out else True
    length = (model.context or data.max_length) - 1
    encoded = encode.encode_prompts(asked, tokenizer, template, templated=templated) if asked else []
    prompts = [p[-length:] for p in encoded]

    def write(step: int) -> None:
        if not prompts:
            return
        generated = model.generate(
            prompts,
            max_tokens=sample.max_tokens,
            stop=encode.eos_id(tokenizer),
            temperature=sample.temperature,
            seed=recipe.seed,
        )
        for turns, answer, want in zip(asked, generated, wanted, strict=True):
            session.run.sample(
                {
                    "step": step,
                    "prompt": turns[-1].content if turns else "",
                    "answer": tokenizer.decode(answer.tokens).strip(),
                    "stopped": answer.stopped,
                    "wanted": want,
                }
            )

    return write


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
