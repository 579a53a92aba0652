"""Scorers: weights and scales, what a reward model reads, and reward models that cannot score a policy's
answers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import config, engines
from mlx_posttrain.config import Section
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods.pretrain import PretrainSection, make_model
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.rewards import functions as functions_module
from mlx_posttrain.rewards import scorer as scoring
from mlx_posttrain.rewards.scorer import RewardEntry, Scorer
from mlx_posttrain.rl import rollouts
from mlx_posttrain.rl.rollouts import Completion, Prompt
from tests import helpers

ENGINES = engines.available()
FUNCTIONS = """
def length(prompts, completions):
    return [float(len(c)) for c in completions]
def wanted(prompts, completions, target):
    rows = zip(prompts, completions, target)
    return [None if t is None else float(t in c) + 10 * float(t in p) for p, c, t in rows]
"""

COUNTS = """
calls = []
def length(completions):
    calls.append(completions)
    return [float(len(calls))] * len(completions)
"""


@pytest.fixture(scope="module")
def reward_model(random_gpt2, tmp_path_factory) -> Path:
    return helpers.reward_model(random_gpt2, tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def functions(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return str(tmp_path / "mine.py")


def scorer(entries: list[dict], folder: Path) -> Scorer:
    found = [RewardEntry.model_validate(e) for e in entries]
    return Scorer(found, engines.get(ENGINES[0]), load_tokenizer(folder), "question")


def answers() -> list[Completion]:
    rng = np.random.default_rng(0)
    texts, targets = ["ab", "abcd", "x", ""], ["a", "z", None, "q"]
    return [
        Completion(
            Prompt(tuple(rng.integers(1, 380, 3 + i).tolist()), f"q{i}", {"target": t}),
            tuple(rng.integers(1, 380, 4).tolist()),
            True,
            c,
        )
        for i, (c, t) in enumerate(zip(texts, targets, strict=True))
    ]


def test_rewards_are_summed_with_their_weights(functions, random_gpt2):
    both = scorer(
        [
            {"function": f"{functions}:length", "weight": 2.0},
            {"function": f"{functions}:wanted", "weight": -0.5},
        ],
        random_gpt2,
    )
    asked = answers()
    lengths, wanted = both.parts(asked)
    assert (
        lengths.tolist() == [2, 4, 1, 0] and wanted[[0, 1, 3]].tolist() == [1, 0, 10] and np.isnan(wanted[2])
    )
    assert both(asked).tolist() == [2 * 2 - 0.5, 2 * 4, 2, -5]
    assert np.isnan(scorer([], random_gpt2)(asked)).all()


def test_each_rewards_own_scores_from_one_call(functions, reward_model, random_gpt2, tmp_path):
    (tmp_path / "counts.py").write_text(COUNTS)
    both = scorer(
        [
            {"function": f"{functions}:length", "weight": 2.0, "normalise": True},
            {"function": f"{functions}:wanted"},
            {"function": f"{tmp_path / 'counts.py'}:length"},
            {"model": str(reward_model)},
            {"model": str(reward_model)},
        ],
        random_gpt2,
    )
    assert both.names == ["length", "wanted", "length_2", "model", "model_2"]
    asked = answers()
    both.normalise_on(asked)
    scores = both.score(asked)
    assert list(scores.parts) == both.names
    assert scores.parts["length_2"].tolist() == [2.0] * 4  # the first call was the normalisation
    assert scores.parts["length"].tolist() == [2, 4, 1, 0]  # as they are, and not normalised
    assert scores.parts["wanted"][[0, 1, 3]].tolist() == [1, 0, 10] and np.isnan(scores.parts["wanted"][2])
    scaled = {n: (x - x.mean()) / x.std() for n, x in scores.parts.items() if n in ("length", "model")}
    total = 2 * scaled["length"] + [1, 0, 0, 10] + 2.0 + 2 * scaled["model"]
    assert scores.total == pytest.approx(total, abs=1e-5)
    assert both(asked) == pytest.approx(total + 1, abs=1e-5)  # called a third time
    none = both.score([])
    assert len(none.total) == 0 and list(none.parts) == both.names


def test_names_are_unique_whatever_they_are_called(functions, random_gpt2, tmp_path):
    (tmp_path / "odd.py").write_text("def length_2(c): pass\ndef length(c): pass\n")
    named = [f"{functions}:length", f"{tmp_path / 'odd.py'}:length_2", f"{tmp_path / 'odd.py'}:length"]
    assert scorer([{"function": one} for one in named], random_gpt2).names == [
        "length",
        "length_2",
        "length_3",
    ]
    assert RewardEntry(model="runs/07_reward").short_name == "07_reward"
    assert RewardEntry(model="runs/07_reward/final").short_name == "07_reward"
    assert RewardEntry(model="org/name").short_name == "name"


def test_stock_rewards_with_arguments_and_the_tokens_that_they_count(random_gpt2):
    asked = answers()  # of 4 tokens each
    summed = scorer(
        [
            {"function": "length", "args": {"target": 3, "alpha": 0.5}},
            {"function": "overlong", "args": {"max_length": 5, "cache": 2}, "weight": 4.0},
        ],
        random_gpt2,
    )
    assert summed(asked).tolist() == [-0.5 - 2] * 4


@pytest.mark.parametrize(
    "entry, said",
    [
        (
            {"function": "length", "args": {"taget": 3}},
            "'reward.0': args of the reward length: unknown key 'taget'; did you mean 'target'?",
        ),
        ({"function": "length", "args": {"target": "x"}}, "'target': must be a whole number, not 'x'"),
        ({"function": "checker", "arg": {}}, "unknown key 'reward.0.arg'; did you mean 'reward.0.args'?"),
        ({"function": "overlong"}, "the key 'max_length' is missing"),
        ({"function": "python_tests"}, "args: {allow: true}"),
        ({"model": "a", "args": {"b": 1}}, "args and timeout are a function's"),
        ({"model": "a", "timeout": 3}, "args and timeout are a function's"),
        ({"function": "checker", "timeout": 0}, "'reward.0.timeout'"),
        ({"function": "checker", "args": 3}, "'reward.0.args'"),
    ],
)
def test_a_recipe_with_wrong_arguments_is_refused(entry, said):
    class Recipe(Section):
        reward: list[RewardEntry]

    with pytest.raises(UserError) as error:
        config.parse({"reward": [entry]}, Recipe, "my.yaml")
    assert (
        said in str(error.value) and str(error.value).startswith("my.yaml: ") and "\n" not in str(error.value)
    )


def test_a_function_that_hangs_is_named_with_its_limit(random_gpt2, tmp_path):
    (tmp_path / "slow.py").write_text("def hang(completions, on):\n    while on: pass\n")
    name = f"{tmp_path / 'slow.py'}:hang"
    slow = scorer([{"function": name, "args": {"on": True}, "timeout": 0.2}], random_gpt2)
    with pytest.raises(UserError, match=f"{name}: it took longer than 0.2 s"):
        slow(answers())


def test_answers_that_all_loop_do_not_end_a_run(random_gpt2, monkeypatch):
    monkeypatch.setattr(functions_module, "TIMEOUT", 0.1)
    asked = [
        dataclasses.replace(a, text="while True: pass", prompt=Prompt((1,), "q", {"tests": "pass"}))
        for a in answers()
    ]
    args = {"allow": True, "seconds": 0.3}
    assert scorer([{"function": "python_tests", "args": args}], random_gpt2)(asked).tolist() == [0] * 4
    with pytest.raises(UserError, match=r"python_tests: it took longer than 0\.2 s"):
        scorer([{"function": "python_tests", "args": args, "timeout": 0.2}], random_gpt2)(asked)


def test_normalised_scores_and_raw_ones_in_one_sum(functions, random_gpt2):
    entries = [
        {"function": f"{functions}:length", "weight": 3.0, "normalise": True},
        {"function": f"{functions}:wanted"},
    ]
    mixed = scorer(entries, random_gpt2)
    mixed.normalise_on(answers())
    lengths = np.array([2.0, 4.0, 1.0, 0.0])
    scaled = 3 * (lengths - lengths.mean()) / lengths.std()
    assert mixed(answers()) == pytest.approx(scaled + [1, 0, 0, 10])
    again = scorer(entries, random_gpt2)
    again.restore(mixed.state())
    assert again(answers()) == pytest.approx(mixed(answers()))


def test_a_reward_model_reads_prompt_and_answer(reward_model, random_gpt2):
    alone = scorer([{"model": str(reward_model), "normalise": False, "weight": 2.0}], random_gpt2)
    asked = answers()
    model, _, _ = open_model(reward_model, ENGINES[0], scores=True)
    each = [float(scoring.score_rows(model, [(*a.prompt.tokens, *a.tokens)], 0)[0]) for a in asked]
    assert alone.parts(asked)[0] == pytest.approx(each, abs=1e-5)
    assert alone(asked) == pytest.approx(2 * np.array(each), abs=1e-5)
    assert alone.parts(asked)[0] != pytest.approx(
        scoring.score_rows(model, [a.tokens for a in asked], 0), abs=1e-2
    )
    # Models are normalised unless the recipe says otherwise.
    scaled = scorer([{"model": str(reward_model), "weight": 2.0}], random_gpt2)
    scaled.normalise_on(asked)
    assert scaled(asked).mean() == pytest.approx(0, abs=1e-6) and scaled(asked).std() == pytest.approx(2)
    factor, offset = scaled.share_of(str(reward_model))
    assert factor * np.array(each) + offset == pytest.approx(scaled(asked), abs=1e-4)
    assert alone.share_of(str(reward_model)) == (2.0, 0.0)
    with pytest.raises(ValueError, match="not among the rewards"):
        alone.share_of("other")


def test_rows_beyond_the_context_are_an_error_of_the_users(reward_model, random_gpt2):
    model, _, _ = open_model(reward_model, ENGINES[0], scores=True)
    assert np.isfinite(scoring.score_rows(model, [range(1, 65)], 0)).all()
    with pytest.raises(UserError, match="65 tokens does not fit the model's context of 64"):
        scoring.score_rows(model, [range(1, 66)], 0)
    alone = scorer([{"model": str(reward_model)}], random_gpt2)
    alone.check_context(64)
    with pytest.raises(
        UserError,
        match=r"model: it reads 64 tokens, and the longest prompt with "
        r"rollout.max_tokens has 65",
    ):
        alone.check_context(65)


@pytest.mark.skipif("torch" not in ENGINES, reason="transformers makes the reward model")
def test_a_reward_model_with_a_pad_token_of_its_own_is_taken(random_gpt2, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_gpt2)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "theirs")
    net = AutoModelForSequenceClassification.from_pretrained(
        random_gpt2, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    net.resize_token_embeddings(len(tokenizer))
    net.save_pretrained(tmp_path / "theirs")
    taken = scorer([{"model": str(tmp_path / "theirs"), "normalise": False}], random_gpt2)
    import torch

    with torch.no_grad():
        wanted = [float(net.eval()(torch.tensor([a.row])).logits[0, 0]) for a in answers()]
    assert taken(answers()) == pytest.approx(wanted, abs=1e-4)


def test_another_vocabulary_is_refused(random_gpt2, tmp_path):
    make_model(
        tmp_path / "other",
        ["Quite other words, zebra by zebra."] * 9,
        PretrainSection(vocab_size=300, layers=1, heads=2, width=64, context=64),
        seed=1,
    )
    with pytest.raises(UserError, match="its tokenizer is not the policy's"):
        scorer([{"model": str(helpers.reward_model(tmp_path / "other", tmp_path / "reward"))}], random_gpt2)


def sampled(folder: Path, **settings) -> list[Completion]:
    model, tokenizer = engines.get(ENGINES[0]).load(folder), load_tokenizer(folder)
    asked = [Prompt(tuple(range(3, 6 + i)), f"q{i}", {}) for i in range(3)]
    given = {
        "samples": 2,
        "max_tokens": 6,
        "temperature": 1.0,
        "stop": 399,
        "seed": 4,
        "token_budget": 4096,
        **settings,
    }
    return rollouts.sample(model, tokenizer, asked, **given)


def test_sampled_answers_stand_in_order_and_end_with_the_stop_token(random_gpt2):
    free = sampled(random_gpt2)
    tokenizer = load_tokenizer(random_gpt2)
    assert [a.prompt.text for a in free] == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert [a.group for a in free] == [0, 0, 1, 1, 2, 2]
    assert len({a.tokens for a in free}) == 6
    assert all(
        len(a.tokens) == 6 and not a.stopped and a.text == tokenizer.decode(a.tokens).strip() for a in free
    )
    stop = free[3].tokens[3]
    ended = sampled(random_gpt2, stop=stop)
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(stop) + 1 if stop in before.tokens else None
        assert after.tokens == before.tokens[:cut] and after.stopped == (cut is not None)
        # the stop token is trained on and not shown
        said = after.tokens[:-1] if after.stopped else after.tokens
        assert after.text == tokenizer.decode(said).strip()
        assert len(after.logprobs) == len(after.tokens) and max(after.logprobs) < 0
        assert after.logprobs == pytest.approx(before.logprobs[:cut], abs=1e-5)
    assert ended[3].stopped
    assert [a.tokens for a in sampled(random_gpt2, seed=5)] != [a.tokens for a in free]
    # Cold answers are those of the greedy path, whatever the seed.
    cold = [[a.tokens for a in sampled(random_gpt2, temperature=1e-3, seed=s)] for s in (1, 2)]
    assert cold[0] == cold[1] and cold[0][0] == cold[0][1]
