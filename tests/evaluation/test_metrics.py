"""Metrics against numbers worked by hand, and intervals against data whose distribution is known."""

import itertools
import math

import numpy as np
import pytest

from mlx_posttrain.evaluation.metrics import (
    Interval,
    bootstrap,
    distinct_by_text,
    distinct_n,
    diversity,
    holm,
    jackknife,
    paired_bootstrap,
    pass_at_k,
    perplexity,
    proportion,
    seq_rep_n,
    sign_flip,
    student_quantile,
)

# repetition


@pytest.mark.parametrize(
    "tokens, n, expected",
    [
        ([1, 2, 1, 2, 1, 2], 2, 1 - 2 / 5),  # 12 21 12 21 12
        ([1, 2, 1, 2, 1, 2], 4, 1 - 2 / 3),  # 1212 2121 1212
        ([1, 2, 1, 2, 1, 2], 1, 1 - 2 / 6),
        (range(10), 4, 0.0),
        ([5, 6, 7, 8], 4, 0.0),  # a single n-gram
        ([7] * 67, 4, 1 - 1 / 64),  # the ceiling of 67 tokens
        (np.array([7, 7, 7, 7, 7]), 4, 0.5),
        (["a", "rose", "is", "a", "rose", "is", "a", "rose"], 3, 1 - 3 / 6),
    ],
)
def test_seq_rep_n(tokens, n, expected):
    assert seq_rep_n(tokens, n) == pytest.approx(expected, abs=1e-15)


def test_a_continuation_shorter_than_n_has_no_value():
    assert math.isnan(seq_rep_n([1, 2, 3], 4))
    assert math.isnan(seq_rep_n([], 1))
    assert bootstrap([seq_rep_n([1, 2, 3]), seq_rep_n([7] * 5)]).mean == 0.5


def test_distinct_n_never_crosses_from_one_sequence_to_the_next():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4  # 12 23 12 24
    assert distinct_n([[1], [2], [1]], 1) == 2 / 3
    assert distinct_n([[1, 2, 3], [9]], 2) == 1.0
    assert math.isnan(distinct_n([[1], [2]], 2))
    assert math.isnan(distinct_n([], 2))


def test_distinct_n_of_all_texts_shows_what_repetition_cannot():
    """A model that gives every text the same continuation, which does not repeat itself."""
    same = [[list(range(20))]] * 10
    assert distinct_by_text(same).mean() == pytest.approx(1 / 10)
    assert [seq_rep_n(text[0], 2) for text in same] == [0.0] * 10
    different = [[list(range(20 * i, 20 * i + 20))] for i in range(10)]
    assert distinct_by_text(different).tolist() == [1.0] * 10


def test_distinct_by_text_by_hand():
    """2-grams 12 23 | 12 24 | 56 67: 5 of 6; without one text 4/4, 4/4, 3/4."""
    values = distinct_by_text([[[1, 2, 3]], [[1, 2, 4]], [[5, 6, 7]]])
    assert values.mean() == pytest.approx(5 / 6)
    mean = (1 + 1 + 3 / 4) / 3
    assert values == pytest.approx([5 / 6 + 2 * (mean - w) for w in (1, 1, 3 / 4)])
    # continuations of one text count together, and a text that is too short has no value
    both = distinct_by_text([[[1, 2, 3], [1, 2, 4]], [[5, 6, 7], [8]], [[9]]])
    assert math.isnan(both[2]) and np.nanmean(both) == pytest.approx(5 / 6)
    assert np.isnan(distinct_by_text([[[1, 2, 3]], [[1]]])).all() and distinct_by_text([]).shape == (0,)
    with pytest.raises(ValueError, match="at least one token"):
        distinct_by_text([[[1, 2]], [[3, 4]]], 0)


def test_the_interval_of_distinct_n_covers_the_mean_of_other_texts():
    rng = np.random.default_rng(2)

    def texts() -> list[list[list[int]]]:
        return [[rng.zipf(1.7, 20).clip(max=200).tolist()] for _ in range(40)]

    truth = np.mean([distinct_n([text[0] for text in texts()]) for _ in range(400)])
    hits = [
        low <= truth <= high
        for _, low, high in (bootstrap(distinct_by_text(texts()), samples=300, seed=i) for i in range(200))
    ]
    assert 0.92 <= np.mean(hits) <= 1.0


def test_diversity_is_the_product_of_three():
    assert diversity([1, 2, 1, 2, 1, 2]) == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)
    assert diversity(range(20)) == 1.0
    assert diversity([3] * 10) == pytest.approx(1 / 9 * 1 / 8 * 1 / 7)
    assert math.isnan(diversity([1, 2, 3]))


@pytest.mark.parametrize("function", [seq_rep_n, lambda tokens, n: distinct_n([tokens], n)])
def test_n_below_one_is_an_error(function):
    with pytest.raises(ValueError, match="at least one token"):
        function([1, 2], 0)


# likelihood


def test_perplexity():
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(2 * math.log(8), 2) == pytest.approx(8)
    # 4 nats over 1 token and 0 over 3: every token counts once, not every text
    assert perplexity(np.array([4.0, 0.0]), np.array([1, 3])) == pytest.approx(math.e)
    assert perplexity(1e6, 1) == math.inf
    for empty in (0, np.array([])):
        with pytest.raises(ValueError, match="at least one token"):
            perplexity(0.0, empty)


# intervals


def test_bootstrap_of_two_values_by_hand():
    """Means of two draws from {0, 1} are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.

    Student's quantiles with 1 degree of freedom are tan(pi (p - 1/2)). At a level of .2 the percentiles are
    those at Phi(-+ sqrt(2) tan(.1 pi)) = .32 and .68, at .4 those at .15 and .85.
    """
    assert bootstrap([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    assert bootstrap([0.0, 1.0], level=0.2) == Interval(0.5, 0.5, 0.5)
    assert bootstrap([0.0, 1.0], level=0.4) == Interval(0.5, 0.0, 1.0)


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    mean, low, high = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    ninety = bootstrap(values, level=0.9)
    assert (ninety.high - ninety.low) / (high - low) == pytest.approx(1.645 / 1.96, rel=0.06)


def test_bootstrap_is_a_function_of_its_seed():
    values = np.arange(30.0)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)


@pytest.mark.parametrize(
    "draw, truth",
    [
        (lambda rng: rng.normal(1, 3, 60), 1.0),
        (lambda rng: rng.random(60) < 0.3, 0.3),
        (lambda rng: rng.normal(1, 3, 20), 1.0),
        (lambda rng: rng.lognormal(0, 1, 20), math.exp(0.5)),  # percentiles: .85
        (lambda rng: rng.lognormal(0, 0.5, 20), math.exp(0.125)),
        (lambda rng: rng.exponential(1, 20), 1.0),
        (lambda rng: rng.lognormal(0, 1, 100), math.exp(0.5)),
        (lambda rng: rng.uniform(0, 1, 100) * (rng.random(100) < 0.05), 0.025),  # nearly all rows equal
    ],
)
def test_the_interval_covers_the_truth_as_often_as_stated(draw, truth):
    rng = np.random.default_rng(7)
    hits = [
        low <= truth <= high
        for _, low, high in (bootstrap(draw(rng), samples=400, seed=i) for i in range(1000))
    ]
    assert 0.92 <= np.mean(hits) <= 0.98  # nominal .95; 1000 trials have a standard error of .007


def test_the_paired_interval_of_skewed_values_covers_the_difference():
    """Two models' lengths on 20 rows, lognormal around what a row asks for: percentiles have .90."""
    rng = np.random.default_rng(8)
    variance = 0.7**2 + 0.3**2
    truth, hits = math.exp(0.3 + variance / 2) - math.exp(variance / 2), []
    for i in range(1000):
        asked = rng.normal(0, 0.7, 20)
        a, b = np.exp(asked + 0.3 + rng.normal(0, 0.3, 20)), np.exp(asked + rng.normal(0, 0.3, 20))
        _, low, high = paired_bootstrap(a, b, samples=1000, seed=i)
        hits.append(low <= truth <= high)
    assert 0.92 <= np.mean(hits) <= 0.98


def test_few_rows_that_differ_have_efrons_interval():
    """SciPy's BCa, with the percentiles of Student's quantile: t(.975, 29) = 2.045."""
    stats = pytest.importorskip("scipy.stats")
    values = np.array([0.9, 0.2, 0.5] + [0.0] * 27)
    level = 2 * stats.norm.cdf(2.045 * math.sqrt(30 / 29)) - 1
    expected = stats.bootstrap(
        (values,), np.mean, confidence_level=level, method="BCa", n_resamples=40_000, rng=1
    ).confidence_interval
    found = bootstrap(values, samples=40_000)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.004)
    plain = np.quantile(values[np.random.default_rng(0).integers(30, size=(9999, 30))].mean(1), 0.975)
    assert found.high > plain + 0.02
    assert bootstrap([0.0] * 29 + [1e9]).high <= 1e9  # no draw is outside the values


def test_the_paired_interval_covers_the_difference_and_is_far_narrower():
    rng = np.random.default_rng(3)
    hits, narrower = [], []
    for i in range(300):
        hard = rng.normal(0, 5, 50)  # what both models find hard
        a, b = hard + rng.normal(0.5, 1, 50), hard + rng.normal(0, 1, 50)
        mean, low, high = paired_bootstrap(a, b, samples=300, seed=i)
        assert mean == pytest.approx(a.mean() - b.mean())
        hits.append(low <= 0.5 <= high)
        alone = bootstrap(a, samples=300, seed=i)
        narrower.append((high - low) / (alone.high - alone.low))
    assert 0.90 <= np.mean(hits) <= 0.98
    assert np.mean(narrower) < 0.4


def test_weights_make_a_loss_per_token():
    """Two rows of 1 token at 4 nats and two of 3 tokens at 0 have 8 nats over 8 tokens.

    Draws keep a row's value and weight together.
    """
    loss, tokens = np.array([4.0, 0.0, 4.0, 0.0]), np.array([1, 3, 1, 3])
    assert bootstrap(loss, weights=tokens).mean == 1.0
    assert bootstrap(loss, weights=tokens, transform=np.exp).mean == pytest.approx(math.e)
    assert bootstrap(loss, weights=tokens).high == 4.0  # all four draws are short rows with probability 1/16
    assert paired_bootstrap(loss, loss - 1, weights=tokens) == Interval(1.0, 1.0, 1.0)
    # two draws from 0 (weight 1) and 2 (weight 3) have means 0, 6/4, 2 with probabilities 1/4, 1/2, 1/4
    assert bootstrap([0.0, 2.0], weights=[1, 3], level=0.2) == Interval(1.5, 1.5, 1.5)
    rng = np.random.default_rng(5)
    hits = []
    for i in range(300):
        tokens = rng.integers(1, 20, 80)
        loss = 2.0 + rng.normal(0, 1, 80) / np.sqrt(tokens)
        _, low, high = bootstrap(loss, weights=tokens, samples=300, seed=i, transform=np.exp)
        hits.append(low <= math.exp(2.0) <= high)
    assert 0.90 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7, [0.1, math.nan, 0.1]])
def test_rows_that_do_not_differ_give_a_point(values):
    mean, low, high = bootstrap(values)
    assert low == mean == high == pytest.approx(0.1)


def test_nan_rows_are_left_out():
    values = [1.0, math.nan, 3.0, 5.0]
    assert bootstrap(values) == bootstrap([1.0, 3.0, 5.0])
    assert bootstrap([1.0, 3.0, 5.0, 99.0], weights=[1, 1, 1, 0]) == bootstrap([1.0, 3.0, 5.0])
    # rows without a value on both sides are left out: rows 0 and 3 remain
    assert paired_bootstrap([1.0, math.nan, 3.0, 5.0], [0.0, 0.0, math.nan, 1.0]).mean == 2.5


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bootstrap([]), "no value"),
        (lambda: bootstrap([math.nan]), "no value"),
        (lambda: bootstrap([1.0], weights=[0]), "no value"),
        (lambda: paired_bootstrap([], []), "no value"),
        (lambda: bootstrap([1.0, math.inf]), "infinite"),
        (lambda: paired_bootstrap([math.inf, 1.0], [math.inf, 1.0]), "infinite"),
        (lambda: bootstrap([[1.0]]), "one number per row"),
        (lambda: bootstrap([1.0, 2.0], weights=[1]), "one number per row"),
        (lambda: bootstrap([1.0], weights=[-1]), "zero or more"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "both sides"),
        (lambda: bootstrap([1.0], samples=0), "at least one sample"),
        (lambda: bootstrap([1.0], level=1.0), "between 0 and 1"),
    ],
)
def test_values_without_an_interval_are_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_drawing_in_chunks_does_not_change_the_result(monkeypatch):
    from mlx_posttrain.evaluation import metrics

    at_once, p = (
        bootstrap(np.arange(50.0), samples=500),
        sign_flip(np.arange(50.0), np.full(50, 20.0), flips=500),
    )
    monkeypatch.setattr(metrics, "CHUNK", 120)  # two samples at a time
    assert bootstrap(np.arange(50.0), samples=500) == at_once
    assert sign_flip(np.arange(50.0), np.full(50, 20.0), flips=500) == pytest.approx(p, abs=0.05)


# proportions


@pytest.mark.parametrize(
    "right, rows, low, high",
    [
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (15, 148, 0.0624, 0.1605),
        (81, 263, 0.2553, 0.3662),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilsons_bounds(right, rows, low, high):
    """Against published bounds.

    Source: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3; the
    last case by symmetry.
    """
    found = proportion([1.0] * right + [0.0] * (rows - right))
    assert found == pytest.approx((right / rows, low, high), abs=6e-5)


def test_a_proportion_of_means_stays_between_0_and_1_and_covers_the_truth():
    means = proportion([0.0, 0.25, 0.5, 1.0] * 10)
    assert means.mean == 0.4375 and 0 < means.low < means.mean < means.high < 1
    beyond = proportion(np.array([1.4, 0.9, 1.1, 0.4] * 6))  # influence values may lie outside
    assert beyond.mean == pytest.approx(0.95) and beyond.high < 1
    assert proportion([0.25] * 9) == (0.25, 0.25, 0.25) and proportion([0.0, math.nan, 1.0]).mean == 0.5
    # with unequal weights there is no count
    assert proportion([0.0] * 9, weights=range(1, 10)) == (0, 0, 0)
    rng = np.random.default_rng(3)
    hits = []
    for i in range(300):  # means of four sampled answers, few of them right
        _, low, high = proportion(rng.binomial(4, rng.beta(0.2, 3.0, 60)) / 4, samples=300, seed=i)
        hits.append(low <= 0.2 / 3.2 <= high)
    assert 0.90 <= np.mean(hits) <= 0.99
    near = proportion([1.0] * 9999 + [0.5])  # the bounds are finite even for so steep a slope
    assert 0.999 < near.low < near.mean < near.high < 1
    with pytest.raises(ValueError, match="no value"):
        proportion([])


# jackknife


def test_students_quantiles():
    table = {
        (5, 0.975): 2.571,
        (7, 0.975): 2.365,
        (7, 0.9975): 4.029,
        (15, 0.975): 2.131,
        (15, 0.9975): 3.286,
        (120, 0.975): 1.980,
    }
    for (freedom, probability), quantile in table.items():
        assert student_quantile(probability, freedom) == pytest.approx(quantile, rel=0.006)
        assert student_quantile(1 - probability, freedom) == pytest.approx(
            -student_quantile(probability, freedom)
        )


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(0).normal(2, 3, (12, 2))
    low, high = jackknife(values.mean(0), (values.sum(0) - values) / 11)
    half = 2.201 * values.std(0, ddof=1) / math.sqrt(12)
    assert (high + low) / 2 == pytest.approx(values.mean(0)) and (high - low) / 2 == pytest.approx(
        half, rel=1e-3
    )
    with pytest.raises(ValueError, match="1 part"):
        jackknife(1.0, [1.0])


# significance tests


def test_sign_flips_are_mcnemars_test():
    """Where k rows differ, all in one direction, p is 2 / 2^k, however many rows do not differ."""
    for k in (1, 3, 5, 8):
        a = np.array([1.0] * k + [0.0] * 50)
        assert sign_flip(a, np.zeros(50 + k), flips=40_000) == pytest.approx(2 / 2**k, rel=0.15)
    assert sign_flip([1.0] * 30, [0.0] * 30) == 1 / 10_001
    assert (
        sign_flip([1.0, 0.0], [0.0, 1.0])
        == sign_flip([1.0], [1.0])
        == sign_flip([], [])
        == sign_flip([math.nan], [0.0])
        == 1.0
    )
    assert sign_flip([1.0] * 9, [0.0] * 9, weights=[1] + [0] * 8) == 1.0
    with pytest.raises(ValueError, match="both sides"):
        sign_flip([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="infinite"):
        sign_flip([math.inf], [math.inf])


def test_the_sign_flip_test_has_the_stated_error_rate():
    rng = np.random.default_rng(11)
    p_values = [
        sign_flip(rng.exponential(1, 40), rng.exponential(1, 40), weights=rng.integers(1, 9, 40), flips=500)
        for _ in range(400)
    ]
    assert 0.03 <= np.mean(np.array(p_values) <= 0.05) <= 0.075
    # Models far apart, and few rows of a hundred that differ, which a percentile interval takes for a
    # difference.
    assert sign_flip(rng.normal(1, 1, 40), rng.normal(0, 1, 40)) < 0.01
    few = np.array([1.0] * 4 + [0.0] * 96)
    assert paired_bootstrap(few, np.zeros(100)).low > 0 and sign_flip(few, np.zeros(100)) > 0.1


def test_holms_steps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # .05/4, .05/3, then .03 > .05/2
    assert holm([0.02, 0.02]) == [True, True] and holm([0.03, 0.03]) == [False, False] and holm([]) == []


def test_pass_at_k_by_hand_and_by_enumeration():
    right = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float64)
    assert pass_at_k(right, 1) == pytest.approx(right.mean(1))
    assert pass_at_k(right, 2) == pytest.approx([1 / 2, 5 / 6, 0, 1])
    assert pass_at_k(right, 4).tolist() == [1, 1, 0, 1]
    drawn = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(float)
    for k in (3, 5):
        chosen = list(itertools.combinations(range(7), k))
        counted = np.mean([drawn[:, list(c)].max(1) for c in chosen], axis=0)
        assert pass_at_k(drawn, k) == pytest.approx(counted)
    assert np.isnan(pass_at_k(np.full((1, 4), np.nan), 2)).all()
    with pytest.raises(ValueError, match="at least 5 answers"):
        pass_at_k(right, 5)
