"""The names that losses use, the same in all libraries: NumPy in float64 is the truth."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.ops import ops
from tests.helpers import array, gradient, indices, libraries, numbers

VALUES = [0.5, -1.0, 2.0, 4.0, 8.0, -0.25]
SEGMENTS = [0, 2, 0, 4, 2, 4]  # in no order; 1 and 3 have no values


@pytest.mark.parametrize("library", libraries())
def test_segment_sum_by_hand(library):
    found = ops(array(library, VALUES)).segment_sum(array(library, VALUES), indices(library, SEGMENTS), 6)
    assert numbers(found).tolist() == [2.5, 0.0, 7.0, 0.0, 3.75, 0.0]  # exact: all are sums of halves
    assert found.dtype == array(library, VALUES).dtype


@pytest.mark.parametrize("library", libraries())
def test_segment_sum_of_what_is_not_there(library):
    """Padding of an index belongs to row 0 with value 0; a segment may have all values."""
    xp = ops(array(library, VALUES))
    padded = xp.segment_sum(array(library, [*VALUES, 0.0, 0.0]), indices(library, [*SEGMENTS, 0, 0]), 5)
    assert numbers(padded).tolist() == [2.5, 0.0, 7.0, 0.0, 3.75]
    one = xp.segment_sum(array(library, VALUES), indices(library, [0] * 6), 1)
    assert numbers(one).tolist() == [sum(VALUES)]


@pytest.mark.parametrize("library", engines.available())
def test_segment_sum_is_numpys_in_value_and_gradient(library):
    """Of 200 values in 7 segments: the gradient of a weighted sum of squares is 2 w[s] S[s] at each value."""
    rng = np.random.default_rng(0)
    values, segments, weights = rng.normal(size=200), rng.integers(0, 7, 200), rng.normal(size=7)
    truth = ops(values).segment_sum(values, segments, 7)
    assert truth == pytest.approx([values[segments == s].sum() for s in range(7)])
    found = ops(array(library, values)).segment_sum(array(library, values), indices(library, segments), 7)
    assert numbers(found) == pytest.approx(truth, rel=1e-5, abs=1e-5)

    def loss(x):
        sums = ops(x).segment_sum(x, indices(library, segments), 7)
        return array(library, weights) * sums**2

    wanted = (2 * weights * truth)[segments]
    assert gradient(library, loss, values) == pytest.approx(wanted, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("library", engines.available())
def test_segment_sum_takes_the_row_numbers_of_a_batch(library):
    """``batch.row`` is int32 on both engines."""
    rows = np.array(SEGMENTS, np.int32)
    if library == "mlx":
        import mlx.core as mx

        segments = mx.array(rows)
    else:
        import torch

        segments = torch.from_numpy(rows)
    found = ops(array(library, VALUES)).segment_sum(array(library, VALUES), segments, 5)
    assert numbers(found).tolist() == [2.5, 0.0, 7.0, 0.0, 3.75]
