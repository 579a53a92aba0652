"""Mixed precision: float32 weights, gradients and moments around blocks that compute in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_posttrain import engines, methods
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import sft
from mlx_posttrain.models.merge import base_folder
from tests.helpers import read_jsonl, run_recipe

ENGINES = engines.available()


@pytest.fixture(params=ENGINES)
def engine(request) -> Any:
    return engines.get(request.param)


def batches(count: int, vocabulary: int = 300, rows: int = 4, length: int = 40) -> list[Any]:
    rng = np.random.default_rng(0)
    drawn = rng.integers(1, vocabulary, (count, rows, length)).tolist()
    trained = tuple([False] * 10 + [True] * (length - 10))
    return [collate([Example(tuple(row), trained) for row in batch], 64) for batch in drawn]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_every_gradient_points_where_that_of_float32_does(engine, random_gpt2):
    batch = batches(1, rows=16)
    whole, mixed = (engine.load(random_gpt2, mixed=m).gradient(sft.loss, batch) for m in (False, True))
    # the keys' biases move no attention weight: their gradients are 0 up to rounding
    apart = {n: cosine(g, mixed[n]) for n, g in whole.items() if not n.endswith("c_attn.bias")}
    assert whole.keys() == mixed.keys() and min(apart.values()) > 0.99, apart
    assert any(not np.array_equal(whole[n], mixed[n]) for n in whole)


def test_steps_too_small_for_bfloat16_are_not_lost(engine, random_gpt2, tmp_path):
    """At this rate no weight of bfloat16 would move; float32 ones go as far as without mixed precision."""
    models = [engine.load(random_gpt2, mixed=m) for m in (False, True)]
    start = models[0].weights()
    for model in models:
        trainer = engine.trainer(model, AdamW())
        for batch in batches(10):
            trainer.step(sft.loss, [batch], 2e-6)
    for name in start:
        if "c_proj.weight" not in name:
            continue
        exact, found = (model.weights()[name] - start[name] for model in models)
        assert np.abs(exact).mean() > 3e-6 and cosine(exact, found) > 0.95, name
    models[1].save(tmp_path / "saved")
    again = engine.load(random_gpt2, mixed=True)
    again.load_trained(tmp_path / "saved")
    for name, value in models[1].weights().items():
        assert value.dtype == np.float32 and np.array_equal(value, again.weights()[name]), name
    assert np.array_equal(*(m.full_logits(np.arange(1, 30)[None]) for m in (models[1], again)))


def test_ten_steps_lose_what_those_of_float32_do(engine, random_gpt2):
    curves = []
    for mixed in (False, True):
        trainer = engine.trainer(engine.load(random_gpt2, mixed=mixed), AdamW())
        steps = batches(2) * 10
        curves.append([trainer.step(sft.loss, steps[i : i + 2], 1e-3)["loss"] for i in range(10)])
    whole, mixed_curve = map(np.array, curves)
    assert whole[-1] < whole[0] - 0.3
    assert 0 < np.abs(whole - mixed_curve).max() < 0.02


def test_micro_batches_are_summed_in_float32(engine, random_gpt2):
    """A gradient a thousand times as small as that of the first micro-batch must not be rounded away."""
    many = [collate([Example((1, 2, 3, 4), (False, True, True, True))], 64)] * 257
    models = [engine.load(random_gpt2, mixed=m) for m in (False, True)]
    norms = [engine.trainer(m, AdamW()).step(sft.loss, many, 0.0)["grad_norm"] for m in models]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_evaluation_and_reference_compute_as_training_does(engine, random_gpt2):
    """Or every ratio and every divergence would begin with the rounding of bfloat16."""
    model = engine.load(random_gpt2, mixed=True)
    model.keep_reference()
    (batch,) = batches(1)
    found = model.evaluate(sft.kl_loss(0.5, "forward"), [batch])
    assert abs(found["kl"]) < 1e-6
    step = engine.trainer(model, AdamW()).step(sft.kl_loss(0.5, "forward"), [batch], 1e-3)
    assert step["loss"] == pytest.approx(found["loss"], abs=1e-5)
    whole = engine.load(random_gpt2).evaluate(sft.loss, [batch])["loss"]
    assert 1e-7 < abs(whole - found["nll"]) < 0.01
    model.generate([[3, 4, 5]], max_tokens=4, stop=None)


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_what_mlx_holds_in_which_format(random_gpt2):
    import mlx.core as mx
    from mlx.utils import tree_flatten

    engine = engines.get("mlx")
    model = engine.load(random_gpt2, mixed=True)
    trainer = engine.trainer(model, AdamW())
    trainer.step(sft.loss, batches(1), 1e-3)
    for name, value in tree_flatten(model.net.parameters()):
        assert value.dtype == (mx.float32 if "wte" in name or "wpe" in name else mx.bfloat16), name
        weight = dict(tree_flatten(model.trained()))[name]
        assert weight.dtype == mx.float32 and mx.array_equal(weight.astype(value.dtype), value), name
    assert {v.dtype for n, v in trainer._state.items() if n[-2:] in (".m", ".v")} == {mx.float32}


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_what_torch_computes_in_which_format(random_gpt2):
    import torch

    model = engines.get("torch").load(random_gpt2, mixed=True)
    seen: dict[str, torch.dtype] = {}
    block = model.net.transformer.h[0]
    for name, module in (("product", block.mlp.c_fc), ("norm", block.ln_1)):
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.dtype))
    model.token_logprobs(batches(1))
    assert seen == {"product": torch.bfloat16, "norm": torch.float32}
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["adapter.rank=2"], "is for training all weights: an adapter is float32 anyway, and dtype=bfloat16"),
        (["dtype=float16"], "computes in bfloat16 (float16 would need loss scaling): leave dtype out"),
        (["dtype=bfloat16"], "keeps float32 weights"),
    ],
)
def test_what_mixed_precision_is_not_for_is_refused(settings, words):
    with pytest.raises(UserError) as refused:
        methods.load_recipe("01_sft", ["model=tiny", "train.precision=mixed", *settings])
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_plan_says_so_and_counts_copies(engine):
    given = ["model=tiny", "data.source=embedded/tasks", "data.format=auto", "data.limit=64"]
    given += [f"engine={engine}", "output=x"]
    whole, mixed = (
        methods.plan(methods.load_recipe("01_sft", [*given, f"train.precision={p}"]))[0]
        for p in ("float32", "mixed")
    )
    assert f"on {engine} in float32, computed in bfloat16: " in mixed.text()
    blocks = 3_554_304 - 192 * (4096 + 512)
    assert mixed.parts["weights"] - whole.parts["weights"] == pytest.approx(2 * blocks / 2**30)
    assert mixed.parts["optimizer"] == whole.parts["optimizer"]
    if engine == "mlx":
        assert mixed.parts["activations"] < 0.8 * whole.parts["activations"]


def losses(folder: Path) -> np.ndarray:
    return np.array([r["loss"] for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r])


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ENGINES)
def test_curves_differ_less_than_seeds_do(engine, tmp_path):
    """Over three seeds, in the mean of the last 20 of 100 steps on the embedded model."""
    ends: dict[str, list[float]] = {"float32": [], "mixed": []}
    for precision, found in ends.items():
        for seed in range(3):
            folder = tmp_path / f"{precision}-{seed}"
            given = [f"model={base_folder('tiny')}", "data.limit=800", f"seed={seed}", "sample.count=0"]
            given += ["train.steps=100", "train.batch_size=4", "train.eval_every=100", "data.eval_limit=8"]
            run_recipe(
                "demo_sft", *given, f"engine={engine}", f"output={folder}", f"train.precision={precision}"
            )
            found.append(float(losses(folder)[-20:].mean()))
    whole, mixed = np.array(ends["float32"]), np.array(ends["mixed"])
    assert np.abs(mixed - whole).mean() < np.ptp(whole), (whole, mixed)
    assert np.abs(mixed - whole).max() > 0
