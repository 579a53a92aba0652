"""Coherence: loss of continuations by its definition, human text as the anchor, and loops below it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlx_posttrain import cli, engines
from mlx_posttrain.data.types import Example
from mlx_posttrain.errors import UserError
from mlx_posttrain.evaluation import completions, continuations, likelihood, suite
from mlx_posttrain.evaluation.comparison import Comparison, ModelResult, Values
from mlx_posttrain.losses.sft import token_logprobs
from mlx_posttrain.models.open import open_model

ENGINES = engines.available()


def test_loss_of_continuations_equals_its_definition(model, tokenizer):
    """Two texts after their openings, the second cut after 3 tokens; EOS comes first and is not scored."""
    openings, rests = ["The cat sat", "Rain fell on"], [" on the mat, and the dog", " the roof all night"]
    found = continuations.continuation_loss(model, tokenizer, openings, rests, [99, 3])
    for i, (opening, rest) in enumerate(zip(openings, rests, strict=True)):
        before, after = tokenizer(opening)["input_ids"], tokenizer(rest)["input_ids"]
        assert [*before, *after] == tokenizer(opening + rest)["input_ids"]
        after = after[:3] if i else after
        whole = np.array([tokenizer.eos_token_id, *before, *after])
        log_p = token_logprobs(model.full_logits(whole[None, :-1])[0].astype(np.float64), whole[1:])
        assert found.tokens[i] == len(after)
        assert found.nll[i] == pytest.approx(-log_p[len(before) :].sum(), rel=1e-4)


def test_a_word_that_goes_on_is_scored_whole(model, tokenizer, monkeypatch):
    """Tokens of "the" and "re" together are others than those of each alone."""
    seen: list[Example] = []
    monkeypatch.setattr(likelihood, "response_loss", lambda model, examples: seen.extend(examples))
    continuations.continuation_loss(model, tokenizer, ["cat and t"], ["he dog"], [99])
    (example,) = seen
    scored = tokenizer.decode([t for t, own in zip(example.tokens, example.trained, strict=True) if own])
    assert list(example.tokens[1:]) == tokenizer("cat and the dog")["input_ids"] and scored == " the dog"


def test_of_a_long_opening_the_end_is_read(model, tokenizer):
    opening, rest = "The cat sat on the mat. " * 30, "The dog lay by the door"
    found = continuations.continuation_loss(model, tokenizer, [opening], [rest], [99])
    ids = np.array(tokenizer(opening + rest)["input_ids"])[-model.context - 1 :]
    log_p = token_logprobs(model.full_logits(ids[None, :-1])[0].astype(np.float64), ids[1:])
    assert found.nll[0] == pytest.approx(-log_p[-found.tokens[0] :].sum(), rel=1e-4)
    assert found.tokens[0] > 3


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_loops_lie_below_human_text_and_mixed_words_above(engine):
    """The embedded model reads the embedded texts, the texts' words mixed, and its own continuations."""
    split = completions.split_texts(likelihood.embedded_texts(), 12)[:12]
    openings, human = [opening for opening, _ in split], [rest for _, rest in split]
    anchor = continuations.read_human_text("tiny", engine, openings, human, 32)
    assert anchor.human.weights.tolist() == [32] * 12
    results = [ModelResult(name, name) for name in ("people", "mixed", "own")]
    model, tokenizer, _ = open_model("tiny", engine)
    own = continuations.measure_continuations(
        results[2], model, tokenizer, openings, max_tokens=48, samples=0, temperature=1.0, top_p=1.0, seed=0
    )
    rng = np.random.default_rng(0)
    mixed = [" " + " ".join(rng.permutation(rest.split())) for rest in human]
    written = [{"coherence": human}, {"coherence": mixed}, own]
    continuations.measure_coherence(results, written, openings, anchor, engine)
    made = Comparison({}, "own", results, [], anchor)
    people, words, greedy = (m.interval("coherence").mean for m in results)
    assert people == pytest.approx(made.human_coherence().mean, rel=1e-6)
    assert results[2].interval("seq_rep_4").mean > 0.2
    assert 4 * greedy < people < 0.5 * words
    note = made.coherence_note()
    assert f"under tiny, which gives {people:.1f} [" in note and "Lower is not better" in note
    assert made.ceiling("coherence") == f"human text {people:.1f}" and made.ceiling("accuracy") == "100 %"
    assert made.to_dict()["coherence"]["judge"] == "tiny"
    assert " ".join(note.split()) in " ".join(made.table().split())


def test_a_text_has_one_value_for_all_its_samples():
    """Two samples of each of two openings: tokens count once, whichever sample they are in."""
    openings = ["The cat sat on", "A small dog ran"]
    texts = [" the mat.", " the mat and the floor.", " home.", " over the hill."]
    anchor = continuations.read_human_text("tiny", ENGINES[0], openings, [" the mat.", " home."], 8)
    result = ModelResult("a", "a")
    continuations.measure_coherence([result], [{"coherence_sampled": texts}], openings, anchor, ENGINES[0])
    model, tokenizer, _ = open_model("tiny", ENGINES[0])
    limits = [int(limit) for limit in anchor.human.weights for _ in range(2)]
    each = continuations.continuation_loss(
        model, tokenizer, [o for o in openings for _ in range(2)], texts, limits
    )
    rows, weights = result.values["coherence_sampled"]
    assert weights.tolist() == [sum(each.tokens[:2]), sum(each.tokens[2:])]
    assert rows * weights == pytest.approx([sum(each.nll[:2]), sum(each.nll[2:])])


def test_models_of_two_tokenizers_are_judged_alike(random_gpt2, tmp_path):
    rows, texts = tmp_path / "q.jsonl", tmp_path / "t.jsonl"
    rows.write_text(json.dumps({"question": "Say cat.", "answer": "cat"}) + "\n")
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in likelihood.embedded_texts()[:4]))
    settings = suite.SuiteSection(
        rows=str(rows), texts=str(texts), max_tokens=4, opening_words=3, continuation=12, samples=2
    )
    found = suite.compare(["tiny", str(random_gpt2)], settings, ENGINES[0], ["tiny", "random"])
    tiny, other = found.models
    assert found.coherence.judge == "tiny" and "seq_rep_4" not in other.values
    human = found.human_coherence().mean
    assert other.interval("coherence").mean > human > tiny.interval("coherence").mean
    assert other.interval("coherence_sampled").mean > tiny.interval("coherence_sampled").mean
    assert found.difference("coherence", other).mean == pytest.approx(
        math.log(other.interval("coherence").mean / tiny.interval("coherence").mean), abs=0.5
    )
    named = suite.compare(
        ["tiny"], settings.model_copy(update={"judge": str(random_gpt2), "samples": 0}), ENGINES[0]
    )
    assert named.coherence.judge == str(random_gpt2) and named.human_coherence() != found.human_coherence()
    assert "coherence_sampled" not in named.models[0].values


def test_the_default_judge_is_what_the_first_model_started_from(tmp_path, capsys):
    def run(name: str, model: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"method: sft\nmodel: {model}\n")
        return str(tmp_path / name)

    first = run("first", "tiny")
    assert continuations.default_judge(run("second", first)) == "tiny" == continuations.default_judge("tiny")
    lost = run("lost", str(tmp_path / "nowhere"))
    assert continuations.default_judge(lost) == lost and "lost itself is the judge" in capsys.readouterr().err


def test_a_judge_that_cannot_read_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(suite, "_measure_answers", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "tiny", "judge=no/such/model", "limit=2", "text_limit=2"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "no/such/model" in last


def test_without_texts_there_is_no_coherence(tmp_path):
    rows = tmp_path / "q.jsonl"
    rows.write_text(json.dumps({"question": "Say cat.", "answer": "cat"}) + "\n")
    settings = suite.SuiteSection(rows=str(rows), texts=None, max_tokens=4, samples=0)
    found = suite.compare(["tiny"], settings, ENGINES[0])
    assert found.coherence is None and found.coherence_note() == "" and found.to_dict()["coherence"] is None


def test_values_per_text_weigh_by_tokens():
    human = Values(np.array([1.0, 3.0]), np.array([30, 10]))
    made = Comparison({}, "own", [], [], continuations.Coherence("judge", human))
    assert made.human_coherence().mean == pytest.approx(math.exp(1.5))
    with pytest.raises(UserError):
        continuations.read_human_text("no/such/model", "auto", [], [], 8)
