"""The comparison of models: metrics against their definitions, paired differences, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import cli, engines
from mlx_posttrain.engines.base import initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import comparison, likelihood, right_answers, suite
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.evaluation.metric_table import METRICS, PER_TOKEN
from mlx_posttrain.evaluation.metrics import distinct_n, perplexity, proportion
from mlx_posttrain.evaluation.preference import length_controlled_wins
from mlx_posttrain.evaluation.reward_scoring import add_reward_metrics
from mlx_posttrain.evaluation.suite import SuiteSection
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import pad_id

ENGINES = engines.available()
TEXTS = [
    "The cat sat on the mat and looked at the moon for a long time before it went home.",
    "A small dog ran over the hill to find its ball, and then it ran home again with a stick.",
    "Once upon a time there was a king who liked apples more than gold, and so did his cook.",
]


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


@pytest.fixture(scope="module")
def other_gpt2(random_gpt2, tmp_path_factory) -> Path:
    """The random GPT-2 with slightly changed weights: same tokenizer, another model."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "gpt2"
    shutil.copytree(random_gpt2, folder)
    rng = np.random.default_rng(3)
    weights = {
        k: v + 0.05 * rng.standard_normal(v.shape).astype(v.dtype)
        for k, v in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": f"Say {w}.", "answer": w}) + "\n"
            for w in ("cat", "dog", "moon", "hill", "king", "gold")
        )
    )
    return path


def small(rows: Path, **more) -> SuiteSection:
    return SuiteSection(
        rows=str(rows), max_tokens=8, template="none", opening_words=3, continuation=12, **more
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_have_their_definitions_and_a_model_equals_itself(
    engine, random_gpt2, other_gpt2, texts_file, questions_file, monkeypatch
):
    settings = small(questions_file, texts=str(texts_file), last_words=str(texts_file), samples=2)
    found = suite.compare(
        [str(random_gpt2), str(other_gpt2), str(random_gpt2)], settings, engine, ["a", "b", "c"]
    )
    a, b, again = found.models
    assert len(a.answers) == 6 and set(found.metrics()) == set(METRICS) - {
        "accuracy_phrasing",
        "pass_at_4",  # of two answers
        "pass_at_16",
        "score",
        "wins",
    }
    model, tokenizer, _ = open_model(random_gpt2, engine)
    loss = likelihood.base_text_loss(model, tokenizer, TEXTS)
    assert a.interval("perplexity").mean == pytest.approx(perplexity(*loss), rel=1e-9)
    for name in found.metrics():
        if name == "kl":  # of the base itself: zero except for rounding
            assert abs(again.interval("kl").mean) < 1e-6 < b.interval("kl").mean and "kl" not in a.values
            continue
        assert found.difference(name, again) == (0, 0, 0), name
    difference = found.difference("perplexity", b)
    assert difference.mean == pytest.approx(
        np.log(b.interval("perplexity").mean) - np.log(a.interval("perplexity").mean), abs=1e-9
    )
    pooled = distinct_n(a.continuations, 2)
    assert (
        a.interval("distinct_2").mean == pytest.approx(pooled)
        and len({len(tokens) for tokens in a.continuations}) == 1
    )
    text = found.table()
    # long labels are wrapped
    assert all(word in text for name in found.metrics() for word in METRICS[name].label.split())
    assert "Too few rows to tell a difference from chance" in text and "beyond chance" not in text
    monkeypatch.setattr(comparison, "MIN_ROWS", 2)
    text = found.table()
    assert "differs from a beyond chance: p < .05" in text and "Holm" in text
    assert max(map(len, text.splitlines())) <= 120
    numbers = json.loads(json.dumps(found.to_dict()))
    assert (
        numbers["baseline"] == "a"
        and numbers["models"][1]["minus_baseline"]["perplexity"]["low"] <= difference.mean
    )


def test_only_so_many_last_words_are_read(random_gpt2, texts_file, questions_file):
    settings = {"last_words": str(texts_file), "texts": None, "samples": 0}
    for limit, count in ((2, 2), (None, len(TEXTS))):
        given = small(questions_file, last_word_limit=limit, **settings)
        (found,) = suite.compare([str(random_gpt2)], given, ENGINES[0]).models
        assert len(found.values["last_word"].rows) == count
    assert SuiteSection().last_word_limit == 1000


@pytest.mark.parametrize("engine", ENGINES)
def test_kl_and_last_words_equal_their_definitions(engine, random_gpt2, other_gpt2):
    (p, tokenizer, _), (q, _, _) = (open_model(f, engine) for f in (random_gpt2, other_gpt2))
    kl = likelihood.base_text_kl(p, q, tokenizer, TEXTS[:2])
    eos = tokenizer.eos_token_id
    for i, text in enumerate(TEXTS[:2]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        a, b = (_log_softmax(m.full_logits(np.array([[eos, *ids[:-1]]]))[0]) for m in (p, q))
        assert kl.tokens[i] == len(ids)
        assert kl.nll[i] == pytest.approx((np.exp(a) * (a - b)).sum(), rel=1e-3, abs=1e-5)
    right, nll = likelihood.last_words(p, tokenizer, TEXTS)
    for i, text in enumerate(TEXTS):
        before, _, word = text.rpartition(" ")
        start, last = tokenizer(before)["input_ids"], tokenizer(" " + word)["input_ids"]
        log_p = _log_softmax(p.full_logits(np.array([[*start, *last[:-1]]]))[0])[len(start) - 1 :]
        assert nll[i] == pytest.approx(-sum(log_p[k, t] for k, t in enumerate(last)), rel=1e-4)
        assert right[i] == float(all(log_p[k].argmax() == t for k, t in enumerate(last)))
    # of a text longer than the context the end is read
    long = "The moon and the hill and " * 40 + TEXTS[0]
    ids = tokenizer(long)["input_ids"]
    last = tokenizer(" " + TEXTS[0].rpartition(" ")[2])["input_ids"]
    log_p = _log_softmax(p.full_logits(np.array([ids[-p.context - 1 : -1]]))[0])
    found = likelihood.last_words(p, tokenizer, [long, TEXTS[1]])[1]
    assert len(ids) > p.context and found[0] == pytest.approx(
        -sum(log_p[k - len(last), t] for k, t in enumerate(last)), rel=1e-4
    )
    assert found[1] == pytest.approx(nll[1], rel=1e-4)
    with pytest.raises(UserError, match="no word before"):
        likelihood.last_words(p, tokenizer, ["alone"])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_length_controlled_wins_take_the_length_out():
    rng = np.random.default_rng(0)
    n = 4000
    others = rng.integers(5, 60, n).astype(float)
    # a reward model of length alone: half of all wins at equal length, however often longer answers win
    for more in (4, 12):
        lengths = others + rng.normal(more, 15, n)
        scores = 0.1 * (lengths - others) + rng.logistic(size=n)
        assert (scores > 0).mean() > 0.54
        assert length_controlled_wins(scores, np.zeros(n), lengths, others).mean() == pytest.approx(
            0.5, abs=0.04
        )
    # always longer, or hardly ever as short: length and quality cannot be separated
    assert np.isnan(length_controlled_wins(scores, np.zeros(n), others + 20, others)).all()
    assert np.isnan(length_controlled_wins(scores, np.zeros(n), others + rng.normal(20, 15, n), others)).all()
    # at equal lengths: the share of wins, where a tie is half a win and rows without a score are left out
    plain = length_controlled_wins(
        np.array([1.0, 2, 0, np.nan]), np.array([0.0, 0, 0, 0]), np.ones(4), np.ones(4)
    )
    assert np.isnan(plain[3]) and np.nanmean(plain) == pytest.approx(2.5 / 3, abs=1e-6)
    # winning every row does not break the fit, and nine rows leave an interval
    won = proportion(length_controlled_wins(np.ones(9), np.zeros(9), np.arange(9.0) - 4, np.zeros(9)))
    assert won.mean == 1.0 and won.low == pytest.approx(0.70, abs=0.01)


def test_an_empty_answer_loses_whatever_its_length():
    rng = np.random.default_rng(4)
    n = 2000
    lengths, others = rng.integers(5, 40, (2, n)).astype(float)
    scores, theirs = rng.normal(size=(2, n))
    even = length_controlled_wins(scores, theirs, lengths, others).mean()
    empty = rng.random(n) < 0.3
    scores[empty], lengths[empty] = -np.inf, 0.0
    with_empty = length_controlled_wins(scores, theirs, lengths, others)
    assert (with_empty[empty] == 0).all() and with_empty.mean() == pytest.approx(0.7 * even, abs=0.03)
    assert length_controlled_wins(theirs, scores, others, lengths).mean() == pytest.approx(
        1 - with_empty.mean(), abs=1e-6
    )
    both = length_controlled_wins(
        np.full(3, -np.inf), np.array([-np.inf, 1.0, np.nan]), np.zeros(3), np.ones(3)
    )
    assert both[:2].tolist() == [0.5, 0.0] and np.isnan(both[2])


@pytest.mark.parametrize("gap, a, b", [(0.0, 0.0, 0.5), (0.5, 1.5, 0.5), (0.9, 0.0, 1.0)])
def test_the_interval_of_wins_covers_the_rate_at_equal_length(gap, a, b):
    """Wins follow the logistic model, and answers are ``gap`` standard deviations longer on average.

    Intervals that take b as known would cover 91, 86 and 75 %.
    """
    rng = np.random.default_rng(6)
    rate, hits = 1 / (1 + np.exp(-a)), []
    while len(hits) < 300:
        longer = rng.normal(gap, 1, 80)
        won = (rng.random(80) < 1 / (1 + np.exp(-a - b * longer))).astype(float)
        values = length_controlled_wins(won, np.full(80, 0.5), longer, np.zeros(80))
        if np.isfinite(values).all():
            _, low, high = proportion(values, samples=300, seed=len(hits))
            hits.append(low <= rate <= high)
    assert 0.92 <= np.mean(hits) <= 0.98  # nominal .95; 300 trials have a standard error of .013


@pytest.mark.slow
@pytest.mark.parametrize(
    "effect, rate",
    [
        (lambda longer: 0.0 * longer, 0.5),
        (lambda longer: longer, 0.5),
        (lambda longer: longer, 0.73),
        (lambda longer: 2 * np.tanh(longer), 0.5),  # fitted as linear: .52, and 89 % covered
        (lambda longer: 2 * np.tanh(longer), 0.73),
        (lambda longer: 2 * np.tanh(3 * longer), 0.5),  # .54, 81 %
    ],
)
def test_wins_at_equal_length_whatever_the_effect_of_length(effect, rate):
    """Some answers are far longer than others, and more of them longer than shorter."""
    rng = np.random.default_rng(9)
    means, hits = [], []
    while len(hits) < 600:
        longer = rng.standard_t(3, 250) + 0.6
        chance = 1 / (1 + (1 / rate - 1) * np.exp(-effect(longer)))
        won = (rng.random(250) < chance).astype(float)
        values = length_controlled_wins(won, np.full(250, 0.5), longer, np.zeros(250))
        if np.isfinite(values).all():
            mean, low, high = proportion(values, samples=300, seed=len(hits))
            means.append(mean)
            hits.append(low <= rate <= high)
    assert np.mean(means) == pytest.approx(rate, abs=0.01)  # 600 trials have a standard error of .002
    assert 0.92 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_a_reward_model_scores_answers(engine, random_gpt2, other_gpt2, questions_file, tmp_path):
    reward_model, tokenizer, _ = open_model(random_gpt2, engine)
    reward_model.add_head(initial_head(64, 0))
    reward_model.save_classifier(tmp_path / "reward", pad_id(reward_model.config, tokenizer))
    found = suite.compare(
        [str(random_gpt2), str(other_gpt2)],
        small(questions_file, texts=None, reward=str(tmp_path / "reward")),
        engine,
        ["a", "b"],
    )
    assert ["score" in m.values for m in found.models] == [
        any(a for m in found.models for a in m.answers)
    ] * 2
    assert "wins" not in found.models[0].values and len(found.models[1].values["wins"].rows) == 6


def test_empty_answers_get_the_lowest_score_and_lose(capsys):
    a, b = ModelResult("a", "a"), ModelResult("b", "b")
    add_reward_metrics(
        [a, b],
        [
            (np.array([1.0, 3.0, -np.inf]), np.array([4.0, 4, 0])),
            (np.array([2.0, -np.inf, -np.inf]), np.array([4.0, 0, 0])),
        ],
    )
    assert a.values["score"].rows.tolist() == [1, 3, 1] and b.values["score"].rows.tolist() == [2, 1, 1]
    assert b.values["wins"].rows.tolist() == [1.0, 0.0, 0.5] and "wins" not in a.values
    assert "a: 1 of 3 answers are empty" in (printed := capsys.readouterr().err) and "b: 2 of 3" in printed


def test_a_win_rate_that_lengths_prevent_is_reported_as_missing(capsys):
    a, b = ModelResult("a", "a"), ModelResult("b", "b")
    scores = np.arange(6.0)
    add_reward_metrics(
        [a, b],
        [(scores, np.array([40.0, 39, 40, 40, 38, 40])), (scores[::-1], np.array([4.0, 5, 4, 4, 4, 6]))],
    )
    assert (
        "b: no win rate against a: lengths differ too much for a comparison at equal length (-35.0 tokens)"
        in capsys.readouterr().err
    )


def test_labels_templates_and_questions(tmp_path):
    embedded = suite.read_questions(SuiteSection(limit=6))
    assert [q.extra["held_out"] for q in embedded] == ["content"] * 6 + ["phrasing"] * 6
    assert (
        right_answers.check_answers(embedded, [q.turns[-1].content for q in embedded]).tolist() == [1.0] * 12
    )
    later = suite.read_questions(SuiteSection(limit=4, skip=2))
    assert [q.turns for q in later[:4]] == [q.turns for q in embedded[2:6]]
    assert [q.turns for q in later[4:]] == [q.turns for q in embedded[8:]]
    assert suite.model_labels(["runs/a/sft", "runs/b/sft", "tiny"]) == ["runs/a/sft", "runs/b/sft", "tiny"]
    assert suite.model_labels(["runs/a/sft", "x/lora"]) == ["sft", "lora"]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "2 + 3?", "answer": "2 + 3 = 5 #### 5"}) + "\n")
    (question,) = suite.read_questions(SuiteSection(rows=str(path)))
    assert (
        right_answers.check_answers([question], ["It is 5."])[0] == 1
        and right_answers.check_answers([question], ["6"])[0] == 0
    )
    with pytest.raises(UserError, match="skip=1 leaves no question"):
        suite.read_questions(SuiteSection(rows=str(path), skip=1))
    path.write_text(json.dumps({"text": "plain"}) + "\n")
    with pytest.raises(UserError, match="plain text; read them"):
        suite.read_questions(SuiteSection(rows=str(path)))
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match="have two"):
        suite.read_questions(SuiteSection(rows=str(path)))
    path.write_text(json.dumps({"ask": "2 + 3?", "reply": "5"}) + "\n")
    with pytest.raises(UserError, match=r"rename with columns='\{question: ask, answer: reply\}'"):
        suite.read_questions(SuiteSection(rows=str(path)))


def test_a_reward_model_is_refused_before_anything_is_measured(random_gpt2, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(random_gpt2, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    config["architectures"] = ["GPT2ForSequenceClassification"]
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(suite, "open_model", None)
    with pytest.raises(UserError, match=r"rm is a reward model: .* reward="):
        suite.compare([str(random_gpt2), str(tmp_path / "rm")], SuiteSection(texts=None))


def test_few_rows_show_no_difference():
    """A single row makes an interval a point, which would always exclude 0."""
    for rows, significant in ((1, False), (comparison.MIN_ROWS - 1, False), (comparison.MIN_ROWS, True)):
        a, b = (
            ModelResult(n, n, {"accuracy": Values(np.full(rows, v))}) for n, v in (("a", 0.0), ("b", 1.0))
        )
        made = Comparison({}, "question", [a, b], [])
        assert made.is_significant("accuracy", b) is significant
        text = " ".join(made.table().split())
        few = f"Too few rows to tell a difference from chance: {rows} at most, and 20 are needed"
        assert (few in text) is ("* differs from" not in text) is not significant
        assert made.to_dict()["models"][1]["too_few_rows"] == ([] if significant else ["accuracy"])


def test_of_many_equal_models_hardly_any_is_marked():
    """Of 100 tables of nine models that differ by chance, 5 should mark one; uncorrected it is 30."""
    rng = np.random.default_rng(5)
    marked, alone = 0, 0
    for seed in range(60):
        models = [
            ModelResult(str(i), str(i), {"response_loss": Values(rng.normal(size=40))}) for i in range(9)
        ]
        made = Comparison({"seed": seed}, "question", models, [])
        marked += any(made.is_significant("response_loss", m) for m in models)
        alone += any(
            d.low > 0 or d.high < 0 for m in models[1:] if (d := made.difference("response_loss", m))
        )
    assert marked <= 7 and alone >= 12


def test_wins_are_compared_with_a_half():
    rng = np.random.default_rng(0)
    base = ModelResult("base", "base", {"score": Values(np.zeros(80))})
    for won, significant in ((0.5, False), (0.8, True)):
        wins = (np.arange(80) < 80 * won).astype(float)
        model = ModelResult("b", "b", {"wins": Values(rng.permutation(wins))})
        made = Comparison({}, "question", [base, model], [])
        assert (
            made.difference("wins", model).mean == pytest.approx(won - 0.5)
            and made.is_significant("wins", model) is significant
        )
        assert made.difference_label("wins", model).startswith("+30.0% [" if significant else "+0.0% [")


def test_shares_have_wilsons_bounds_and_intervals_follow_the_seed():
    none = ModelResult("a", "a", {"accuracy": Values(np.zeros(40)), "seq_rep_4": Values(np.zeros(40))})
    made = Comparison({}, "question", [none], [])
    assert (
        made.cell("accuracy", none) == "0.0% [0.0%, 8.8%]"
        and made.cell("seq_rep_4", none) == "0.000 [0.000, 0.000]"
    )
    rows = np.random.default_rng(0).normal(size=(2, 30))
    drawn = set()
    for seed in (0, 0, 1):
        a, b = (
            ModelResult(n, n, {"response_loss": Values(r)}, seed=seed)
            for n, r in zip("ab", rows, strict=True)
        )
        drawn.add(
            (
                a.interval("response_loss"),
                Comparison({"seed": seed}, "question", [a, b], []).difference("response_loss", b),
            )
        )
    assert len(drawn) == 2


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_models_are_compared_with_their_baselines(
    engine, random_gpt2, other_gpt2, texts_file, questions_file
):
    settings = small(questions_file, texts=str(texts_file), samples=0, seed=3)
    found = suite.compare(
        [str(random_gpt2), str(other_gpt2), str(other_gpt2)], settings, engine, ["a", "b", "b2"], [0, 1, 1]
    )
    a, b, again = found.models
    assert found.baseline(again) is b and found.baseline(b) is b and {m.seed for m in found.models} == {3}
    assert "kl" not in a.values and "kl" not in b.values and abs(again.interval("kl").mean) < 1e-6
    assert found.difference("perplexity", b) is None and found.difference("perplexity", again) == (0, 0, 0)
    assert [m["baseline"] for m in found.to_dict()["models"]] == ["a", "b", "b"]
    assert found.baseline_label == "the model that each started from"


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_lines_are_read_as_one_text_with_an_interval_over_its_windows(
    engine, random_gpt2, tmp_path, questions_file
):
    lines = [" = Title = \n", "", TEXTS[0] + " \n", "", TEXTS[1] + " \n", TEXTS[2]]
    path = tmp_path / "wiki.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = small(questions_file, texts=str(path), join=True, text_limit=None, window=16, samples=0)
    found = suite.compare([str(random_gpt2), str(random_gpt2)], settings, engine, ["a", "b"])
    model, tokenizer, _ = open_model(random_gpt2, engine)
    joined = likelihood.base_text_loss(model, tokenizer, ["\n\n".join(lines)], window=16)
    a, b = found.models
    assert a.interval("perplexity").mean == pytest.approx(perplexity(*joined), rel=1e-9)
    assert len(a.values["perplexity"].rows) == len(b.values["kl"].rows) == -(-joined.tokens[0] // 16) > 3
    assert a.interval("perplexity").low < a.interval("perplexity").mean < a.interval("perplexity").high
    assert len(a.continuations) == 3  # of the lines that are long enough, not of the joined text


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_another_tokenizer_has_no_metrics_per_token(engine, random_gpt2, questions_file, texts_file, capsys):
    found = suite.compare([str(random_gpt2), "tiny"], small(questions_file, texts=str(texts_file)), engine)
    assert not set(PER_TOKEN) & set(found.models[1].values) and "another tokenizer" in capsys.readouterr().err
    assert found.models[1].values["ended"] is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compare", "tiny", "limt=3"], "did you mean 'limit'"),
        (["compare", "tiny", "limit=0"], "limit"),
        (["eval", "no/such/run"], "no/such/run"),
        (["eval", "tiny", "rows=none.jsonl"], "none.jsonl"),
        (["compare", "limit=3"], "name at least one"),
        (["analyze", "limit=3"], "writes text"),
        (["eval", "tiny", "limt"], "is no setting"),
        (["compare", "tiny", "--report", "{here}/x.html"], "cannot be written"),
        (["report", "tiny", "--logs-only"], "not a run"),
        (["report", "tiny", "--logs-only", "--output", "recipe.yaml"], "give one that ends in .html"),
        (["compare", "tiny", "--report", "{here}"], "give one that ends in .html"),
    ],
)
def test_mistakes_give_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("{here}", __file__) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    captured = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and message in captured[-1] and captured[-1].startswith("mlx-posttrain: ")
