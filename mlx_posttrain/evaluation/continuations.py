"""What compared models write after the openings of base texts: how much it repeats, and how coherent it is.

Coherence is the perplexity of a continuation under one judge, a language model that reads those of all models
after the same openings. Human text, the openings' own, is the anchor: a continuation that falls apart lies
above it, and one that repeats itself below, because repetition is easy to predict. So neither way is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_posttrain.console import log
from mlx_posttrain.data import encode
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import completions, likelihood
from mlx_posttrain.evaluation.comparison import Coherence, ModelResult, Values
from mlx_posttrain.evaluation.metrics import distinct_by_text, diversity, seq_rep_n
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.source import locate, starting_model


def measure_continuations(
    result: ModelResult,
    model: Model,
    tokenizer: Any,
    openings: Sequence[str],
    *,
    max_tokens: int,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> dict[str, list[str]]:
    """Continue the openings greedily and, with ``samples``, by sampling; fill in the metrics of repetition.

    Returns the continuations' texts by metric of coherence, those of one opening in succession.
    """
    result.continuations = completions.generate_continuations(
        model, tokenizer, openings, max_tokens=max_tokens
    )
    written = {"": result.continuations}
    if samples:
        written["_sampled"] = completions.generate_continuations(
            model,
            tokenizer,
            openings,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            samples=samples,
            seed=seed,
        )
    texts = {}
    for suffix, tokens in written.items():
        result.values |= _repetition_metrics(tokens, len(openings), suffix)
        count = len(tokens) // len(openings)
        texts[f"coherence{suffix}"] = [
            _text(tokenizer, openings[i // count], part) for i, part in enumerate(tokens)
        ]
    return texts


def _text(tokenizer: Any, opening: str, tokens: Sequence[int]) -> str:
    """The text of a continuation with the space before it, which some tokenizers leave out at a beginning."""
    before = tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer.decode([*before, *tokens])
    # the last character may be cut in half
    return whole[len(tokenizer.decode(before)) :].rstrip("\ufffd")


def _repetition_metrics(continuations: Sequence[Sequence[int]], texts: int, suffix: str) -> dict[str, Values]:
    """Metrics of repetition, one value per text, by name and suffix.

    A text's value is the mean over its continuations or, for distinct_2, its contribution to that of all.
    """
    count = len(continuations) // texts
    by_text = [continuations[begin : begin + count] for begin in range(0, len(continuations), count)]
    return {
        f"seq_rep_4{suffix}": Values(
            np.array([np.mean([seq_rep_n(tokens) for tokens in text]) for text in by_text])
        ),
        f"distinct_2{suffix}": Values(distinct_by_text(by_text)),
        f"diversity{suffix}": Values(
            np.array([np.mean([diversity(tokens) for tokens in text]) for text in by_text])
        ),
    }


def default_judge(name: str) -> str:
    """The trained model that a model's first ancestor started from, or itself where that cannot be found."""
    try:
        judge = starting_model(name, trained=True)
        locate(judge)
    except UserError as error:
        log(f"{name} itself is the judge of coherence: {error}")
        return name
    return judge


def read_human_text(
    judge: str, engine: str, openings: Sequence[str], human: Sequence[str], max_tokens: int
) -> Coherence:
    """The judge's loss on the openings' own continuations, of which it reads ``max_tokens`` tokens at most.

    Raises UserError for a judge that cannot be opened, or is no language model.
    """
    model, tokenizer, _ = open_model(judge, engine)
    loss = continuation_loss(model, tokenizer, openings, human, [max_tokens] * len(openings))
    return Coherence(judge, Values(loss.per_token, loss.tokens))


def measure_coherence(
    results: Sequence[ModelResult],
    written: Sequence[Mapping[str, Sequence[str]]],
    openings: Sequence[str],
    anchor: Coherence,
    engine: str,
) -> None:
    """Fill in the coherence of each model's continuations.

    written: what ``measure_continuations`` returned for each model; anchor: human text after the same
    openings. All are read only as far as that goes, because the first tokens after an opening are the hardest
    to predict. A text's value is the loss per token of all its continuations.
    """
    log(f"reading the continuations with {anchor.judge}")
    model, tokenizer, _ = open_model(anchor.judge, engine)
    assert anchor.human.weights is not None
    limits = anchor.human.weights.tolist()
    for result, texts in zip(results, written, strict=True):
        for metric, continuations in texts.items():
            count = len(continuations) // len(openings)
            loss = continuation_loss(
                model,
                tokenizer,
                [opening for opening in openings for _ in range(count)],
                continuations,
                [limit for limit in limits for _ in range(count)],
            )
            by_text = likelihood.RowLoss(*(part.reshape(-1, count).sum(1) for part in loss))
            result.values[metric] = Values(by_text.per_token, by_text.tokens)


def continuation_loss(
    model: Model, tokenizer: Any, openings: Sequence[str], texts: Sequence[str], limits: Sequence[int]
) -> likelihood.RowLoss:
    """Loss of the first tokens of each text given its opening, at most ``limits`` of them.

    Opening and text are tokenised together, and scored from the first token that the text has part in; of an
    opening that does not fit the context the end is read. Documents begin as in likelihood.base_text_loss.
    """
    start = encode.bos_ids(tokenizer) or [encode.eos_id(tokenizer)]
    examples = []
    for opening, text, limit in zip(openings, texts, limits, strict=True):
        before, whole = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for part in (opening, opening + text)
        )
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
            min(len(before), len(whole)),
        )
        scored = min(limit, len(whole) - shared, model.context or limit)
        tokens = [*start, *whole[: shared + scored]][-(model.context or len(whole)) - 1 :]
        trained = [i >= len(tokens) - scored for i in range(len(tokens))]
        examples.append(Example(tuple(tokens), tuple(trained)))
    return likelihood.response_loss(model, examples)
