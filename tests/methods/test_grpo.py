"""GRPO as a user runs it: its update against NumPy, learning, exact resume, and both engines alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import grpo
from mlx_posttrain.rewards.scorer import Scores
from mlx_posttrain.rl import rollouts
from mlx_posttrain.rl.aggregation import AGGREGATIONS, aggregate
from mlx_posttrain.rl.experience import Actors
from mlx_posttrain.rl.learner import RolloutData, RolloutLearner
from mlx_posttrain.rl.rollouts import Completion, Prompt
from mlx_posttrain.runs import Run
from tests import architectures, helpers

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


def load(model, rows_file, reward: str, output: Path, *overrides: str):
    return methods.load_recipe(
        "10_grpo",
        [
            f"model={model}",
            f"reward=[{{function: {json.dumps(reward)}}}]",
            f"data.source={rows_file}",
            "data.config=null",
            "data.format=auto",
            "data.system=null",
            "data.eval_split=null",
            "data.limit=40",
            "data.template=question",
            "data.max_length=40",
            "data.eval_limit=8",
            f"output={output}",
            "adapter=null",
            "rollout.prompts=4",
            "rollout.samples=4",
            "rollout.max_tokens=8",
            "train.batch_size=4",
            "train.grad_accumulation=2",
            "train.steps=4",
            "train.eval_every=2",
            "train.lr=1e-3",
            *overrides,
        ],
    )


def run(*args, resume: bool = False):
    chosen = load(*args)
    return methods.run(chosen, resume=resume), Run(Path(chosen.output))


def steps(run: Run) -> list[dict]:
    clock = ("seconds", "seconds/rollout", "peak_gb", "active_gb", "cache_gb")
    return [
        {k: v for k, v in r.items() if k not in clock} for r in helpers.records(run.folder) if "episode" in r
    ]


# The update, against NumPy


LENGTHS, TEMPERATURE = [3, 6, 1, 4], 0.7


def completions(seed: int = 0) -> list[Completion]:
    rng = np.random.default_rng(seed)
    return [
        Completion(
            Prompt(tuple(rng.integers(1, 380, 4).tolist()), "q", {}),
            tuple(rng.integers(1, 380, n).tolist()),
            True,
            "a",
            group=i // 2,
        )
        for i, n in enumerate(LENGTHS)
    ]


def logprobs(model, example: Example) -> np.ndarray:
    """Log-probabilities of an example's trained tokens from its whole matrix of logits, in float64."""
    logits = np.asarray(model.full_logits(np.array([example.tokens], np.int32))[0], np.float64) / TEMPERATURE
    logits -= np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) + logits.max()
    return np.array(
        [logits[t - 1, example.tokens[t]] for t in range(1, len(example.tokens)) if example.trained[t]]
    )


def micro_batches(chosen, made, stats, parts):
    batches = [
        rollouts.collate_stats(
            [made[i].example for i in part], {n: [v[i] for i in part] for n, v in stats.items()}, 64
        )
        for part in parts
    ]
    return aggregate(batches, chosen.settings.aggregation, 8)


WEIGHTS = {
    "token-mean": lambda n: 1 / sum(LENGTHS),
    "seq-mean-token-mean": lambda n: 1 / (n * len(LENGTHS)),
    "seq-mean-token-sum": lambda n: 1 / len(LENGTHS),
    "seq-mean-token-sum-norm": lambda n: 1 / (8 * len(LENGTHS)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_sum"])
def test_the_update_equals_numpy(engine, ratio, random_gpt2, rows_file, counting, tmp_path):
    """Loss and gradient of a real model: each token's slope is found by hand, for every aggregation."""
    model = engines.get(engine).load(random_gpt2)
    made = completions()
    new = [logprobs(model, c.example) for c in made]
    rng = np.random.default_rng(3)
    stats = {
        "old_logprobs": [p + rng.uniform(-0.5, 0.5, len(p)) for p in new],
        "ref_logprobs": [p + rng.uniform(-0.5, 0.5, len(p)) for p in new],
        "advantages": [np.full(len(p), a) for p, a in zip(new, (1.5, -0.7, 0.9, -1.1), strict=True)],
        "importance": [rng.uniform(0.5, 1.5, len(p)) for p in new],
        "beta": [np.full(len(p), 0.3) for p in new],
    }
    low, high, delta = 0.1, 0.25, 1.4
    for how in AGGREGATIONS:
        more = [f"grpo.clip_low={low}", f"grpo.clip_high={high}", f"grpo.delta={delta}", "kl.beta=0.3"]
        more += [f"grpo.ratio={ratio}", f"grpo.aggregation={how}", f"rollout.temperature={TEMPERATURE}"]
        chosen = load(random_gpt2, rows_file, counting, tmp_path / how, *more)
        total, slopes, stopped = 0.0, [], 0
        for i, n in enumerate(LENGTHS):
            a = stats["advantages"][i][0]
            log = new[i] - stats["old_logprobs"][i]
            # Of a whole answer's ratio every token has the slope.
            shares = {"token": np.eye(n), "sequence": np.full((n, n), 1 / n), "sequence_sum": np.ones((n, n))}
            ratios = np.exp(shares[ratio] @ log)
            free, held = -a * np.minimum(ratios, delta), -a * np.clip(ratios, 1 - low, 1 + high)
            by_ratio = np.where(free >= held, np.where(ratios < delta, -a * ratios, 0.0), 0.0)
            stopped += (by_ratio == 0).sum()
            weight = WEIGHTS[how](n)
            d = new[i] - stats["ref_logprobs"][i]
            total += (
                weight * (stats["importance"][i] * np.maximum(free, held) + 0.3 * (np.exp(-d) - 1 + d)).sum()
            )
            slope = shares[ratio].T @ (stats["importance"][i] * by_ratio) + 0.3 * (1 - np.exp(-d))
            slopes.append(weight * slope)
        assert 0 < stopped < sum(LENGTHS)
        parts = [[0, 2], [1, 3]]
        batches = micro_batches(chosen, made, stats, parts)
        loss = grpo.policy_loss(chosen)
        assert model.evaluate(loss, batches)["loss"] == pytest.approx(total, rel=1e-4, abs=1e-6), how

        def by_slopes(m, batch):
            values = m.logprobs(batch, TEMPERATURE) * batch.extra["slope"]
            return (values * batch.mask).sum(), {}

        found = model.gradient(loss, batches)
        wanted = model.gradient(by_slopes, micro_batches(chosen, made, {"slope": slopes}, parts))
        scale = max(np.abs(g).max() for g in wanted.values())
        assert scale > 1e-4
        for name in wanted:
            assert np.abs(found[name] - wanted[name]).max() < 1e-4 * scale, (how, name)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_update_is_reinforce(engine, random_gpt2, rows_file, counting, tmp_path):
    """At a ratio of 1 the gradient is that of -A log pi."""
    model = engines.get(engine).load(random_gpt2)
    made = completions()
    chosen = load(random_gpt2, rows_file, counting, tmp_path, f"rollout.temperature={TEMPERATURE}")
    new = [logprobs(model, c.example) for c in made]
    stats = {
        "old_logprobs": new,
        "advantages": [np.full(n, a) for n, a in zip(LENGTHS, (1, -1, 0.5, -0.5), strict=True)],
    }
    batches = micro_batches(chosen, made, stats, [[0, 1, 2, 3]])

    def reinforce(m, batch):
        values = -batch.extra["advantages"] * m.logprobs(batch, TEMPERATURE)
        return (values * batch.mask * batch.weight).sum() / batch.total, {}

    found = model.gradient(grpo.policy_loss(chosen), batches)
    wanted = model.gradient(reinforce, batches)
    scale = max(np.abs(g).max() for g in wanted.values())
    assert scale > 1e-3
    assert all(np.abs(found[n] - wanted[n]).max() < 1e-4 * scale for n in wanted)


# Whole runs


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", grpo.PRESETS)
def test_every_preset_begins_at_a_ratio_of_one(engine, preset, random_gpt2, rows_file, counting, tmp_path):
    more = ["train.steps=1", "kl.beta=0.1", "adapter={rank: 4}", f"grpo.preset={preset}", f"engine={engine}"]
    _, done = run(random_gpt2, rows_file, counting, tmp_path / "run", *more)
    (first,) = steps(done)
    # 16 answers in steps of 8: the first update's ratio is 1, the second's is not.
    assert first["updates"] == 2 and first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["val/ratio"] == pytest.approx(1.0, abs=0.2) and first["entropy"] > 1
    assert first["sampling/sampling_logp_difference/max"] < 1e-3
    assert 0 <= first["frac_reward_zero_std"] <= 1 and first["completions/max_length"] <= 8
    assert ("groups_drawn_again" in first) == (preset == "dapo")
    assert ("kl" in first) == (preset not in ("rloo", "reinforce_pp"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_one_update_has_a_ratio_of_one(engine, random_gpt2, rows_file, counting, tmp_path):
    more = ["train.steps=1", "train.batch_size=16", "rollout.temperature=0.7", f"engine={engine}"]
    _, done = run(random_gpt2, rows_file, counting, tmp_path / "run", *more)
    (first,) = steps(done)
    assert first["updates"] == 1 and first["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["loss/policy_avg"] == pytest.approx(0.0, abs=1e-5)
    assert first["clip_ratio/region_mean"] == 0 and first["policy/approxkl_avg"] < 1e-9
    assert 0 < first["sampling/sampling_logp_difference/mean"] < 1e-3
    assert "objective/kl" not in first and "kl" not in first  # no penalty, so no reference

    # The update is that of log-probabilities measured before it, which a cap on importance asks for.
    _, measured = run(random_gpt2, rows_file, counting, tmp_path / "other", *more, "grpo.importance_cap=9")
    (other,) = steps(measured)
    for name in ("policy/grad_norm", "entropy", "objective/entropy", "reward"):
        assert first[name] == pytest.approx(other[name], rel=1e-4)
    assert other["sampling/sampling_logp_difference/max"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in (1, 2))])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[pytest.mark.exhaustive] * (p != "grpo")) for p in grpo.PRESETS]
)
def test_a_reward_for_one_letter_is_learned(engine, preset, seed, random_gpt2, rows_file, counting, tmp_path):
    more = ["train.steps=25", "rollout.prompts=16", "train.eval_every=25", "train.lr=3e-3"]
    more += ["train.schedule=constant"]
    more += [f"grpo.preset={preset}", f"engine={engine}", f"seed={seed}", "train.grad_accumulation=8"]
    _, done = run(random_gpt2, rows_file, counting, tmp_path / "run", *more)
    rewards = [r["reward"] for r in steps(done)]
    assert np.mean(rewards[-4:]) > 2 * np.mean(rewards[:2]) + 0.5, rewards


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "more",
    [
        ["grpo.preset=dapo", "grpo.epochs=2", "kl.beta=0.1"],
        ["grpo.preset=reinforce_pp", "grpo.momentum=0.5", "kl.beta=0.1", "kl.controller=adaptive"],
        ["grpo.baseline=greedy", "grpo.scale=none", "adapter={rank: 4}"],
    ],
)
def test_resume_is_exact(engine, more, random_gpt2, rows_file, counting, tmp_path):
    args = (random_gpt2, rows_file, counting)
    _, whole = run(*args, tmp_path / "whole", f"engine={engine}", *more)
    broken = tmp_path / "broken"
    shutil.copytree(whole.folder, broken)
    shutil.rmtree(broken / "final")
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    _, continued = run(*args, broken, f"engine={engine}", *more, resume=True)
    assert steps(continued) == steps(whole) and len(steps(whole)) == 4
    assert helpers.same_weights(whole.folder, broken)


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_other_models_and_columns(kind, random_gpt2, counting, tmp_path):
    """A random Qwen2 and a random Llama folder, LoRA on default targets, a CSV with its own column names."""
    case = next(case for case in architectures.CASES if case.kind == kind)
    sized = architectures.Case(kind, case.about, case.settings | {"vocab_size": 400})
    architectures.build(sized, tmp_path / "model")
    copy_tokenizer(random_gpt2, tmp_path / "model")
    (tmp_path / "mine.csv").write_text("\n".join(["ask,note", *(f"Say {n}?,x" for n in range(24))]) + "\n")
    more = [
        "data.columns={prompt: ask}",
        "adapter={rank: 4}",
        "kl.beta=0.1",
        "train.steps=2",
        "train.lr=1e-4",
    ]
    found = []
    for engine in ENGINES:
        given = (tmp_path / "model", tmp_path / "mine.csv", counting, tmp_path / engine)
        _, done = run(*given, f"engine={engine}", *more)
        found.append(steps(done))
    for ours, theirs in zip(*found, strict=True):
        for key in ("reward", "tokens", "entropy", "objective/kl", "loss/policy_avg"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-3), key


class Recorded:
    """A scorer that gives each answer the share of a letter in it."""

    entries = ("x",)

    def __call__(self, made):
        return np.array([sum(t % 7 == 0 for t in c.tokens) / 2 for c in made])


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs mlx and torch")
@pytest.mark.parametrize("preset", grpo.PRESETS)
def test_recorded_rollouts_give_equal_losses_on_both_engines(
    preset, random_gpt2, rows_file, counting, tmp_path
):
    """Ten updates of the same completions."""
    more = (f"grpo.preset={preset}", "kl.beta=0.1", "train.lr=1e-4", "grpo.epochs=2")
    chosen = load(random_gpt2, rows_file, counting, tmp_path, *more)
    curves = []
    for name in ENGINES:
        engine = engines.get(name)
        policy = engine.load(random_gpt2)
        policy.keep_reference()
        actors = Actors(policy, None, None, Recorded(), Recorded())
        learner = RolloutLearner(
            engine,
            actors,
            grpo.algorithm(chosen),
            chosen,
            RolloutData(train=()),
            "logprobs",
            lambda row: None,
        )
        found = []
        for step in range(5):
            made = completions(step)
            scores, stats = actors.scorer(made), learner._measure(made)
            seen = learner.algorithm.experience(made, scores, stats, 0.1)
            found.append(learner.update(seen, step, 1e-4) | seen.metrics)
        assert sum(f["updates"] for f in found) == 10
        curves.append(found)
    for ours, theirs in zip(*curves, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-4), key


@pytest.mark.parametrize("engine", ENGINES)
def test_sampled_tokens_are_the_trained_ones(engine, random_gpt2, rows_file, counting, tmp_path):
    """Ids and log-probabilities: what decoding recorded is what the training pass reads, at a temperature."""
    model = engines.get(engine).load(random_gpt2)
    prompts = [Prompt((5, 6, 7), "a", {}), Prompt((9,), "b", {})]
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(map(str, tokens)))
    made = rollouts.sample(
        model,
        tokenizer,
        prompts,
        samples=4,
        max_tokens=6,
        temperature=TEMPERATURE,
        stop=None,
        seed=1,
        token_budget=4096,
    )
    assert [c.group for c in made] == [0] * 4 + [1] * 4
    for c in made:
        assert c.example.tokens == c.prompt.tokens + c.tokens
        assert np.array(c.logprobs) == pytest.approx(logprobs(model, c.example), abs=1e-4)


def test_groups_of_equal_scores_make_way_for_other_prompts(
    random_gpt2, rows_file, tmp_path, monkeypatch, counting
):
    """All answers to three of four prompts earn the same; what is trained on comes from the others."""
    chosen = load(random_gpt2, rows_file, counting, tmp_path, "grpo.preset=dapo", "rollout.max_tokens=4")
    data = RolloutData(train=[Prompt((i + 1,), str(i), {}) for i in range(12)])
    asked = []

    class Policy:
        context, shares_prefixes = 64, False

    def sample(model, tokenizer, prompts, *, samples, seed, **settings):
        asked.append([int(p.text) for p in prompts])
        return [
            Completion(p, (7 * (s + 1),), True, str(s), (0.0,), i)
            for i, p in enumerate(prompts)
            for s in range(samples)
        ]

    class Some:
        """Answers differ in score only where the prompt's number is a multiple of 4."""

        entries = ("x",)

        def __call__(self, made):
            return np.array([float(c.text) if int(c.prompt.text) % 4 == 0 else 1.0 for c in made])

        def score(self, made):
            return Scores(self(made), {"some": self(made) * 2})

    monkeypatch.setattr(rollouts, "sample", sample)
    engine = SimpleNamespace(trainer=lambda model, settings: None)
    actors = Actors(Policy(), None, SimpleNamespace(eos_token_id=0), Some(), Some())
    learner = RolloutLearner(
        engine, actors, grpo.algorithm(chosen), chosen, data, None, lambda row: None, stop=0
    )
    made, scores, again = learner._rollout(0, 5)
    assert len(made) == 16 and [c.group for c in made] == list(np.repeat(range(4), 4))
    first = asked[0]
    kept = [i for i, p in enumerate(first) if p % 4 == 0]
    assert all(int(made[4 * i].prompt.text) == first[i] for i in kept)
    assert again == sum(map(len, asked[1:])) and 0 < len(asked) - 1 <= 4
    assert scores.parts["some"].tolist() == (2 * scores.total).tolist()
    scores = scores.total
    mixed = [g for g in range(4) if np.ptp(scores[4 * g : 4 * g + 4]) > 0]
    assert len(mixed) > len(kept)
    assert scores.tolist() == Some()(made).tolist()
    asked.clear()
    repeated, _, _ = learner._rollout(0, 5)
    assert [c.prompt for c in repeated] == [c.prompt for c in made]


def test_each_rewards_own_scores(random_gpt2, rows_file, counting, tmp_path):
    """In the metrics, and beside the answers: the held-out ones and the group that was compared last."""
    repetition = "{function: repetition, args: {n: 2}, weight: 0.5}"
    both = f"reward=[{{function: {json.dumps(counting)}}}, {repetition}]"
    _, done = run(random_gpt2, rows_file, counting, tmp_path / "run", both, "train.steps=2")
    first = steps(done)[0]
    parts = {name: first[f"rewards/{name}/mean"] for name in ("reward", "repetition")}
    assert first["reward"] == pytest.approx(parts["reward"] + 0.5 * parts["repetition"])
    assert first["rewards/reward/std"] > 0
    samples = helpers.read_jsonl(done.folder / "samples.jsonl")
    trained = [s for s in samples if s.get("split") == "train"]
    assert len(trained) == 4 and len({s["prompt"] for s in trained}) == 1
    for s in samples:
        assert s["score"] == pytest.approx(s["rewards"]["reward"] + 0.5 * s["rewards"]["repetition"])


def test_a_step_without_a_finished_answer_changes_nothing(random_gpt2, rows_file, counting, tmp_path):
    more = ["grpo.mask_unfinished=true", "rollout.max_tokens=1", "train.steps=1"]
    _, done = run(random_gpt2, rows_file, counting, tmp_path / "run", *more)
    (first,) = steps(done)
    assert first["updates"] == 0 and first["completions/clipped_ratio"] == 1
    untrained, trained = (engines.get(ENGINES[0]).load(folder) for folder in (random_gpt2, done.final))
    tokens = np.array([[5, 6, 7]], np.int32)
    assert np.array_equal(untrained.full_logits(tokens), trained.full_logits(tokens))


def test_the_sentence_about_equal_rewards(random_gpt2, rows_file, tmp_path, capfd):
    path = tmp_path / "same.py"
    path.write_text("def reward(prompts, completions, **columns):\n    return [1.0 for c in completions]\n")
    run(random_gpt2, rows_file, f"{path}:reward", tmp_path / "run")
    said = capfd.readouterr().err
    assert "one update a step" not in said
    assert said.count("all 4 answers of 4 of 4 prompts earn the same reward") == 2  # after steps 1 and 3
    assert "a loss near 0 at the first update of a step is expected" in said


@pytest.mark.parametrize(
    "override, message",
    [
        ("rollout.samples=1", "rollout.samples=1 leaves nothing to compare"),
        ("grpo={baseline: greedy, scale: group}", "grpo.scale=group with grpo.baseline=greedy"),
        ("grpo={preset: dr_grpo, std_eps: 0.1}", "belong to a grpo.scale other than none"),
        ("grpo={preset: dapo, delta: 1.2}", r"grpo.delta=1.2 is not above 1 \+ clip_high = 1.28"),
        ("kl={place: reward, beta: 0.1}", "kl.place=reward with grpo.scale=group"),
        ("kl.place=reward", "kl.place and kl.estimator belong to a penalty"),
        ("grpo.entropy_coef=-1", "entropy_coef"),
        ("grpo.momentum=0.5", "grpo.momentum belongs to grpo.baseline=global"),
        ("grpo.overlong_buffer=9", "grpo.overlong_buffer=9 is longer than rollout.max_tokens=8"),
        ("grpo.preset=ppo", "grpo.preset"),
        ("grpo.advantages=x", "unknown key"),
        ("kl.controller=adaptive", "kl.controller=adaptive follows kl.beta"),
        ("critic.kind=shared", "unknown key"),
    ],
)
def test_settings_that_cannot_be(override, message, random_gpt2, rows_file, counting, tmp_path):
    with pytest.raises(UserError, match=message):
        load(random_gpt2, rows_file, counting, tmp_path, override)


def test_the_estimator_belongs_to_the_loss(random_gpt2, rows_file, counting, tmp_path):
    with pytest.raises(UserError, match=r"kl.estimator belongs to kl.place=loss"):
        more = ("grpo.preset=rloo", "kl.estimator=k2", "kl.beta=0.1")
        load(random_gpt2, rows_file, counting, tmp_path, *more)
    with pytest.raises(UserError, match=r"one answer a step has nothing to be compared with"):
        more = ("grpo.preset=reinforce_pp", "rollout.samples=1", "rollout.prompts=1")
        load(random_gpt2, rows_file, counting, tmp_path, *more)


#: What each preset makes of scores 0, 1, 5 and 2, 2, 2 (three answers to each of two prompts).
STD, ALL = np.sqrt(7), np.sqrt(14 / 5)
GAINS = {
    "grpo": [-2 / STD, -1 / STD, 3 / STD, 0, 0, 0],
    "dr_grpo": [-2, -1, 3, 0, 0, 0],
    "dapo": [-2 / STD, -1 / STD, 3 / STD, 0, 0, 0],
    "gspo": [-2 / STD, -1 / STD, 3 / STD, 0, 0, 0],
    "rloo": [-3, -1.5, 4.5, 0, 0, 0],
    "reinforce_pp": [-2 / ALL, -1 / ALL, 3 / ALL, 0, 0, 0],
}
REST = {  # ratio, clip, aggregation, groups drawn again, place of KL
    "grpo": ("token", 0.2, 0.2, "seq-mean-token-mean", 0, "loss"),
    "dr_grpo": ("token", 0.2, 0.2, "seq-mean-token-sum-norm", 0, "loss"),
    "dapo": ("token", 0.2, 0.28, "token-mean", 4, "loss"),
    "gspo": ("sequence", 3e-4, 4e-4, "seq-mean-token-mean", 0, "loss"),
    "rloo": ("sequence_sum", 0.2, 0.2, "seq-mean-token-mean", 0, "reward"),
    "reinforce_pp": ("token", 0.2, 0.2, "token-mean", 0, "reward"),
}


def gains_of(*overrides: str, beta: float = 0.0, **given) -> list[float]:
    """The advantages that a recipe's own experience makes of those scores; answers of 1, 2 and 3 tokens."""
    chosen = methods.load_recipe("10_grpo", ["grpo.std_eps=1e-9", "rollout.max_tokens=3", *overrides])
    made = [
        Completion(Prompt((1,), "q", {}), (5,) * (1 + i % 3), i % 3 < 2, "a", (-0.5,) * (1 + i % 3), i // 3)
        for i in range(6)
    ]
    stats = {"old_logprobs": [np.full(len(c.tokens), -1.0) for c in made]}
    stats["ref_logprobs"] = [np.full(len(c.tokens), -2.0) for c in made]
    scores = np.array([0.0, 1.0, 5.0, 2.0, 2.0, 2.0])
    found = grpo.algorithm(chosen).experience(made, scores, stats, beta, **given)
    assert ("importance" in found.stats) == any("importance_cap" in o for o in overrides)
    return [float(row[0]) for row in found.stats["advantages"]]


@pytest.mark.parametrize("preset", grpo.PRESETS)
def test_what_a_preset_means(preset):
    eps = ["grpo.std_eps=0.0001"] if preset in ("dr_grpo", "rloo") else []  # the default: it divides nothing
    assert gains_of(f"grpo.preset={preset}", *eps) == pytest.approx(GAINS[preset], rel=1e-6)
    chosen = methods.load_recipe("10_grpo", [f"grpo.preset={preset}"])
    s, made = chosen.settings, grpo.algorithm(chosen)
    assert (s.ratio, s.clip_low, s.clip_high, s.aggregation, s.resample, s.place) == REST[preset]
    assert (made.aggregation, made.resample) == (s.aggregation, s.resample)


def test_what_a_key_means():
    plain = ["grpo.preset=dr_grpo", "grpo.std_eps=0.0001"]
    assert gains_of("grpo.std_ddof=0")[2] == pytest.approx(3 / np.sqrt(14 / 3))
    # the third answer of each did not end
    unfinished = gains_of(*plain, "rollout.missing_eos_penalty=3")
    assert unfinished == pytest.approx([-1, 0, 1, 1, 1, -2])
    assert gains_of(*plain, "rollout.missing_eos_score=-1", "rollout.missing_eos_penalty=null") == (
        pytest.approx([0, 1, -1, 1, 1, -2])
    )
    # of at most 3 tokens the last costs 1
    assert gains_of(*plain, "grpo.overlong_buffer=1") == pytest.approx(
        [-5 / 3, -2 / 3, 7 / 3, 1 / 3, 1 / 3, -2 / 3]
    )
    assert len(gains_of(*plain, "grpo.mask_unfinished=true")) == 4
    assert len(gains_of(*plain, "grpo.importance_cap=2")) == 6
    # beta .5 times one nat a token
    assert gains_of(*plain, "kl.place=reward", "kl.beta=0.5", beta=0.5) == (
        pytest.approx([-2 + 0.5, -1, 3 - 0.5, 0.5, 0, -0.5])
    )
    assert gains_of(*plain, "kl.beta=0.5", beta=0.5) == [-2, -1, 3, 0, 0, 0]
    moved = gains_of(*plain, "grpo.baseline=global", "grpo.scale=none", "grpo.momentum=0.5", moving=4.0)
    assert moved == pytest.approx([-3, -2, 2, -1, -1, -1])
    for baseline, scale in (("global", "batch"), ("greedy", "none")):
        chosen = methods.load_recipe("10_grpo", [f"grpo.baseline={baseline}"])
        assert chosen.settings.scale == scale and grpo.algorithm(chosen).greedy == (baseline == "greedy")
    chosen = methods.load_recipe("10_grpo", ["grpo.preset=dapo", "grpo.clip_high=0.4"])
    assert (chosen.settings.clip_high, chosen.penalised, grpo.METHOD.reference(chosen)) == (0.4, False, None)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_entropy_bonus_and_a_beta_for_each_token(engine, random_gpt2, rows_file, counting, tmp_path):
    model = engines.get(engine).load(random_gpt2)
    made, more = completions(), [f"rollout.temperature={TEMPERATURE}", "kl.beta=0.3"]
    new = [logprobs(model, c.example) for c in made]
    betas = (0.1, 0.9, 0.0, 0.4)
    stats = {
        "old_logprobs": new,
        "ref_logprobs": [p - 0.3 for p in new],
        "advantages": [np.zeros(n) for n in LENGTHS],
        "beta": [np.full(n, beta) for n, beta in zip(LENGTHS, betas, strict=True)],
    }
    found = {}
    for coefficient in (0.0, 0.5):
        chosen = load(random_gpt2, rows_file, counting, tmp_path, *more, f"grpo.entropy_coef={coefficient}")
        batches = micro_batches(chosen, made, stats, [[0, 1], [2, 3]])
        found[coefficient] = model.evaluate(grpo.policy_loss(chosen), batches)
    k3 = np.exp(-0.3) - 1 + 0.3
    assert found[0.0]["loss"] == pytest.approx(np.mean(betas) * k3, rel=1e-3)
    assert found[0.0]["kl"] == pytest.approx(k3, rel=1e-3)
    by_answer = [entropy_of(model, c.example).mean() for c in made]
    gap = found[0.0]["loss"] - found[0.5]["loss"]
    assert gap == pytest.approx(0.5 * np.mean(by_answer), rel=1e-3)
    tokens = np.concatenate([entropy_of(model, c.example) for c in made])
    assert found[0.0]["entropy"] == pytest.approx(tokens.mean(), rel=1e-3)


def entropy_of(model, example: Example) -> np.ndarray:
    """Entropy in nats before each trained token, from the whole matrix of logits."""
    logits = np.asarray(model.full_logits(np.array([example.tokens], np.int32))[0], np.float64) / TEMPERATURE
    log_p = logits - np.log(np.exp(logits - logits.max()).sum(-1, keepdims=True)) - logits.max()
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    return np.array([entropy[t - 1] for t in range(1, len(example.tokens)) if example.trained[t]])


def test_greedy_answers_are_greedy_and_of_each_prompt(
    random_gpt2, rows_file, counting, tmp_path, monkeypatch
):
    chosen = load(random_gpt2, rows_file, counting, tmp_path, "grpo.baseline=greedy")
    asked = {}

    def sample(model, tokenizer, prompts, *, samples, temperature, **settings):
        asked.update(prompts=[p.text for p in prompts], samples=samples, temperature=temperature)
        return [Completion(p, (7,), True, "e" * int(p.text), (0.0,), i) for i, p in enumerate(prompts)]

    monkeypatch.setattr(rollouts, "sample", sample)
    scorer = SimpleNamespace(__call__=None)
    actors = Actors(
        SimpleNamespace(), None, SimpleNamespace(eos_token_id=0), lambda made: np.arange(4.0), scorer
    )
    engine = SimpleNamespace(trainer=lambda model, settings: None)
    data = RolloutData(train=())
    learner = RolloutLearner(
        engine, actors, grpo.algorithm(chosen), chosen, data, None, lambda row: None, stop=0
    )
    prompts = [Prompt((i,), str(i), {}) for i in range(4)]
    learner._last = [
        Completion(p, (1,), True, "", (0.0,), i) for i, p in enumerate(prompts) for _ in range(4)
    ]
    found = learner._greedy(3)
    assert asked == {"prompts": ["0", "1", "2", "3"], "samples": 1, "temperature": 0.0}
    assert [score for _, score in found] == [0, 1, 2, 3]


def test_the_adaptive_penalty_moves(random_gpt2, rows_file, counting, tmp_path):
    more = ["kl.beta=0.1", "kl.controller=adaptive", "kl.target=0.001", "kl.horizon=20"]
    _, done = run(random_gpt2, rows_file, counting, tmp_path / "run", *more)
    betas = [r["beta"] for r in steps(done)]
    assert betas[0] == 0.1 and betas[-1] > 1.2 * betas[1] > 0.09


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trainer_takes_the_loss_compiled(engine, random_gpt2, rows_file, counting, tmp_path):
    """Two steps on batches of one shape: the weights move, and the second step's figures are finite."""
    model = engines.get(engine).load(random_gpt2)
    made = completions()
    chosen = load(random_gpt2, rows_file, counting, tmp_path, "grpo.preset=gspo", "grpo.entropy_coef=0.01")
    stats = {
        "old_logprobs": [logprobs(model, c.example) for c in made],
        "advantages": [np.full(n, a) for n, a in zip(LENGTHS, (1, -1, 0.5, -0.5), strict=True)],
    }
    trainer = engines.get(engine).trainer(model, AdamW())
    batches = micro_batches(chosen, made, stats, [[0, 1, 2, 3]])
    first = trainer.step(grpo.policy_loss(chosen), batches, 1e-3)
    second = trainer.step(grpo.policy_loss(chosen), batches, 1e-3)
    assert np.isfinite(list(second.values())).all() and second["val/ratio"] != first["val/ratio"]
