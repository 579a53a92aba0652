"""PPO as a user runs it: starts at ratio 1, learns a trivial reward, resumes exactly, and both engines tell the same story."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, loading, methods, recipe
from mlx_posttrain.engines.base import AdamW, head_start
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import ppo
from mlx_posttrain.rl import rollouts
from mlx_posttrain.rl.experience import Parties, experience, measure
from mlx_posttrain.rl.rollouts import Answer, Question
from mlx_posttrain.runs import Run

ENGINES = engines.available()
COUNT = "def reward(prompts, completions, **columns):\n    return [float(c.count('e')) for c in completions]\n"
NO_CLOCK = ("seconds", "seconds/rollout", "peak_gb")


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> str:
    """A reward function that counts one letter."""
    path = tmp_path_factory.mktemp("reward") / "count.py"
    path.write_text(COUNT)
    return f"{path}:reward"


def load(random_gpt2, rows_file, reward: str, output: Path, *overrides: str):
    return recipe.load("07_ppo", [
        f"model={random_gpt2}", f"reward=[{{function: {json.dumps(reward)}}}]", f"data.source={rows_file}", "data.eval_split=null",
        "data.limit=40", "data.template=question", "data.max_length=40", "data.eval_limit=8", f"output={output}", "rollout.prompts=8",
        "rollout.max_tokens=8", "kl.beta=0.05", "train.batch_size=4", "train.accumulate=1", "train.steps=3", "train.lr=1e-3", *overrides,
    ])  # fmt: skip


def run(*args, resume: bool = False):
    chosen = load(*args)
    return methods.get("ppo").run(chosen, resume=resume), Run(Path(chosen.output))


def steps(run: Run) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in NO_CLOCK} for r in run.metrics() if "episode" in r]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "more", [[], ["critic.kind=shared"], ["adapter.rank=4"], ["rollout.temperature=0.7", "adapter.rank=4", "critic.kind=shared"]]
)
def test_the_first_ratio_is_one(engine, more, random_gpt2, rows_file, counting, tmp_path):
    _, done = run(
        random_gpt2, rows_file, counting, tmp_path / "run", f"engine={engine}", "train.steps=1", "ppo.epochs=1", "train.batch_size=8", *more
    )
    first = steps(done)[0]
    assert first["updates"] == 1
    assert first["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["val/ratio_var"] == pytest.approx(0.0, abs=1e-6)
    assert first["policy/approxkl_avg"] < 1e-10
    assert first["policy/clipfrac_avg"] == 0.0
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    # Whitened advantages have mean 0, and with a ratio of 1 the loss is minus their mean.
    assert first["loss/policy_avg"] == pytest.approx(0.0, abs=1e-5)
    for name in (
        "objective/entropy",
        "objective/scores",
        "objective/rlhf_reward",
        "objective/non_score_reward",
        "val/num_eos_tokens",
        "lr",
        "episode",
    ):
        assert np.isfinite(first[name])
    samples = [json.loads(line) for line in (done.folder / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "answer", "score"} <= set(samples[0])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reward_for_one_letter_is_learned(engine, seed, random_gpt2, rows_file, counting, tmp_path):
    _, done = run(
        random_gpt2, rows_file, counting, tmp_path / "run", f"engine={engine}", f"seed={seed}", "train.steps=25", "rollout.prompts=16",
        "rollout.samples=2", "train.batch_size=16", "train.lr=3e-3", "critic.lr=3e-3", "rollout.missing_eos_penalty=null", "kl.beta=0.01",
        "train.eval_every=25", "train.schedule=constant",
    )  # fmt: skip
    scores = [r["objective/scores"] for r in steps(done)]
    # One of 382 tokens is an e, and some more hold one: a random policy has about one in an answer of 8 tokens.
    assert np.mean(scores[-3:]) > 2 * np.mean(scores[:3]) + 0.5, scores
    assert steps(done)[-1]["objective/kl"] > 0.1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "more",
    [["kl.controller=adaptive", "kl.horizon=50"], ["adapter.rank=4", "critic.kind=shared", "train.eval_every=1"]],
    ids=["full", "lora"],
)
def test_resumes_to_the_same_figures(engine, more, random_gpt2, rows_file, counting, tmp_path):
    args = (
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        f"engine={engine}",
        "train.steps=4",
        "train.save_every=2",
        "train.keep=9",
        *more,
    )
    _, whole = run(*args)
    wanted = steps(whole)
    shutil.rmtree(whole.final)
    shutil.rmtree(whole.checkpoints / "step-000004")
    run(*args, resume=True)
    differing = {(a["step"], k): (a[k], b[k]) for a, b in zip(wanted, steps(whole), strict=True) for k in a if a[k] != b[k]}
    assert not differing
    assert len(wanted) == 4
    if "kl.controller=adaptive" in more:
        assert wanted[0]["beta"] != wanted[-1]["beta"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_finished_model_says_what_it_said_in_training(engine, random_gpt2, rows_file, counting, tmp_path):
    """Gradient checkpointing on: texts sampled right after training are those of the saved model."""
    _, done = run(
        random_gpt2, rows_file, counting, tmp_path / "run", f"engine={engine}", "train.gradient_checkpointing=true", "sample.count=6"
    )
    samples = [json.loads(line) for line in (done.folder / "samples.jsonl").read_text().splitlines()]
    last = [s for s in samples if s["step"] == 3]
    model, tokenizer, _ = loading.open_model(done.folder, engine)
    chosen = load(random_gpt2, rows_file, counting, tmp_path / "run")
    from mlx_posttrain.rl import prompts

    _, held_out = prompts.read(chosen.data, tokenizer, model.context, 8, 0)
    again = rollouts.sample(model, tokenizer, held_out, samples=1, max_tokens=8, temperature=1.0, stop=0, seed=0, token_budget=32768)
    assert last and [a.text for a in again] == [s["answer"] for s in last]
    assert [s["answer"] for s in last] != [s["answer"] for s in samples if s["step"] == 0]  # it has learned something since


@pytest.mark.parametrize("engine", ENGINES)
def test_reference_and_critic_stand_apart(engine, random_gpt2, rows_file, counting, tmp_path):
    """The reference never moves, and a separate critic's step leaves the policy alone."""
    chosen = load(random_gpt2, rows_file, counting, tmp_path / "run")
    library = engines.get(engine)
    policy, critic = library.load(random_gpt2), library.load(random_gpt2)
    policy.keep_reference()
    critic.add_head(head_start(64, None))
    parties = Parties(policy, critic, None, None, None)
    seen = recorded(parties, chosen)
    before = measure(parties, seen.answers, 1.0, chosen.train, 64)
    trainers = library.trainer(policy, AdamW()), library.trainer(critic, AdamW())
    losses = ppo.policy_loss(chosen), ppo.value_loss(0.2)
    batch = rollouts.with_figures([a.example for a in seen.answers], seen.figures, 64)
    start = {k: v.copy() for k, v in policy.weights().items()}
    trainers[1].step(losses[1], [batch], 1e-2)
    assert all(np.array_equal(v, start[k]) for k, v in policy.weights().items())
    assert np.abs(critic.head()).max() > 0
    trainers[0].step(losses[0], [batch], 1e-2)
    assert any(not np.array_equal(v, start[k]) for k, v in policy.weights().items())
    after = measure(parties, seen.answers, 1.0, chosen.train, 64)
    assert all(np.array_equal(a, b) for a, b in zip(before["reference"], after["reference"], strict=True))
    assert any(not np.allclose(a, b, atol=1e-4) for a, b in zip(before["old"], after["old"], strict=True))
    # The answers that were better than expected became likelier, the others less likely: the whole chain's sign.
    gain = np.concatenate(seen.figures["advantage"])
    moved = np.concatenate(after["old"]) - np.concatenate(before["old"])
    assert np.corrcoef(gain, moved)[0, 1] > 0.3


def recorded(parties: Parties, chosen):
    """Fixed answers with fixed scores, as if sampled."""
    rng = np.random.default_rng(3)
    answers = []
    for i in range(8):
        tokens = tuple(int(t) for t in rng.integers(1, 380, 3 + i % 4))
        stopped = i % 3 > 0
        answers.append(
            Answer(Question(tuple(int(t) for t in rng.integers(1, 380, 4 + i)), "q", {}), tokens + ((0,) if stopped else ()), stopped, "a")
        )
    figures = measure(parties, answers, 1.0, chosen.train, 64)
    return experience(answers, rng.normal(size=8), figures, chosen.ppo, 1.0, 0.05)


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_engines_agree_over_ten_updates(kind, random_gpt2, rows_file, counting, tmp_path):
    chosen = load(random_gpt2, rows_file, counting, tmp_path / "run", f"critic.kind={kind}", "ppo.epochs=1")
    curves = []
    for name in ENGINES:
        library = engines.get(name)
        policy, critic = library.load(random_gpt2), None
        policy.keep_reference()
        if kind == "separate":
            critic = library.load(random_gpt2)
            critic.add_head(head_start(64, None))
        else:
            policy.add_head(head_start(64, None))
        parties = Parties(policy, critic, None, None, None)
        trainers = library.trainer(policy, AdamW()), library.trainer(critic, AdamW()) if critic else None
        seen = recorded(parties, chosen)
        losses = ppo.policy_loss(chosen), ppo.value_loss(0.2)
        records = [ppo.update(chosen, *trainers, seen, losses, 3e-4, step, 64) for step in range(5)]  # each two optimizer steps
        curves.append(records)
    for ours, theirs in zip(*curves, strict=True):
        assert ours["updates"] == 2
        for figure in ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "val/ratio", "policy/entropy_avg"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=2e-3, abs=2e-5), figure
    assert abs(curves[0][-1]["val/ratio"] - 1) > 1e-4


def test_several_samples_and_texts_beside(random_gpt2, rows_file, counting, tmp_path):
    result, done = run(
        random_gpt2, rows_file, counting, tmp_path / "run", "rollout.prompts=4", "rollout.samples=3", "adapter.rank=4",
        f"ptx={{coefficient: 2.0, batch_size: 2, data: {{source: {json.dumps(str(rows_file))}, max_length: 48, template: question}}}}",
        "ppo.whiten_rewards=true", "ppo.score_clip=1.0", "ppo.target_kl=100", "judge=[{function: exact_answer}]",
    )  # fmt: skip
    assert all(r["loss/ptx_avg"] > 1 for r in steps(done))
    assert steps(done)[0]["episode"] == 12
    assert result["trained_parameters"] < result["parameters"] / 10
    assert (done.final / "adapter_config.json").is_file() and not (done.final / "head.safetensors").exists()


def test_one_budget_or_another_samples_the_same(random_gpt2):
    model = engines.get(ENGINES[0]).load(random_gpt2)
    tokenizer = loading.load_tokenizer(random_gpt2)
    asked = [Question(tuple(range(3, 6 + i)), "q", {}) for i in range(5)]
    texts = [
        [
            a.tokens
            for a in rollouts.sample(model, tokenizer, asked, samples=2, max_tokens=6, temperature=1.0, stop=0, seed=4, token_budget=budget)
        ]
        for budget in (32, 1024, 10_000)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len({*texts[0]}) > 5


def test_an_early_stop_on_kl(random_gpt2, rows_file, counting, tmp_path):
    _, done = run(
        random_gpt2, rows_file, counting, tmp_path / "run", "ppo.target_kl=1e-9", "ppo.epochs=3", "train.steps=1", "train.lr=1e-2"
    )
    assert steps(done)[0]["updates"] < 6


@pytest.mark.parametrize(
    "override, said",
    [
        ("reward=[{}]", "a model or a function"),
        ("adapter={dropout: 0.1}", "dropout must be 0"),
        ("adapter={path: x}", "give the adapter's run as `model`"),
        ("critic.init=reward", "needs a reward model"),
        ("data.pack=true", "means nothing for prompts"),
        ("ppo.clp=1", "did you mean 'ppo.clip'"),
        ("train.epochs=2", "unknown key 'train.epochs'"),
        ("reward=[]", "reward"),
    ],
)
def test_recipes_that_cannot_be(override, said, random_gpt2, rows_file, counting, tmp_path):
    with pytest.raises(UserError, match=said):
        load(random_gpt2, rows_file, counting, tmp_path / "run", override)


def test_no_score_at_all_is_an_error(random_gpt2, rows_file, tmp_path):
    (tmp_path / "none.py").write_text("def f(prompts, completions):\n    return [None] * len(completions)\n")
    with pytest.raises(UserError, match="could be scored"):
        run(random_gpt2, rows_file, f"{tmp_path / 'none.py'}:f", tmp_path / "run")
