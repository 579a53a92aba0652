"""Evaluation of reward models: four pairs by hand, pairs drawn by prompt, and the bag-of-words baseline."""

from __future__ import annotations

import json
import math
import random
import time

import numpy as np
import pytest

from mlx_posttrain.data import formats, tasks
from mlx_posttrain.data.types import Preference, Turn
from mlx_posttrain.evaluation import preference
from mlx_posttrain.evaluation.metrics import Interval
from mlx_posttrain.evaluation.preference import bag_of_words, compare_with_baselines


def row(chosen: str, rejected: str, prompt: str = "?", **extra: str) -> Preference:
    return Preference((Turn("user", prompt),), chosen, rejected, extra=extra)


# Margins 2, -1, 0 and ln 3; the chosen answer is longer, shorter, as long, shorter.
FOUR = [
    row("aaaaa", "bbb", "1", flaw="rude"),
    row("a", "bb", "2", flaw="wrong"),
    row("aaa", "bbb", "3", flaw="wrong"),
    row("aa", "bbbb", "4", flaw="wrong"),
]
CHOSEN, REJECTED = np.array([2.0, 0.0, 1.0, math.log(3)]), np.array([0.0, 1.0, 1.0, 0.0])


# stats by hand


def test_accuracy_and_loss_by_hand():
    found = compare_with_baselines(CHOSEN, REJECTED, FOUR)
    assert found.pairs == 4
    assert found.accuracy.mean == (1 + 0 + 0.5 + 1) / 4
    assert found.longer.mean == (1 + 0 + 0.5 + 0) / 4
    assert found.over_longer.mean == 0.25
    # -log sigma: ln(1 + e^-2), ln(1 + e), ln 2, ln(4/3)
    assert found.loss == pytest.approx(
        (math.log1p(math.exp(-2)) + math.log1p(math.e) + math.log(2) + math.log(4 / 3)) / 4, abs=1e-12
    )
    assert found.bag_of_words is None and found.over_bag_of_words is None
    assert found.by_column == {"flaw": {"rude": 1.0, "wrong": 0.5}}


def test_equal_scores_are_chance():
    found = compare_with_baselines(np.full(4, 7.0), np.full(4, 7.0), FOUR)
    assert found.accuracy == Interval(0.5, 0.5, 0.5)
    assert found.loss == pytest.approx(math.log(2))
    assert found.calibration == [(0.5, 0.5, 4)] and found.calibration_error == 0.0
    assert found.length_pearson == found.length_spearman == 0.0
    assert sum(found.counts) == 4


def test_calibration_by_hand():
    """Confidence: sigma(2) = .88, sigma(1) = .73 and wrong, .5 and a tie, sigma(ln 3) = .75."""
    confidence = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    found = compare_with_baselines(CHOSEN, REJECTED, FOUR)
    assert [n for _, _, n in found.calibration] == [1, 2, 1]
    expected = [(0.5, 0.5), ((confidence[1] + 0.75) / 2, 0.5), (confidence[0], 1.0)]
    assert np.array(found.calibration)[:, :2] == pytest.approx(np.array(expected))
    assert found.calibration_error == pytest.approx(
        (0 + 2 * ((confidence[1] + 0.75) / 2 - 0.5) + (1 - confidence[0])) / 4
    )


def test_a_model_with_the_true_probabilities_is_calibrated():
    rng = np.random.default_rng(0)
    margins = rng.normal(scale=2, size=4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-np.abs(margins)))
    margins = np.where(right, np.abs(margins), -np.abs(margins))
    rows = [row("a", "b", str(i)) for i in range(4000)]
    assert compare_with_baselines(margins, np.zeros(4000), rows).calibration_error < 0.03
    # the same order, with margins three times too large
    assert compare_with_baselines(3 * margins, np.zeros(4000), rows).calibration_error > 0.1


def test_the_calibration_error_of_perfect_scores_by_hand():
    """Of four pairs with confidence 3/4, k are right in binomial shares, and the error is |k/4 - 3/4|."""
    rows = [row("a", "b", str(i)) for i in range(4)]
    null = compare_with_baselines(np.full(4, math.log(3)), np.zeros(4), rows).calibration_null
    shares = [math.comb(4, k) * 0.75**k * 0.25 ** (4 - k) for k in range(5)]
    mean = sum(share * abs(k / 4 - 0.75) for k, share in enumerate(shares))
    assert null.mean == pytest.approx(mean, abs=0.01) and mean == pytest.approx(0.158, abs=0.001)
    assert (null.low, null.high) == (0.0, 0.5)  # k = 3; k = 1 or 0 with a probability of .05
    assert compare_with_baselines(np.ones(4), np.ones(4), rows).calibration_null == (0, 0, 0)  # ties


def test_the_calibration_error_of_perfect_scores_is_that_of_samples_of_them():
    rng = np.random.default_rng(0)
    rows = [row("a", "b", str(i)) for i in range(200)]
    size = np.abs(rng.normal(scale=1.5, size=200))
    found = [
        compare_with_baselines(
            np.where(rng.random(200) < 1 / (1 + np.exp(-size)), size, -size), np.zeros(200), rows
        )
        for _ in range(40)
    ]
    null = found[0].calibration_null
    errors = [stats.calibration_error for stats in found]
    assert all(stats.calibration_null == null for stats in found)
    assert 0.04 < null.mean < 0.07 and np.mean(errors) == pytest.approx(null.mean, abs=0.008)
    assert sum(null.low <= error <= null.high for error in errors) >= 35
    wrong = compare_with_baselines(np.where(np.arange(200) % 2, size, -size), np.zeros(200), rows)
    assert wrong.calibration_error > wrong.calibration_null.high == null.high
    told = next(line for line in wrong.lines() if "calibration error" in line)
    assert f"calibrated scores of as many pairs would have {null.mean:.3f} [{null.low:.3f}, " in told


def test_length_correlations_by_hand():
    """Lengths 1 2 4 8 with scores 1 2 3 4: in the same order, but not on a line."""
    rows = [row("a", "bb", "1"), row("aaaa", "bbbbbbbb", "2")]
    found = compare_with_baselines(np.array([1.0, 3.0]), np.array([2.0, 4.0]), rows)
    assert found.length_spearman == pytest.approx(1.0)
    # sums of products about the means 3.75 and 2.5: 11.5 / sqrt(28.75 * 5)
    assert found.length_pearson == pytest.approx(11.5 / math.sqrt(28.75 * 5))
    # With lengths 1 1 4 8 the first two share rank 1/2: 4.5 / sqrt(4.5 * 5)
    tied = compare_with_baselines(np.array([1.0, 3.0]), np.array([2.0, 4.0]), [row("a", "b", "1"), rows[1]])
    assert tied.length_spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert compare_with_baselines(
        np.array([4.0, 2.0]), np.array([3.0, 1.0]), rows
    ).length_spearman == pytest.approx(-1.0)


def test_histogram_counts_every_pair():
    margins = np.array([-1.0, -0.95, 0.1, 0.9, 1.0])
    found = compare_with_baselines(margins, np.zeros(5), [row("a", "b", str(i)) for i in range(5)])
    assert found.edges == pytest.approx(np.linspace(-1, 1, 11), abs=1e-2)
    assert found.counts == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    many = np.linspace(-1, 1, 400)
    many[0] = -1e6  # one outlier must not put all other pairs into one bar
    found = compare_with_baselines(many, np.zeros(400), [row("a", "b", str(i)) for i in range(400)])
    assert found.edges[0] > -1.1 and sum(found.counts) == 400 and max(found.counts) < 60


# intervals


def test_pairs_of_one_prompt_are_drawn_together():
    """Of two prompts one has 99 right pairs and the other one wrong pair; a draw may hold one prompt only."""
    rows = [row("a", "b", "many")] * 99 + [row("a", "b", "one")]
    margins = np.array([1.0] * 99 + [-1.0])
    found = compare_with_baselines(margins, np.zeros(100), rows)
    assert (
        found.accuracy.mean == pytest.approx(0.99)
        and found.accuracy.low < 1e-9
        and found.accuracy.high > 0.99
    )
    apart = compare_with_baselines(margins, np.zeros(100), [row("a", "b", str(i)) for i in range(100)])
    assert apart.accuracy.mean == pytest.approx(0.99) and apart.accuracy.low > 0.94


def test_intervals_depend_on_the_seed_alone():
    rng = np.random.default_rng(1)
    scores, rows = rng.normal(size=(2, 50)), [row("a", "b", str(i)) for i in range(50)]
    assert compare_with_baselines(*scores, rows, seed=1) == compare_with_baselines(*scores, rows, seed=1)
    assert len({compare_with_baselines(*scores, rows, seed=seed).over_longer for seed in range(8)}) > 1


def test_a_model_that_is_always_right_is_not_certain():
    found = compare_with_baselines(np.ones(40), np.zeros(40), [row("a", "b", str(i)) for i in range(40)])
    assert found.accuracy.mean == found.accuracy.high == 1.0 and found.accuracy.low == pytest.approx(
        1 - 0.0876, abs=1e-4
    )


def test_exchanging_the_sides_inverts_the_stats():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2, 80))
    rows = [row("a" * int(n), "b" * int(m), str(i)) for i, (n, m) in enumerate(rng.integers(1, 9, (80, 2)))]
    found = compare_with_baselines(scores[0], scores[1], rows)
    other = compare_with_baselines(
        scores[1], scores[0], [row(r.rejected, r.chosen, r.prompt[0].content) for r in rows]
    )
    assert found.accuracy.mean == pytest.approx(1 - other.accuracy.mean)
    assert found.longer.mean == pytest.approx(1 - other.longer.mean)
    assert found.counts == other.counts[::-1]
    assert found.length_pearson == pytest.approx(other.length_pearson)
    shifted = compare_with_baselines(scores[0] + 5, scores[1] + 5, rows)  # only differences count
    assert (shifted.loss, *shifted.accuracy) == pytest.approx((found.loss, *found.accuracy))


# bag of words


def test_one_pair_of_words_by_hand():
    """40 pairs "x" over "y" have weights w and -w and held-out margins of 2 w ln(1 + count).

    At the minimum 40 ln2 sigma(-2 ln2 w) = L2 w.
    """
    train = [row("x", "y", str(i)) for i in range(40)]
    margins = bag_of_words(
        train, [row("x", "y"), row("y", "X"), row("x x x", "y y y"), row("z", "q"), row("x z", "x")]
    )
    w = margins[0] / (2 * math.log(2))
    assert 40 * math.log(2) / (1 + math.exp(margins[0])) == pytest.approx(preference.L2 * w, abs=1e-3)
    assert margins[1] == -margins[0] < 0  # case does not matter
    assert margins[2] == pytest.approx(2 * w * math.log(4))
    assert margins[3] == margins[4] == 0.0  # unknown words


def test_weights_are_at_the_minimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 30)) * 5 * (rng.random((200, 30)) < 0.3)
    at, column = np.nonzero(x)
    weights = preference._logistic(at, column, x[at, column], 200, 30)
    slope = preference.L2 * weights - x.T @ (1 / (1 + np.exp(x @ weights)))
    assert np.abs(slope).max() < 1e-4
    assert np.abs(weights).max() > 0.05


WORDS = [
    "red",
    "green",
    "blue",
    "big",
    "small",
    "old",
    "new",
    "fast",
    "slow",
    "warm",
    "cold",
    "sweet",
    "sour",
    "round",
    "flat",
]


def noise(count: int, seed: int, planted: str = "") -> list[Preference]:
    rng = random.Random(seed)
    texts = [[rng.choices(WORDS, k=rng.randint(3, 9)) for _ in range(2)] for _ in range(count)]
    for chosen, _ in texts:
        chosen[len(chosen) // 2 : len(chosen) // 2] = planted.split()
    return [row(" ".join(chosen), " ".join(rejected), str(i)) for i, (chosen, rejected) in enumerate(texts)]


def test_a_planted_word_is_learned_and_noise_is_not():
    zeros = np.zeros(600)
    planted = compare_with_baselines(zeros, zeros, noise(600, 1, "please"), noise(600, 0, "please"))
    assert planted.bag_of_words.mean > 0.97
    assert planted.over_bag_of_words.high < -0.4  # a model that has learned nothing
    plain = compare_with_baselines(zeros, zeros, noise(600, 3), noise(600, 2))
    assert plain.bag_of_words.low < 0.5 < plain.bag_of_words.high
    assert 0.44 < plain.bag_of_words.mean < 0.56
    # punctuation counts as a word
    assert (
        compare_with_baselines(zeros, zeros, noise(600, 1, "!"), noise(600, 0, "!")).bag_of_words.mean > 0.97
    )


def test_order_and_prompt_do_not_matter():
    train = [row("yes we can", "can we yes", f"prompt {i}") for i in range(50)] + noise(50, 0)
    assert bag_of_words(train, train[:50]).tolist() == [0.0] * 50
    found = compare_with_baselines(np.ones(50), np.zeros(50), train[:50], train)
    assert found.bag_of_words == Interval(0.5, 0.5, 0.5)
    assert found.over_bag_of_words == Interval(0.5, 0.5, 0.5)


def test_a_word_of_one_training_answer_is_not_known(monkeypatch):
    train = [row("good good good", "bad"), row("fine", "poor"), row("fine", "poor")]
    margins = bag_of_words(train, [row("good", "bad"), row("fine", "poor")])
    assert margins[0] == 0.0 and margins[1] > 0
    assert bag_of_words(train[:1], train).tolist() == [0.0] * 3  # no word is known
    # of fine and poor, both in two answers, the alphabetically first is kept
    monkeypatch.setattr(preference, "WORDS", 1)
    only, both = bag_of_words(train, [row("fine", ""), row("fine", "poor")])
    assert only == both > 0


def embedded(split: str) -> list[Preference]:
    return formats.parse_rows(tasks.preferences(split))[0]


def test_baselines_on_the_embedded_pairs_in_little_time():
    held_out, train = embedded("valid"), embedded("train")
    zeros = np.zeros(len(held_out))
    begun = time.process_time()
    found = compare_with_baselines(zeros, zeros, held_out, train)
    assert time.process_time() - begun < 5
    assert 0.53 < found.longer.mean < 0.61  # 57.0 %
    assert 0.70 < found.bag_of_words.mean < 0.78  # 74.3 %
    assert set(found.by_column) == {"flaw", "family"}
    assert set(found.by_column["flaw"]) == {"wrong", "beside the point", "rude", "cut off", "repetitive"}


def test_baselines_on_human_preferences(shared):
    path = shared / "data" / "preference" / "hh-helpful-base.jsonl"
    rows = formats.parse_rows([json.loads(line) for line in path.read_text().splitlines()])[0]
    found = compare_with_baselines(np.zeros(200), np.zeros(200), rows[-200:], rows[:-200])
    assert 0.52 < found.bag_of_words.mean < 0.69  # 60.5 % of 200, from 990 pairs
    assert 0.55 < found.longer.mean < 0.71  # 63.0 %


# output


def test_stats_as_json_and_text():
    train = noise(40, 0, "please")
    found = compare_with_baselines(CHOSEN, REJECTED, FOUR, train)
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (
        again["accuracy"] == list(found.accuracy)
        and again["counts"] == found.counts
        and len(again["edges"]) == 11
    )
    lines = found.lines()
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    assert "right 62.5%" in lines[0] and "loss 0.6053 (chance: 0.6931)" in lines[0]
    assert "37.5%" in lines[1] and "+25.0%" in lines[1]
    assert lines[2].startswith("  bag of words: 50.0%")
    assert "right by flaw: rude 100%, wrong 50%" in "\n".join(lines)
    bars = [line for line in lines if " to " in line]
    assert [int(line.split()[-1]) for line in bars] == found.counts
    assert [line.count("█") for line in bars] == [30 * n // max(found.counts) for n in found.counts]
    assert not any("bag of words" in line for line in compare_with_baselines(CHOSEN, REJECTED, FOUR).lines())


@pytest.mark.parametrize(
    "chosen, rejected, rows, message",
    [
        ([], [], [], "of 0 pairs"),
        ([1.0], [0.0, 0.0], FOUR[:1], "a score for each side"),
        ([1.0, 2.0], [0.0, 0.0], FOUR[:1], "a score for each side"),
        ([math.nan], [0.0], FOUR[:1], "not finite"),
        ([1.0], [math.inf], FOUR[:1], "not finite"),
    ],
)
def test_scores_that_cannot_be_evaluated(chosen, rejected, rows, message):
    with pytest.raises(ValueError, match=message):
        compare_with_baselines(np.array(chosen), np.array(rejected), rows)
