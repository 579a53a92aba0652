"""What a reference makes of the rows, computed once: the same losses without its blocks, as far as memory is
given.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.config import TrainSection
from mlx_posttrain.data.batches import by_row, collate, with_extra
from mlx_posttrain.data.dataset import Dataset, RowCollator
from mlx_posttrain.data.pairs import PairCollator
from mlx_posttrain.data.types import Example, Pair, Preference
from mlx_posttrain.engines import fused
from mlx_posttrain.engines.base import REFERENCE_HIDDEN, REFERENCE_LOGPROBS, AdamW, AdapterSpec
from mlx_posttrain.methods import sft
from mlx_posttrain.training import setup
from mlx_posttrain.training.reference import GB, Share, cache_hidden_states, cache_logprobs, share

ENGINES = engines.available()


@pytest.fixture(params=ENGINES)
def engine(request):
    return engines.get(request.param)


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(tuple(rng.integers(1, 256, n).tolist()), (False,) * (n // 3) + (True,) * (n - n // 3))
        for n in rng.integers(6, 50, count).tolist()
    ]


def data(epochs: float = 2, **settings) -> Dataset:
    return Dataset(
        examples(11),
        examples(5, seed=1),
        RowCollator(64),
        TrainSection(batch_size=3, grad_accumulation=2, epochs=epochs, **settings),
        0,
    )


def cached(made: Dataset) -> tuple[bool, bool]:
    """Whether the states of training and of held-out rows are cached: of all of them, or of none."""
    states = made.extra.get(REFERENCE_HIDDEN, {})
    parts = [{row in states for row in part} for part in (made.train, made.held_out)]
    assert all(len(part) == 1 for part in parts)
    return parts[0].pop(), parts[1].pop()


def leashed(engine, folder, adapter: bool, dtype: str = "float32"):
    """A model that has left its reference."""
    model = engine.load(folder, dtype=dtype)
    if adapter:
        model.add_adapter(AdapterSpec(rank=4, alpha=8), seed=3)
    model.keep_reference()
    trainer = engine.trainer(model, AdamW(eps=1e-3))
    for _ in range(5):
        trainer.step(sft.loss, [collate(examples(4, seed=2), 64)], 1e-2)
    return model, trainer


def test_what_is_kept_within_a_limit():
    """Rows with 10 and 5 trained tokens at a width of 2^20, so that a token takes 1/256 GB."""
    token = 1 / 256
    row = Example(tuple(range(11)), (True,) * 11)  # the first token is never predicted
    half = Example(tuple(range(11)), (False,) * 6 + (True,) * 5)

    other = Example(tuple(range(1, 12)), (True,) * 11)

    def kept(limit: float, epochs: float = 2.0, held_out=(half,)) -> Share:
        made = Dataset([row], list(held_out), RowCollator(None), TrainSection(epochs=epochs), 0)
        return share(made, 2**20, limit)

    assert kept(15 * token) == Share(True, True, 15 * token, 0)
    assert kept(14 * token) == Share(False, True, 5 * token, 10 * token)
    assert kept(4 * token) == Share(False, False, 0, 15 * token)
    assert kept(0) == Share(False, False, 0, 15 * token)
    # a row that is met once need not be kept
    assert kept(15 * token, epochs=1) == Share(False, True, 5 * token, 0)
    assert kept(15 * token, held_out=()) == Share(True, False, 10 * token, 0)
    assert kept(10 * token, held_out=(row, other)) == Share(True, False, 10 * token, 20 * token)
    # equal rows have equal states, which are there once
    assert kept(10 * token, held_out=(other, other)) == Share(False, True, 10 * token, 10 * token)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_each_row_has_its_own_states_whenever_they_are_computed(engine, random_gpt2, adapter):
    model, trainer = leashed(engine, random_gpt2, adapter)
    made = data()
    cache_hidden_states(model, made, 1.0)
    found = made.extra[REFERENCE_HIDDEN]
    assert set(found) == {*made.train, *made.held_out}
    for example, states in found.items():
        alone = model.reference_hidden(collate([example], 64))
        assert (
            states.shape == (sum(example.trained[1:]), model.reference_width) and states.dtype == np.float32
        )
        assert states == pytest.approx(alone[: len(states)], abs=1e-5)
    for step in range(2):
        trainer.step(sft.loss, made.micro_batches(made.rows(step)), 1e-2)
    again = data()
    cache_hidden_states(model, again, 1.0)
    assert all(np.array_equal(again.extra[REFERENCE_HIDDEN][row], states) for row, states in found.items())


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_losses_gradients_and_weights_are_those_without_a_cache(
    engine, random_gpt2, adapter, direction, monkeypatch
):
    """AdamW's eps is large, or rounding of tiny gradients would become whole steps."""
    monkeypatch.setattr(fused, "CHUNK_BYTES", 50 * 400 * 4)
    loss = sft.kl_loss(0.3, direction)
    curves, gradients, weights = [], [], []
    for limit in (1.0, 0.0):
        model, trainer = leashed(engine, random_gpt2, adapter)
        made = data()
        cache_hidden_states(model, made, limit)
        assert cached(made) == (bool(limit), bool(limit))
        gradients.append(model.gradient(loss, made.micro_batches(made.rows(1))))
        curves.append(
            [trainer.step(loss, made.micro_batches(made.rows(step)), 3e-3) for step in range(made.steps)]
        )
        curves[-1].append(model.evaluate(loss, made.evaluation()))
        weights.append(model.weights())
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert curves[0][0]["kl"] > 1e-3
    for name, wanted in gradients[1].items():
        assert np.abs(gradients[0][name] - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max()), name
    for name, wanted in weights[1].items():
        assert np.abs(weights[0][name] - wanted).max() <= 1e-5, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_lose_nothing_on_the_host(engine, random_gpt2, dtype):
    model, _ = leashed(engine, random_gpt2, True, dtype)
    batch = collate(examples(4), 64)
    carrying = with_extra(batch, {REFERENCE_HIDDEN: by_row(batch, model.reference_hidden(batch))})
    asked, kept = model.apply(lambda m, b: {"kl": m.logprobs_and_kl(b, "forward")[1]}, [batch, carrying])
    real = batch.mask > 0
    assert np.array_equal(asked["kl"][real], kept["kl"][real]) and asked["kl"][real].max() > 1e-4


def watch_blocks(model, monkeypatch) -> list:
    """A list that grows by a block each time one runs, or is traced."""
    ran: list = []
    if type(model).__name__ == "TorchModel":
        for net in (model.net, model._reference):
            for block in net.transformer.h if net is not None else ():
                block.register_forward_pre_hook(lambda block, _: ran.append(block))
        return ran
    for block in {
        type(b): b for net in (model.net, model._reference) if net is not None for b in net.model.h
    }.values():
        original = type(block).__call__

        def call(self, *args, original=original, **kwargs):
            ran.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(type(block), "__call__", call)
    return ran


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_references_blocks_run_no_more(engine, random_gpt2, adapter, monkeypatch):
    """In training, traced or not, and in evaluations; with an adapter the policy's own blocks are the
    reference's.
    """
    counts = []
    for limit in (1.0, 0.0):
        with monkeypatch.context() as patch:
            model, trainer = leashed(engine, random_gpt2, adapter)
            made = data()
            cache_hidden_states(model, made, limit)
            ran = watch_blocks(model, patch)
            loss = sft.kl_loss(0.3, "forward")
            for step in range(made.steps):
                trainer.step(loss, made.micro_batches(made.rows(step)), 1e-3)
            model.evaluate(loss, made.evaluation())
            own = (model.net.model if engine.name == "mlx" else model.net.transformer).h
            counts.append((len(ran), sum(any(b is o for o in own) for b in ran)))
    (fewer, fewer_own), (plain, plain_own) = counts
    assert fewer > 0 and plain == 2 * fewer
    assert fewer_own == fewer
    assert plain_own == (plain if adapter else fewer)


@pytest.mark.parametrize(("epochs", "training"), [(1, False), (2, True)])
def test_training_rows_are_kept_when_they_are_met_again(random_gpt2, epochs, training, capsys):
    model, _ = leashed(engines.get(ENGINES[0]), random_gpt2, True)
    made = data(epochs)
    cache_hidden_states(model, made, 1.0)
    assert cached(made) == (training, True)
    assert [REFERENCE_HIDDEN in b.extra for b in made.micro_batches(made.rows(0))] == [training] * 2
    assert all(b.extra[REFERENCE_HIDDEN].shape == (len(b.index), 64) for b in made.evaluation())
    assert "computed once and kept" in capsys.readouterr().err


def test_what_does_not_fit_is_said_and_computed_anew(random_gpt2, capsys):
    model, trainer = leashed(engines.get(ENGINES[0]), random_gpt2, True)
    made = data()
    cache_hidden_states(model, made, (share(made, 64, 1.0).gb * GB - 1) / GB)
    assert cached(made) == (False, True)
    assert "GB of hidden states are beyond kl.cache_gb=" in capsys.readouterr().err
    trainer.step(sft.kl_loss(0.3, "forward"), made.micro_batches(made.rows(0)), 1e-3)
    made = data()
    cache_hidden_states(model, made, 0.0)
    assert cached(made) == (False, False) and not capsys.readouterr().err


def test_a_head_that_is_not_one_plain_matrix_goes_without(engine, random_gpt2, capsys):
    model, trainer = leashed(engine, random_gpt2, True)
    model._split = False
    made = data()
    cache_hidden_states(model, made, 1.0)
    assert cached(made) == (False, False) and not capsys.readouterr().err
    assert np.isfinite(
        trainer.step(sft.kl_loss(0.3, "forward"), made.micro_batches(made.rows(0)), 1e-3)["loss"]
    )


def test_a_run_says_and_plans_it(random_gpt2, rows_file, tmp_path, capsys, monkeypatch):
    """40 rows, 6 of them held out, twice; the rows' states at a width of 64. What it takes to compute them
    counts in the run's peak.
    """
    happened = []
    engine, keep = type(engines.get("auto")), setup.cache_hidden_states
    reset = engine.reset_memory
    monkeypatch.setattr(engine, "reset_memory", lambda self: (happened.append("reset"), reset(self))[1])
    monkeypatch.setattr(
        setup, "cache_hidden_states", lambda *given: (happened.append("cache"), keep(*given))[1]
    )
    chosen = methods.load_recipe(
        "06_kl_sft",
        [
            f"model={random_gpt2}",
            f"data.source={rows_file}",
            "data.limit=null",
            "data.holdout=6",
            f"output={tmp_path / 'run'}",
            "train.epochs=2",
            "sample.count=0",
            "data.clean=null",
        ],
    )
    (planned,) = methods.plan(chosen)
    methods.run(chosen)
    assert happened == ["reset", "cache"]
    said = capsys.readouterr().err
    assert (
        f"reference: {planned.parts['kept states']:.3g} GB of hidden states are computed once and kept"
        in said
    )
    # A row at a time and none held out, no pass without gradients is the peak: what differs is what is kept.
    few = [
        f"model={random_gpt2}",
        f"data.source={rows_file}",
        "data.limit=null",
        "data.holdout=0",
        "train.batch_size=1",
        "data.clean=null",
    ]
    (kept,), (without,) = (
        methods.plan(methods.load_recipe("06_kl_sft", [*few, f"kl.cache_gb={gb}"])) for gb in (1, 0)
    )
    assert (
        kept.total_gb - without.total_gb == pytest.approx(kept.parts["kept states"])
        and kept.phase == without.phase
    )
    assert kept.parts["kept states"] > 0 == without.parts["kept states"]


def pairs() -> Dataset:
    """Five prompts with one, two or three pairs of answers to each; rows are part of several pairs."""
    rng = np.random.default_rng(5)
    row = Preference((), "", "")

    def answer(prompt: tuple[int, ...], length: int) -> Example:
        tokens = (*prompt, *rng.integers(1, 256, length).tolist())
        return Example(tokens, (False,) * len(prompt) + (True,) * length)

    made = []
    for number in range(5):
        prompt = tuple(rng.integers(1, 256, 3 + 4 * number).tolist())
        best, *others = (answer(prompt, n) for n in rng.integers(1, 20, 2 + number % 3).tolist())
        made += [Pair(best, other, number, row) for other in others]
    groups = [pair.prompt for pair in made[:-1]]
    settings = TrainSection(batch_size=2, grad_accumulation=2)
    return Dataset(made[:-1], made[-1:], PairCollator(0, 64, score=False), settings, 0, groups)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("make", [data, pairs], ids=["rows", "pairs"])
def test_cached_logprobs_are_those_of_the_model_before_training(engine, random_gpt2, make, adapter, tmp_path):
    """Of every trained token, whatever else is in its batch, and however far the policy has moved."""
    model, trainer = leashed(engine, random_gpt2, adapter)
    made, first = make(), engine.load(random_gpt2)
    kept = tmp_path / "reference.safetensors"
    assert cache_logprobs(made, kept, "start", lambda: first) < 1e-3
    batches = [b for step in range(made.steps) for b in made.micro_batches(made.rows(step))]
    batches += made.evaluation()
    for _ in range(3):
        trainer.step(sft.loss, batches[:1], 1e-2)
    asked = model.apply(lambda m, b: {"reference": m.reference_logprobs(b), "policy": m.logprobs(b)}, batches)
    plain = first.token_logprobs(batches)
    assert len(batches) > 2 and {len(b.tokens) for b in batches} != {1}
    for batch, found, alone in zip(batches, asked, plain, strict=True):
        cached, real = batch.extra[REFERENCE_LOGPROBS], batch.mask > 0
        assert cached.shape == batch.mask.shape and cached.dtype == np.float32
        assert cached[real] == pytest.approx(found["reference"][real], abs=1e-5)
        assert cached[real] == pytest.approx(alone[real], abs=1e-5)
        assert not cached[~real].any() and cached[real].max() < 0
        assert np.abs(cached[real] - found["policy"][real]).max() > 0.1
    again, computed = make(), []
    assert cache_logprobs(again, kept, "start", lambda: pytest.fail("they are in the file")) is None
    for example, values in made.extra[REFERENCE_LOGPROBS].items():
        assert np.array_equal(again.extra[REFERENCE_LOGPROBS][example], values)
    cache_logprobs(again, kept, "another model", lambda: computed.append(1) or first)
    assert computed == [1]


def test_evaluations_take_four_times_a_steps_budget():
    made = data(token_budget=64)
    sizes = [b.tokens.size for b in made.evaluation()]
    assert 64 < max(sizes) <= 4 * 64
    assert max(b.tokens.size for step in range(made.steps) for b in made.micro_batches(made.rows(step))) <= 64


def test_scoring_is_bounded_by_tokens(monkeypatch):
    from mlx_posttrain.rewards import scorer as scoring

    monkeypatch.setattr(scoring, "TOKEN_BUDGET", 64)
    seen = []

    def apply(function, batches):
        seen.extend(b.tokens.shape for b in batches)
        return [{"scores": b.tokens[:, 0]} for b in batches]

    rows = [[number] * length for number, length in enumerate([5, 40, 6, 7, 8, 3, 9], start=1)]
    found = scoring.score_rows(SimpleNamespace(shares_prefixes=False, apply=apply, context=64), rows, 0)
    assert found.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert seen == [(5, 8), (1, 16), (1, 40)]
