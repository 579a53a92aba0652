"""Rows that share beginnings in every way, for the tests of packed batches on both engines."""

import numpy as np

from mlx_posttrain.data.types import Example

RNG = np.random.default_rng(0)
PROMPT, OTHER = (tuple(RNG.integers(1, 300, n).tolist()) for n in (9, 6))


def row(prompt: tuple[int, ...], answer: int, *extra: int) -> Example:
    completion = (*extra, *RNG.integers(1, 300, answer).tolist())
    return Example((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))


SHARED = [row(PROMPT, 5), row(OTHER, 3), row(PROMPT, 17), row(PROMPT, 2), row(OTHER, 11)]
ROWS = {
    "answers to two prompts": SHARED,
    "a template before all": [
        row((5, 6, *PROMPT), 4),
        row((5, 6, *OTHER), 2),
        row((5, 6, *PROMPT), 3),
        row((5, 6, *OTHER), 6),
    ],
    "one answer begins as another": [row(PROMPT, 4, 7, 7), row(PROMPT, 8, 7, 7), row(PROMPT, 1, 7)],
    "a row within another": [SHARED[2], Example(SHARED[2].tokens[:14], SHARED[2].trained[:14]), SHARED[1]],
    "the same row twice": [SHARED[0], SHARED[0]],
    "nothing shared, ragged": [row((1, 2), 3), row((3, 4), 30), row((5,), 11)],
    "one row": [row(PROMPT, 6)],
    "trained in the shared part": [Example(e.tokens, (True,) * len(e.tokens)) for e in SHARED],
    "nothing trained in the first row": [
        Example(SHARED[0].tokens, (False,) * len(SHARED[0].tokens)),
        *SHARED[1:],
    ],
}
