"""One step's updates: PPO's losses of a real model against NumPy, and what the optimizers are handed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data import batches, pairs
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import initial_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import ppo
from mlx_posttrain.rl import rollouts
from mlx_posttrain.rl.experience import Actors, Experience
from mlx_posttrain.rl.learner import RolloutData, RolloutLearner
from mlx_posttrain.rl.rollouts import Completion, Prompt

ENGINES = engines.available()
LENGTHS = [3, 6, 1, 4]
TEMPERATURE, CLIP, VALUE_CLIP, VF, PTX = 0.7, 0.2, 0.15, 0.3, 2.5


def load(*overrides: str):
    return methods.load_recipe(
        "07_ppo",
        [
            "reward=[{function: checker}]",
            f"rollout.temperature={TEMPERATURE}",
            f"ppo.clip_range={CLIP}",
            f"ppo.clip_range_value={VALUE_CLIP}",
            *overrides,
        ],
    )


def with_ptx() -> str:
    return (
        f"ptx={{coefficient: {PTX}, batch_size: 2, data: {{source: {json.dumps(str(Path('rows.jsonl')))}}}}}"
    )


def rows() -> list[Example]:
    rng = np.random.default_rng(0)
    return [Example(tuple(rng.integers(1, 380, 4 + n).tolist()), (False,) * 4 + (True,) * n) for n in LENGTHS]


def texts() -> list[Example]:
    rng = np.random.default_rng(9)
    return [Example(tuple(rng.integers(1, 380, 7).tolist()), (False,) * 2 + (True,) * 5) for _ in range(2)]


def plain(model, example: Example, temperature: float) -> np.ndarray:
    """Log-probabilities of an example's trained tokens from its whole matrix of logits."""
    logits = np.asarray(model.full_logits(np.array([example.tokens], np.int32))[0], np.float64) / temperature
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.array(
        [logits[t - 1, example.tokens[t]] for t in range(1, len(example.tokens)) if example.trained[t]]
    )


def plain_values(model, example: Example) -> np.ndarray:
    """The head's output before each trained token, from rows that end there."""
    ends = [example.tokens[:t] for t in range(1, len(example.tokens)) if example.trained[t]]
    found = model.apply(lambda m, b: {"v": m.scores(b)}, [pairs.collate_scores(ends, None, 64)])
    return found[0]["v"].astype(np.float64)


def around(present: list[np.ndarray], spread: float, seed: int) -> list[np.ndarray]:
    """Old statistics on both sides of the present ones, some of them out of any clip's range."""
    rng = np.random.default_rng(seed)
    return [p + rng.uniform(-spread, spread, len(p)) for p in present]


def policy_by_hand(
    new: np.ndarray, old: np.ndarray, gain: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, d loss / d new, clipped) of each token, one token at a time."""
    found = []
    for n, o, a in zip(new, old, gain, strict=True):
        ratio = np.exp(n - o)
        stopped = (a > 0 and ratio > 1 + CLIP) or (a < 0 and ratio < 1 - CLIP)
        held = 1 + CLIP if ratio > 1 + CLIP else 1 - CLIP
        found.append((-a * held, 0.0, 1.0) if stopped else (-a * ratio, -a * ratio, 0.0))
    return tuple(np.array(x) for x in zip(*found))  # type: ignore[return-value]


def value_by_hand(
    new: np.ndarray, old: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, d loss / d new, clipped) of each token: where the value held near the old one is the worse of
    the two, it counts.
    """
    found = []
    for v, o, r in zip(new, old, wanted, strict=True):
        held = min(max(v, o - VALUE_CLIP), o + VALUE_CLIP)
        worse = (held - r) ** 2 > (v - r) ** 2
        found.append((0.5 * (held - r) ** 2, 0.0, 1.0) if worse else (0.5 * (v - r) ** 2, v - r, 0.0))
    return tuple(np.array(x) for x in zip(*found))  # type: ignore[return-value]


def prepared(model):
    """Two micro-batches of completions with old statistics around the model's present ones, and everything
    that was put into them by token.
    """
    examples = rows()
    new, values = [plain(model, e, TEMPERATURE) for e in examples], [plain_values(model, e) for e in examples]
    rng = np.random.default_rng(4)
    stats = {
        "old_logprobs": around(new, 0.6, 1),
        "old_values": around(values, 0.5, 2),
        "returns": around(values, 0.6, 3),
        "advantages": [rng.normal(size=n) for n in LENGTHS],
    }
    parts = [[0, 2], [1, 3]]
    made = [
        rollouts.collate_stats([examples[i] for i in p], {n: [v[i] for i in p] for n, v in stats.items()}, 64)
        for p in parts
    ]
    order = [i for p in parts for i in p]
    flat = {
        name: np.concatenate([v[i] for i in order])
        for name, v in {**stats, "new": new, "value": values}.items()
    }
    return made, order, flat


def carrying(made, order, coefficients: dict[str, np.ndarray]):
    """The same micro-batches with one coefficient per token instead of the statistics."""
    ends = np.cumsum([LENGTHS[i] for i in order])[:-1]
    by_row = {name: np.split(values, ends) for name, values in coefficients.items()}
    return [
        batches.with_extra(
            replace(b, extra={}), {name: values[2 * k : 2 * k + 2] for name, values in by_row.items()}
        )
        for k, b in enumerate(made)
    ]


def same_gradient(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    scale = max(np.abs(g).max() for g in wanted.values())
    assert scale > 1e-3
    for name in wanted:
        assert np.abs(found[name] - wanted[name]).max() < 1e-4 * scale, name


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("engine", ENGINES)
def test_policy_loss_of_a_real_model(engine, kind, random_gpt2):
    model = engines.get(engine).load(random_gpt2)
    model.add_head(initial_head(64, 3))
    made, order, flat = prepared(model)
    if kind == "separate":  # the same statistics, and a policy without a head
        model = engines.get(engine).load(random_gpt2)
    shared = kind == "shared"
    loss = ppo.policy_loss(
        load(with_ptx(), f"critic.kind={kind}", *([f"ppo.vf_coef={VF}"] if shared else []))
    )
    beside = replace(batches.collate(texts(), 64), term="ptx")

    policy, slope, clipped = policy_by_hand(flat["new"], flat["old_logprobs"], flat["advantages"])
    value, value_slope, value_clipped = value_by_hand(flat["value"], flat["old_values"], flat["returns"])
    assert 0.1 < clipped.mean() < 0.9 and 0.1 < value_clipped.mean() < 0.9
    ratio = np.exp(flat["new"] - flat["old_logprobs"])
    nll = -np.concatenate([plain(model, e, 1.0) for e in texts()])
    wanted = {
        "loss/policy_avg": policy.mean(),
        "policy/approxkl_avg": 0.5 * ((flat["new"] - flat["old_logprobs"]) ** 2).mean(),
        "policy/clipfrac_avg": clipped.mean(),
        "val/ratio": ratio.mean(),
        "ratio_squared": (ratio**2).mean(),
        "loss/ptx_avg": nll.mean(),
    }
    total = policy.mean() + PTX * nll.mean()
    if shared:
        wanted |= {"loss/value_avg": value.mean(), "val/clipfrac_avg": value_clipped.mean()}
        total += VF * value.mean()
    found = model.evaluate(loss, [*made, beside])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert found["loss"] == pytest.approx(total, rel=1e-4)
    assert found["policy/entropy_avg"] > 1
    assert ("loss/value_avg" in found) == shared

    # The gradient is that of the tokens' log-probabilities and values, each times the slope found by hand.
    def by_slopes(m, batch):
        if "slope" not in batch.extra:
            return PTX * (-m.logprobs(batch) * batch.mask).sum() / batch.total, {}
        terms = m.logprobs(batch, TEMPERATURE) * batch.extra["slope"]
        if shared:
            terms = terms + VF * m.scores(batch) * batch.extra["value_slope"]
        return (terms * batch.mask).sum() / batch.total, {}

    slopes = carrying(made, order, {"slope": slope, "value_slope": value_slope})
    same_gradient(model.gradient(loss, [*made, beside]), model.gradient(by_slopes, [*slopes, beside]))
    same_gradient(model.gradient(loss, made), model.gradient(by_slopes, slopes))


@pytest.mark.parametrize("engine", ENGINES)
def test_value_loss_of_a_real_critic(engine, random_gpt2):
    critic = engines.get(engine).load(random_gpt2)
    critic.add_head(initial_head(64, 3))
    made, order, flat = prepared(critic)
    value, slope, clipped = value_by_hand(flat["value"], flat["old_values"], flat["returns"])
    loss = ppo.value_loss(VALUE_CLIP)
    found = critic.evaluate(loss, made)
    wanted = {"loss": value.mean(), "loss/value_avg": value.mean(), "val/clipfrac_avg": clipped.mean()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert 0.1 < clipped.mean() < 0.9

    def by_slopes(m, batch):
        return (m.scores(batch) * batch.extra["slope"] * batch.mask).sum() / batch.total, {}

    same_gradient(
        critic.gradient(loss, made), critic.gradient(by_slopes, carrying(made, order, {"slope": slope}))
    )
    unclipped = critic.evaluate(ppo.value_loss(None), made)
    assert unclipped["loss"] == pytest.approx(0.5 * ((flat["value"] - flat["returns"]) ** 2).mean(), rel=1e-4)
    assert unclipped["val/clipfrac_avg"] == 0


class Recorder:
    """A trainer that only writes down what it is given, and answers with made-up figures."""

    def __init__(self, ratios: list[float] | None = None, approxkl: list[float] | None = None):
        self.calls: list[tuple] = []
        self.ratios, self.approxkl = ratios or [1.0], approxkl or [0.0]

    def step(self, loss, given, lr):
        self.calls.append((loss, list(given), lr))
        which = len(self.calls) - 1
        ratio = self.ratios[which % len(self.ratios)]
        return {
            "loss": 7.0,
            "grad_norm": 1.0,
            "val/ratio": ratio,
            "ratio_squared": ratio**2 + 0.25,
            "policy/approxkl_avg": self.approxkl[which % len(self.approxkl)],
        }


def collected(count: int) -> Experience:
    rng = np.random.default_rng(5)
    made = [
        Completion(Prompt((1, 2 + i), "q", {}), tuple(rng.integers(1, 380, 2 + i % 3).tolist()), True, "a")
        for i in range(count)
    ]
    names = ("old_logprobs", "old_values", "advantages", "returns")
    return Experience(made, {n: [rng.normal(size=len(c.tokens)) for c in made] for n in names}, {})


def prompts_of(trainer: Recorder) -> list[int]:
    """Second prompt token, which numbers the rows, in the order in which they were trained on."""
    return [
        int(row[1]) for _, given, _ in trainer.calls for b in given if b.term != "ptx" for row in b.tokens
    ]


def updated(chosen, step: int = 0, beside=(), **answers) -> tuple[dict[str, float], Recorder, Recorder]:
    """The metrics of one step's updates, and what policy and critic were trained on."""
    trainers = {"policy": Recorder(**answers), "critic": Recorder()}
    engine = SimpleNamespace(trainer=lambda model, settings: trainers[model.name])
    policy, critic = (SimpleNamespace(name=name, context=64, shares_prefixes=False) for name in trainers)
    learner = RolloutLearner(
        engine,
        Actors(policy, critic, None, None, None),
        replace(ppo.algorithm(chosen), loss="policy", value_loss="value"),
        chosen,
        RolloutData(train=(), ptx_examples=beside),
        "logprobs",
        lambda row: None,
    )
    return learner.update(collected(12), step, 2e-3), trainers["policy"], trainers["critic"]


def test_every_epoch_takes_every_completion_once_in_a_new_order():
    chosen = load("ppo.epochs=3", "train.batch_size=2", "train.grad_accumulation=2")
    metrics, policy, critic = updated(chosen)
    order = prompts_of(policy)
    passes = [order[i : i + 12] for i in (0, 12, 24)]
    assert metrics["updates"] == 9 and [len(given) for _, given, _ in policy.calls] == [2] * 9
    assert all(sorted(p) == list(range(2, 14)) for p in passes)
    # Which completions share an optimizer step differs from epoch to epoch and from step to step; sorting by
    # length is not shuffling.
    together = [
        [frozenset(p[i : i + 4]) for i in (0, 4, 8)]
        for p in [*passes, prompts_of(updated(chosen, step=1)[1])[:12]]
    ]
    assert all(a != b for i, a in enumerate(together) for b in together[:i])
    assert prompts_of(updated(chosen)[1]) == order == prompts_of(critic)
    assert {loss for loss, _, _ in policy.calls} == {"policy"} and {loss for loss, _, _ in critic.calls} == {
        "value"
    }


def test_stats_go_with_their_completions():
    chosen = load("ppo.epochs=1", "train.batch_size=3", "train.grad_accumulation=1")
    wanted = collected(12)
    _, policy, _ = updated(chosen)
    for _, given, _ in policy.calls:
        for b in given:
            for name, values in b.extra.items():
                for row, found in zip(b.tokens, batches.by_row(b, values), strict=True):
                    assert found == pytest.approx(wanted.stats[name][int(row[1]) - 2], rel=1e-6), name
            assert b.trained_tokens == sum(
                len(wanted.completions[int(row[1]) - 2].tokens) for row in b.tokens
            )


@pytest.mark.parametrize("own, wanted", [(None, 2e-3), (3e-4, 3e-4 * 2e-3 / 1e-2)])
def test_the_critic_has_its_own_rate_on_the_same_schedule(own, wanted):
    chosen = load("train.lr=1e-2", *([f"critic.lr={own}"] if own else []))
    _, policy, critic = updated(chosen)
    assert {lr for _, _, lr in policy.calls} == {2e-3}
    assert [lr for _, _, lr in critic.calls] == pytest.approx([wanted] * len(critic.calls))


def test_texts_beside_go_to_the_policy_only_and_change_from_update_to_update():
    beside = [Example((300, 301 + i, 302), (False, True, True)) for i in range(8)]
    chosen = load(with_ptx(), "train.batch_size=4", "train.grad_accumulation=1", "ppo.epochs=2")
    _, policy, critic = updated(chosen, beside=beside)
    terms = [[b.term for b in given] for _, given, _ in policy.calls]
    assert terms == [["", "ptx"]] * 6 and all(b.term == "" for _, given, _ in critic.calls for b in given)
    chosen_rows = [frozenset(int(row[1]) for row in given[-1].tokens) for _, given, _ in policy.calls]
    assert all(len(r) == 2 for r in chosen_rows) and len(set(chosen_rows)) > 1


def test_means_over_the_updates_and_an_early_end():
    chosen = load("train.batch_size=4", "train.grad_accumulation=1", "ppo.epochs=2")
    ratios = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8]
    metrics, _, _ = updated(chosen, ratios=ratios)
    mean = np.mean(ratios)
    assert metrics["val/ratio"] == pytest.approx(mean)
    assert metrics["val/ratio_var"] == pytest.approx(np.mean(np.square(ratios)) + 0.25 - mean**2)
    assert metrics["policy/grad_norm"] == metrics["val/grad_norm"] == 1.0
    limited = load("train.batch_size=4", "train.grad_accumulation=1", "ppo.epochs=2", "ppo.target_kl=0.02")
    assert updated(limited, approxkl=[0.0, 0.01, 0.02, 0.03, 0.0])[0]["updates"] == 4
    assert updated(limited, approxkl=[0.01])[0]["updates"] == 6


def test_rows_that_begin_alike_are_together_where_they_share_work():
    rows = [(2, 7, 1, 1, 1, 1), (1, 5), (2, 7, 3), (1, 5, 2, 2, 2)]
    assert batches.group_similar(rows, True, 2, None) == [[1, 3], [0, 2]]
    assert batches.group_similar(rows, False, 2, None) == [[1, 2], [3, 0]]
    # the longest row counts, not the last
    assert batches.group_similar([(2,) * 30, (1,) * 3, (3,) * 2], True, 3, 64) == [[1, 0], [2]]


@pytest.mark.parametrize("shares_prefixes", [False, True])
def test_minibatches_take_every_row_once_within_their_limits(shares_prefixes):
    lengths = [5, 20, 7, 33, 9, 12, 40, 3, 18, 21, 6]
    rows = [tuple(range(n)) for n in lengths]
    limits = {"batch_size": 3, "grad_accumulation": 2, "token_budget": 64, "shares_prefixes": shares_prefixes}
    cut = rollouts.minibatches(rows, **limits, rng=np.random.default_rng(1))
    assert Counter(i for step in cut for part in step for i in part) == Counter(range(11))
    assert [sum(map(len, step)) for step in cut] == [6, 5]
    for part in (part for step in cut for part in step):
        assert len(part) <= 3 and (
            len(part) == 1 or len(part) * batches.round_up(max(lengths[i] for i in part), 8) <= 64
        )
    again = rollouts.minibatches(rows, **limits, rng=np.random.default_rng(1))
    other = rollouts.minibatches(rows, **limits, rng=np.random.default_rng(2))
    assert again == cut != other
    # Steps are drawn at random, not cut from a list that is sorted by length.
    assert max(lengths[i] for part in cut[0] for i in part) > min(lengths[i] for part in cut[1] for i in part)
    assert max(lengths[i] for part in cut[1] for i in part) > min(lengths[i] for part in cut[0] for i in part)


def test_the_mixed_in_rows_add_no_tokens_to_the_vocabulary():
    with pytest.raises(
        UserError, match=r"ptx.*special_tokens here has no effect: name them in the recipe's own"
    ):
        load("ptx={data: {source: rows.jsonl, special_tokens: ['<think>']}}")
