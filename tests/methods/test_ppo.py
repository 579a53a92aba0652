"""PPO as a user runs it: starts at ratio 1, learns a trivial reward, resumes exactly, and both engines tell
the same story.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data import pairs
from mlx_posttrain.engines.base import AdamW, initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import ppo
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.rewards import scorer as scoring
from mlx_posttrain.rl import rollouts
from mlx_posttrain.rl.actors import make_actors
from mlx_posttrain.rl.experience import Actors, measure
from mlx_posttrain.rl.learner import RolloutData, RolloutLearner
from mlx_posttrain.rl.rollouts import Completion, Prompt
from mlx_posttrain.runs import Run
from tests import helpers

ENGINES = engines.available()
COUNT = (
    "def reward(prompts, completions, **columns):\n    return [float(c.count('e')) for c in completions]\n"
)


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> str:
    """A reward function that counts one letter."""
    path = tmp_path_factory.mktemp("reward") / "count.py"
    path.write_text(COUNT)
    return f"{path}:reward"


@pytest.fixture(scope="module")
def reward_model(random_gpt2, tmp_path_factory) -> str:
    """A reward model on the policy's base, whose head is random."""
    return str(helpers.reward_model(random_gpt2, tmp_path_factory.mktemp("reward-model") / "model"))


def ptx(rows: Path) -> str:
    return (
        f"ptx={{coefficient: 2.0, batch_size: 2, data: {{source: {json.dumps(str(rows))}, max_length: "
        f"48, template: question}}}}"
    )


def load(random_gpt2, rows_file, reward: str, output: Path, *overrides: str):
    return methods.load_recipe(
        "07_ppo",
        [
            f"model={random_gpt2}",
            f"reward=[{{function: {json.dumps(reward)}}}]",
            f"data.source={rows_file}",
            "data.eval_split=null",
            "data.limit=40",
            "data.template=question",
            "data.max_length=40",
            "data.eval_limit=8",
            f"output={output}",
            "rollout.prompts=8",
            "rollout.max_tokens=8",
            "kl.beta=0.05",
            "train.batch_size=4",
            "train.grad_accumulation=1",
            "train.steps=3",
            "train.lr=1e-3",
            *overrides,
        ],
    )


def run(*args, resume: bool = False):
    chosen = load(*args)
    return methods.run(chosen, resume=resume), Run(Path(chosen.output))


def steps(run: Run) -> list[dict]:
    return [r for r in helpers.records(run.folder) if "episode" in r]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["critic.kind=shared"],
        ["adapter.rank=4"],
        ["rollout.temperature=0.7", "adapter.rank=4", "critic.kind=shared"],
    ],
)
def test_the_first_ratio_is_one(engine, more, random_gpt2, rows_file, counting, tmp_path):
    _, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        f"engine={engine}",
        "train.steps=1",
        "ppo.epochs=1",
        "train.batch_size=8",
        *more,
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
    samples = helpers.read_jsonl(done.folder / "samples.jsonl")
    assert {"step", "prompt", "answer", "score"} <= set(samples[0])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_reward_for_one_letter_is_learned(engine, seed, random_gpt2, rows_file, counting, tmp_path):
    _, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        f"engine={engine}",
        f"seed={seed}",
        "train.steps=25",
        "rollout.prompts=16",
        "rollout.samples=2",
        "train.batch_size=16",
        "train.lr=3e-3",
        "critic.lr=3e-3",
        "rollout.missing_eos_penalty=null",
        "kl.beta=0.01",
        "train.eval_every=25",
        "train.schedule=constant",
    )
    scores = [r["objective/scores"] for r in steps(done)]
    # One of 382 tokens is an e, and some more hold one: a random policy has about one in an answer of 8
    # tokens.
    assert np.mean(scores[-3:]) > 2 * np.mean(scores[:3]) + 0.5, scores
    assert steps(done)[-1]["objective/kl"] > 0.1


def everything(reward_model: str, counting: str, rows: Path) -> list[str]:
    """Every part of the algorithm that has a state: scales of rewards and judge, a copied critic, beta, rows
    beside.
    """
    return [
        f"reward=[{{model: {json.dumps(reward_model)}, weight: 0.5}}, {{function: {json.dumps(counting)}, "
        f"weight: 2.0, normalise: true}}]",
        f"judge=[{{model: {json.dumps(reward_model)}}}]",
        ptx(rows),
        "kl.controller=adaptive",
        "kl.horizon=50",
        "critic.lr=3e-3",
        "train.eval_every=1",
        "train.batch_size=8",
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["full", "lora", "everything"])
def test_resumes_to_the_same_figures(engine, what, random_gpt2, rows_file, counting, reward_model, tmp_path):
    more = {
        "full": [],
        "lora": ["adapter.rank=4", "critic.kind=shared", "train.eval_every=1"],
        "everything": everything(reward_model, counting, rows_file),
    }[what]
    base = [f"engine={engine}", "train.steps=4", "train.save_every=2", "train.keep=9"]
    args = (random_gpt2, rows_file, counting, tmp_path / "run", *base, *more)
    _, whole = run(*args)
    wanted, weights = helpers.records(whole.folder), helpers.final_weights(whole.folder)
    shutil.rmtree(whole.final)
    shutil.rmtree(whole.checkpoints / "step-000004")
    run(*args, resume=True)
    assert helpers.records(whole.folder) == wanted and len(steps(whole)) == 4
    again = helpers.final_weights(whole.folder)
    assert set(again) == set(weights) and all(np.array_equal(again[name], weights[name]) for name in weights)
    if what == "everything":
        assert len({r["beta"] for r in steps(whole)}) == 4 and "eval/judge" in wanted[0]


@pytest.mark.parametrize("what, part", [("prompts", "training prompts"), ("ptx", "ptx rows")])
def test_other_rows_are_not_resumed_on(what, part, random_gpt2, rows_file, counting, tmp_path):
    """A column that only reward functions see, and the texts beside, are data as much as the prompts."""
    mine = shutil.copy(rows_file, tmp_path / "mine.jsonl")
    prompts_from, texts_from = (mine, rows_file) if what == "prompts" else (rows_file, mine)
    args = (
        random_gpt2,
        prompts_from,
        counting,
        tmp_path / "run",
        "train.steps=2",
        "train.save_every=1",
        ptx(Path(texts_from)),
    )
    _, whole = run(*args)
    shutil.rmtree(whole.final)
    shutil.rmtree(whole.checkpoints / "step-000002")
    Path(mine).write_text(Path(mine).read_text().replace('"output": "', '"output": "Changed: '))
    with pytest.raises(UserError, match=f"the {part} are not those"):
        run(*args, resume=True)


def test_killed_and_resumed(random_gpt2, rows_file, counting, reward_model, tmp_path):
    """A real process and kill -9: every figure and weight is that of a run that was let be."""
    more = [
        *everything(reward_model, counting, rows_file),
        "train.steps=6",
        "train.save_every=1",
        "train.keep=9",
    ]
    _, whole = run(random_gpt2, rows_file, counting, tmp_path / "whole", *more)
    broken = Run(tmp_path / "broken")
    file = tmp_path / "recipe.yaml"
    raw = load(random_gpt2, rows_file, counting, broken.folder, *more).model_dump(mode="json")
    file.write_text(json.dumps(raw))
    process = subprocess.Popen(helpers.command("run", file), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        helpers.wait_for((broken.checkpoints / "step-000002").is_dir, process)
    finally:
        process.kill()
        process.communicate()
    assert not broken.finished and len(steps(broken)) < 6, "the kill came too late to prove anything"
    run(random_gpt2, rows_file, counting, broken.folder, *more, resume=True)
    assert helpers.records(broken.folder) == helpers.records(whole.folder)
    assert helpers.same_weights(broken.folder, whole.folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_finished_model_says_what_it_said_in_training(engine, random_gpt2, rows_file, counting, tmp_path):
    """Gradient checkpointing on: texts sampled right after training are those of the saved model."""
    _, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        f"engine={engine}",
        "train.gradient_checkpointing=true",
        "sample.count=6",
    )
    samples = helpers.read_jsonl(done.folder / "samples.jsonl")
    last = [s for s in samples if s["step"] == 3]
    model, tokenizer, _ = open_model(done.folder, engine)
    chosen = load(random_gpt2, rows_file, counting, tmp_path / "run")
    from mlx_posttrain.rl import prompts

    _, held_out = prompts.read(chosen.data, tokenizer, model.context, 8, 0)
    again = rollouts.sample(
        model,
        tokenizer,
        held_out,
        samples=1,
        max_tokens=8,
        temperature=1.0,
        stop=0,
        seed=0,
        token_budget=32768,
    )
    assert last and [a.text for a in again] == [s["answer"] for s in last]
    # it has learned something since
    assert [s["answer"] for s in last] != [s["answer"] for s in samples if s["step"] == 0]


def test_what_it_takes_is_said_before_the_other_models_are_there(
    random_gpt2, rows_file, counting, tmp_path, monkeypatch, capfd
):
    def stop(*args):
        raise UserError("so far")

    monkeypatch.setattr(scoring, "Scorer", stop)
    monkeypatch.setattr(type(engines.get(ENGINES[0]).load(random_gpt2)), "keep_reference", stop)
    with pytest.raises(UserError, match="so far"):
        run(random_gpt2, rows_file, counting, tmp_path / "run", f"engine={ENGINES[0]}")
    assert "memory: about " in capfd.readouterr().err


@pytest.mark.parametrize("engine", ENGINES)
def test_reference_and_critic_stand_apart(engine, random_gpt2, rows_file, counting, tmp_path):
    """The reference never moves, and a separate critic's step leaves the policy alone."""
    chosen = load(random_gpt2, rows_file, counting, tmp_path / "run")
    library = engines.get(engine)
    policy, critic = library.load(random_gpt2), library.load(random_gpt2)
    policy.keep_reference()
    critic.add_head(initial_head(64, None))
    actors = Actors(policy, critic, None, None, None)
    given = recorded(actors, chosen)
    before = measure(actors, given.completions, 1.0, chosen.train)
    trainers = library.trainer(policy, AdamW()), library.trainer(critic, AdamW())
    losses = ppo.policy_loss(chosen), ppo.value_loss(0.2)
    batch = rollouts.collate_stats([c.example for c in given.completions], given.stats, 64)
    start = {k: v.copy() for k, v in policy.weights().items()}
    trainers[1].step(losses[1], [batch], 1e-2)
    assert all(np.array_equal(v, start[k]) for k, v in policy.weights().items())
    assert np.abs(critic.head()).max() > 0
    trainers[0].step(losses[0], [batch], 1e-2)
    assert any(not np.array_equal(v, start[k]) for k, v in policy.weights().items())
    after = measure(actors, given.completions, 1.0, chosen.train)
    pairs_of = {name: list(zip(before[name], after[name], strict=True)) for name in before}
    assert all(np.array_equal(a, b) for a, b in pairs_of["ref_logprobs"])
    assert any(not np.allclose(a, b, atol=1e-4) for a, b in pairs_of["old_logprobs"])
    # Completions that were better than expected became likelier, the others less likely: the whole chain's
    # sign.
    advantages = np.concatenate(given.stats["advantages"])
    moved = np.concatenate(after["old_logprobs"]) - np.concatenate(before["old_logprobs"])
    assert np.corrcoef(advantages, moved)[0, 1] > 0.3


def recorded(actors: Actors, chosen):
    """Fixed completions with fixed scores, as if sampled."""
    rng = np.random.default_rng(3)
    completions = []
    for i in range(8):
        tokens = tuple(int(t) for t in rng.integers(1, 380, 3 + i % 4))
        stopped = i % 3 > 0
        completions.append(
            Completion(
                Prompt(tuple(int(t) for t in rng.integers(1, 380, 4 + i)), "q", {}),
                tokens + ((0,) if stopped else ()),
                stopped,
                "a",
            )
        )
    stats = measure(actors, completions, 1.0, chosen.train)
    return ppo.algorithm(chosen).experience(completions, rng.normal(size=8), stats, 0.05, 0.0)


def learner_of(library, actors: Actors, chosen) -> RolloutLearner:
    return RolloutLearner(
        library, actors, ppo.algorithm(chosen), chosen, RolloutData(train=()), "logprobs", lambda row: None
    )


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_engines_agree_over_ten_updates(kind, random_gpt2, rows_file, counting, tmp_path):
    chosen = load(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        f"critic.kind={kind}",
        "ppo.epochs=1",
        "train.grad_accumulation=8",
        "train.eps=1e-8",
        "train.max_grad_norm=1",
    )
    curves = []
    for name in ENGINES:
        library = engines.get(name)
        policy, critic = library.load(random_gpt2), None
        policy.keep_reference()
        if kind == "separate":
            critic = library.load(random_gpt2)
            critic.add_head(initial_head(64, None))
        else:
            policy.add_head(initial_head(64, None))
        actors = Actors(policy, critic, None, None, None)
        given = recorded(actors, chosen)
        learner = learner_of(library, actors, chosen)
        curves.append([learner.update(given, step, 3e-4) for step in range(10)])
    for ours, theirs in zip(*curves, strict=True):
        assert ours["updates"] == 1
        for figure in (
            "loss/policy_avg",
            "loss/value_avg",
            "policy/approxkl_avg",
            "val/ratio",
            "policy/entropy_avg",
        ):
            assert ours[figure] == pytest.approx(theirs[figure], rel=2e-3, abs=2e-5), figure
    assert abs(curves[0][-1]["val/ratio"] - 1) > 1e-4


def test_several_samples_and_texts_beside(random_gpt2, rows_file, counting, tmp_path):
    result, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        "rollout.prompts=4",
        "rollout.samples=3",
        "adapter.rank=4",
        ptx(rows_file),
        "ppo.whiten_rewards=true",
        "ppo.score_clip=1.0",
        "ppo.target_kl=100",
        "judge=[{function: exact_answer}]",
    )
    assert all(r["loss/ptx_avg"] > 1 for r in steps(done))
    assert steps(done)[0]["episode"] == 12
    assert result["trained_parameters"] < result["parameters"] / 10
    assert (done.final / "adapter_config.json").is_file() and not (done.final / "head.safetensors").exists()


def test_one_budget_or_another_samples_the_same(random_gpt2):
    model = engines.get(ENGINES[0]).load(random_gpt2)
    tokenizer = load_tokenizer(random_gpt2)
    asked = [Prompt(tuple(range(3, 6 + i)), "q", {}) for i in range(5)]
    texts = [
        [
            a.tokens
            for a in rollouts.sample(
                model,
                tokenizer,
                asked,
                samples=2,
                max_tokens=6,
                temperature=1.0,
                stop=0,
                seed=4,
                token_budget=budget,
            )
        ]
        for budget in (32, 1024, 10_000)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len({*texts[0]}) > 5


def test_beta_follows_the_run_both_ways(random_gpt2, rows_file, counting, tmp_path):
    """The controller is fed the run's own KL, with its sign: above the target beta rises, below it falls."""
    target, horizon, answers = 0.05, 40.0, 8
    more = [
        "kl.controller=adaptive",
        f"kl.target={target}",
        f"kl.horizon={horizon}",
        "kl.beta=0.2",
        "train.steps=8",
        "train.lr=4e-3",
        "train.batch_size=8",
        "ppo.epochs=1",
    ]
    _, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        *more,
        "train.schedule=constant",
        "rollout.missing_eos_penalty=null",
    )
    found = steps(done)
    assert found[0]["beta"] == 0.2
    for now, then in itertools.pairwise(found):
        relative = max(-0.2, min(0.2, now["objective/kl"] / target - 1))
        assert then["beta"] == pytest.approx(now["beta"] * (1 + relative * answers / horizon))
    beta = [r["beta"] for r in found]
    assert beta[1] < 0.2 < max(beta), "the first KL is 0, and later ones are above the target"


def test_a_strong_penalty_keeps_the_policy_near(random_gpt2, rows_file, counting, tmp_path):
    more = [
        "train.steps=10",
        "train.lr=3e-3",
        "train.schedule=constant",
        "train.eval_every=10",
        "critic.lr=3e-3",
        "train.batch_size=8",
    ]
    free, held = [
        run(random_gpt2, rows_file, counting, tmp_path / str(b), *more, f"kl.beta={b}")[0]["kl"]
        for b in (0.0, 3.0)
    ]
    assert held < 0.5 * free and free > 0.2, (held, free)


def test_rates_orders_and_texts_of_the_loop(random_gpt2, rows_file, counting, tmp_path, monkeypatch):
    """What the loop hands to each step's updates: the scheduled rate, the step's number, the completions of
    the step's prompts, the texts.
    """
    handed = []
    real = RolloutLearner.update

    def recording(self, experience, step, lr):
        prompts = [c.prompt.tokens for c in experience.completions]
        handed.append((lr, step, prompts, len(self.data.ptx_examples), self.actors.critic is not None))
        return real(self, experience, step, lr)

    monkeypatch.setattr(RolloutLearner, "update", recording)
    _, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        "train.steps=4",
        "train.lr=1e-3",
        "rollout.prompts=4",
        "rollout.samples=2",
        ptx(rows_file),
    )
    assert (
        [lr for lr, *_ in handed]
        == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        == [r["lr"] for r in steps(done)]
    )
    assert [step for _, step, *_ in handed] == [0, 1, 2, 3]
    asked = [[tokens[i : i + 2] for i in (0, 2, 4, 6)] for _, _, tokens, _, _ in handed]
    assert all(a == b for step in asked for a, b in step)  # a prompt's samples stand together
    # four steps of four prompts, none twice in a pass
    assert len({pair[0] for step in asked for pair in step}) == 16
    assert all(texts > 2 and critic for *_, texts, critic in handed)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight, normalise", [(1.0, "null"), (-2.0, "null"), (3.0, "false")])
def test_a_copied_critic_starts_at_what_its_model_adds(
    engine, weight, normalise, random_gpt2, rows_file, counting, reward_model, tmp_path
):
    """Where the score is read, the critic's value is the reward model's part of the score: weighted, and
    normalised if that is.
    """
    models = f"{{model: {json.dumps(reward_model)}, weight: {weight}, normalise: {normalise}}}"
    chosen = load(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        f"reward=[{{function: {json.dumps(counting)}}}, {models}]",
    )
    library, tokenizer = engines.get(engine), load_tokenizer(random_gpt2)
    policy = library.load(random_gpt2)
    rng = np.random.default_rng(0)
    texts = [tuple(rng.integers(1, 380, 5 + i).tolist()) for i in range(6)]
    sampled = [Completion(Prompt(t[:3], "q", {}), t[3:], False, "eee"[i % 3 :]) for i, t in enumerate(texts)]
    prompts = [c.prompt for c in sampled]
    actors, data = make_actors(
        library, chosen, ppo.algorithm(chosen), "logprobs", random_gpt2, policy, tokenizer, (prompts, [])
    )
    actors.scorer.normalise_on(sampled)
    data.calibrate_critic(actors)
    values = (
        actors.critic.apply(lambda m, b: {"v": m.scores(b)}, [pairs.collate_scores(texts, None, 64)])[0]["v"]
        + actors.value_offset
    )
    counted = np.array([c.text.count("e") for c in sampled])
    assert values == pytest.approx(actors.scorer(sampled) - counted, abs=2e-4)
    assert np.ptp(values) > 0.5


def test_a_short_reward_model_is_found_before_training(random_gpt2, rows_file, counting, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(random_gpt2, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "n_positions": 24, "n_ctx": 24}))
    (file,) = (tmp_path / "short").glob("*.safetensors")
    save_file(
        {k: v[:24].copy() if "wpe" in k else v for k, v in load_file(file).items()}, file, {"format": "pt"}
    )
    short = json.dumps(str(helpers.reward_model(tmp_path / "short", tmp_path / "reward")))
    for more in ([f"reward=[{{model: {short}}}]"], [f"judge=[{{model: {short}}}]"]):
        with pytest.raises(
            UserError,
            match=r"reward: it reads 24 tokens, and the longest prompt with "
            r"rollout.max_tokens has \d+",
        ):
            run(random_gpt2, rows_file, counting, tmp_path / "run", *more)
        assert not (tmp_path / "run").exists()


def test_without_held_out_prompts(random_gpt2, rows_file, counting, tmp_path, capfd):
    result, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        "data.holdout=0",
        "train.steps=2",
        "sample.count=2",
    )
    samples = helpers.read_jsonl(done.folder / "samples.jsonl")
    assert [s["step"] for s in samples] == [0, 0, 1, 1, 2, 2] and all(
        s["score"] == s["answer"].count("e") for s in samples
    )
    said = capfd.readouterr().err
    assert "there are no held-out prompts" in said and "nan" not in said and "score" not in result
    compiles = False
    if ENGINES[0] == "mlx":
        from mlx_posttrain.engines.mlx.cpu.compile_check import compile_works

        compiles = compile_works()
    assert ("steps were compiled" in said) == compiles
    assert not any("eval/kl" in r for r in helpers.records(done.folder))
    run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "none",
        "data.holdout=0",
        "train.steps=1",
        "sample.count=0",
    )
    assert not (tmp_path / "none" / "samples.jsonl").exists()


def test_the_shown_functions_and_command(root, random_gpt2, tmp_path, monkeypatch):
    """What docs/rlhf.md and the recipe's header show, as they show it, on a file with prompts and one column
    more.
    """
    shown = (root / "docs" / "rlhf.md").read_text()
    (tmp_path / "my_rewards.py").write_text(shown.split("```python")[1].split("```")[0])
    rows = [{"prompt": f"Say number {i}.", "target": "e" if i % 2 else None} for i in range(30)]
    helpers.write_jsonl(tmp_path / "prompts.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    header = (root / "recipes" / "07_ppo.yaml").read_text().splitlines()
    command = next(line for line in header if "prompts.jsonl" in line).lstrip("# ")
    assert command in shown
    words = shlex.split(command)
    assert words[:3] == ["mlx-posttrain", "run", "07_ppo"]
    small = [
        f"model={random_gpt2}",
        "data.holdout=8",
        "rollout.max_tokens=8",
        "rollout.prompts=8",
        "train.steps=1",
        "sample.count=0",
    ]
    for name in ("brief", "right"):
        chosen = methods.load_recipe(
            words[2], [*(w.replace(":brief", f":{name}") for w in words[3:]), *small, f"output={name}"]
        )
        assert np.isfinite(methods.run(chosen)["score"])
    assert 0 < steps(Run(tmp_path / "right"))[0]["val/unscored"] < 8
    assert steps(Run(tmp_path / "brief"))[0]["val/unscored"] == 0


def test_an_early_stop_on_kl(random_gpt2, rows_file, counting, tmp_path):
    _, done = run(
        random_gpt2,
        rows_file,
        counting,
        tmp_path / "run",
        "ppo.target_kl=1e-9",
        "ppo.epochs=3",
        "train.steps=1",
        "train.lr=1e-2",
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
        ("ppo.vf_coef=0.5", "vf_coef weighs the losses of a shared trunk"),
        ("kl.target=3", "belongs to kl.controller=adaptive"),
        ("kl.horizon=3", "belongs to kl.controller=adaptive"),
        ("rollout={missing_eos_score: -1, missing_eos_penalty: 2}", "give one of the two"),
        ("ppo.clip_rnge=1", "did you mean 'ppo.clip_range'"),
        ("ppo.clip=1", "unknown key 'ppo.clip'; did you mean 'ppo.clip_range'"),
        ("train.epochs=2", "unknown key 'train.epochs'"),
        ("reward=[]", "reward"),
    ],
)
def test_recipes_that_cannot_be(override, said, random_gpt2, rows_file, counting, tmp_path):
    with pytest.raises(UserError, match=said):
        load(random_gpt2, rows_file, counting, tmp_path / "run", override)


def test_answers_as_long_as_the_context_leave_no_room(random_gpt2, rows_file, counting, tmp_path):
    chosen = load(random_gpt2, rows_file, counting, tmp_path / "run", "rollout.max_tokens=64")
    with pytest.raises(
        UserError,
        match=r"rollout.max_tokens=64 leaves no room for a prompt in the model's "
        r"context of 64",
    ):
        methods.run(chosen)
    assert not (tmp_path / "run").exists()


def test_no_score_at_all_is_an_error(random_gpt2, rows_file, tmp_path):
    (tmp_path / "none.py").write_text("def f(prompts, completions):\n    return [None] * len(completions)\n")
    with pytest.raises(UserError, match="could be scored"):
        run(random_gpt2, rows_file, f"{tmp_path / 'none.py'}:f", tmp_path / "run")
