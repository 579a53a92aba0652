"""Published figures of GPT-2 124M, measured here by their own protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_posttrain.console import log
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import likelihood
from mlx_posttrain.evaluation.metrics import perplexity
from mlx_posttrain.evaluation.suite import read_texts
from mlx_posttrain.models.open import open_model
from mlx_posttrain.verify.checks import Check, skipped, within

WINDOW = 1024


@dataclass(frozen=True)
class Anchor:
    """A published figure: what it is of, the rows that it is measured on, and how.

    tolerance: half a unit of the last published digit, and what variants of the protocol differ by.
    """

    name: str
    model: str
    source: str
    config: str | None
    split: str
    figure: Callable[[Model, Any, Sequence[str]], float]
    expected: float
    tolerance: float


def window_perplexity(model: Model, tokenizer: Any, texts: Sequence[str]) -> float:
    """Perplexity per token of all texts as one, in disjoint windows of ``WINDOW`` tokens.

    The texts are joined by an empty line and tokenised as one; nothing is added. The first token of each
    window is given and not predicted, the last window is shorter. Source: Hugging Face's guide "Perplexity of
    fixed-length models" with a stride of the window's length. A model of a shorter context has windows of
    that length.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    length = min(WINDOW, model.context or WINDOW)
    pieces = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
    rows = [Example(tuple(p), (False,) + (True,) * (len(p) - 1)) for p in pieces if len(p) > 1]
    return perplexity(*likelihood.response_loss(model, rows))


def last_word_accuracy(model: Model, tokenizer: Any, texts: Sequence[str]) -> float:
    """Share of texts whose last word greedy decoding predicts, as lm-evaluation-harness scores LAMBADA."""
    return float(np.mean(likelihood.last_words(model, tokenizer, texts)[0]))


GPT2 = "openai-community/gpt2"
ANCHORS = (
    Anchor(
        "GPT-2 124M, perplexity of WikiText-2",
        GPT2,
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
        window_perplexity,
        29.94,
        0.05,
    ),
    Anchor(
        "GPT-2 124M, accuracy on LAMBADA",
        GPT2,
        "EleutherAI/lambada_openai",
        "default",
        "test",
        last_word_accuracy,
        0.3256,
        0.001,
    ),
)


def measure(engine: str = "auto") -> list[Check]:
    """Measure every anchor; one whose weights or data cannot be had is skipped, and says why."""
    return [_measure(anchor, engine) for anchor in ANCHORS]


def _measure(anchor: Anchor, engine: str) -> Check:
    try:
        texts = read_texts(anchor.source, None, split=anchor.split, config=anchor.config, empty=True)
        model, tokenizer, _ = open_model(anchor.model, engine)
    except UserError as error:
        return skipped(anchor.name, str(error))
    log(f"verify: {anchor.name}, {len(texts)} rows ...")
    found = anchor.figure(model, tokenizer, texts)
    return within(anchor.name, anchor.expected, found, anchor.tolerance)
