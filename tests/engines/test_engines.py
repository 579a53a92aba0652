"""Each engine against transformers, the two engines against each other, and the invariants of a step."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW, AdapterSpec
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import load_recipe, sft
from mlx_posttrain.models.adapters import adapter_spec
from mlx_posttrain.models.merge import base_folder

ENGINES = engines.available()


def examples(vocab: int, seed: int = 0) -> list[Example]:
    """Eight rows of 9 to 40 tokens; the first third of each is prompt."""
    rng = np.random.default_rng(seed)
    return [
        Example(tuple(rng.integers(1, vocab, n).tolist()), tuple([False] * (n // 3) + [True] * (n - n // 3)))
        for n in (12, 40, 25, 38, 33, 9, 30, 31)
    ]


@pytest.fixture(params=ENGINES)
def engine(request):
    return engines.get(request.param)


@pytest.fixture
def both():
    if len(ENGINES) < 2:
        pytest.skip("needs mlx and torch")
    return [engines.get(name) for name in ENGINES]


LOSSES = {
    "sft": sft.loss,
    "kl forward": sft.kl_loss(0.2, "forward"),
    "kl reverse": sft.kl_loss(0.2, "reverse"),
}


def prepared(engine, folder, adapter: str | None, **load):
    model = engine.load(folder, **load)
    if adapter:
        model.add_adapter(AdapterSpec(kind=adapter, rank=4, alpha=8), seed=3)
    model.keep_reference()
    return model


def test_logits_equal_transformers(engine, random_gpt2):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(0, 256, (3, 64))
    theirs = AutoModelForCausalLM.from_pretrained(random_gpt2).eval()
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(engine.load(random_gpt2).full_logits(tokens) - wanted).max() < 1e-4


@pytest.mark.slow
def test_gpt2_124m_logits_count_and_lora_parameters(engine, tmp_path):
    """Parity with transformers at the real size, with random weights.

    124,439,808 parameters, and 1,622,016 in a rank-16 adapter.
    """
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    tokens = np.random.default_rng(0).integers(0, 50257, (2, 32))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    model = engine.load(tmp_path / "gpt2")
    assert np.abs(model.full_logits(tokens) - wanted).max() < 1e-4
    assert model.parameter_counts() == (124_439_808, 124_439_808)
    model.add_adapter(adapter_spec(load_recipe("03_lora").adapter), seed=0)
    assert model.parameter_counts() == (126_061_824, 1_622_016)


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@pytest.mark.parametrize("loss", LOSSES)
def test_engines_agree_step_by_step(both, random_gpt2, adapter, loss):
    rows = examples(256)
    curves = []
    for engine in both:
        model = prepared(engine, random_gpt2, adapter)
        trainer = engine.trainer(model, AdamW(weight_decay=0.1))
        batches = [collate(rows[:5], 64), collate(rows[5:], 64)]
        curves.append([trainer.step(LOSSES[loss], batches, 2e-3) for _ in range(8)])
    for ours, theirs in zip(*curves):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
    assert curves[0][-1]["loss"] < curves[0][0]["loss"] - 0.01  # and something was learned
    if loss != "sft":
        assert curves[0][0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy starts at its reference
        assert curves[0][-1]["kl"] > 1e-5


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_accumulation_equals_one_batch(engine, random_gpt2, adapter):
    """Eight micro-batches of one row give the step of one batch of eight, although rows differ in length."""
    rows = examples(256)
    results = []
    for parts in ([rows], [[r] for r in rows]):
        model = prepared(engine, random_gpt2, adapter)
        metrics = engine.trainer(model, AdamW()).step(sft.loss, [collate(p, 64) for p in parts], 1e-3)
        results.append((metrics, model.full_logits(np.arange(24)[None])))
    (one, logits), (eight, other) = results
    assert one["loss"] == pytest.approx(eight["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(eight["grad_norm"], rel=1e-4)
    # Adam's first step is the sign of the gradient, so outputs are compared loosely.
    assert np.abs(logits - other).max() < 2e-3


def test_padding_changes_nothing(engine, random_gpt2):
    """A short row's loss is the same alone and in a batch with a long one."""
    rows = examples(256)
    model = engine.load(random_gpt2)
    together = model.evaluate(sft.loss, [collate(rows, 64)])["loss"]
    tokens = [sum(r.trained) for r in rows]
    alone = sum(model.evaluate(sft.loss, [collate([r], 64)])["loss"] * n for r, n in zip(rows, tokens)) / sum(
        tokens
    )
    assert together == pytest.approx(alone, rel=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_answer(engine, random_gpt2):
    """Against the plain computation over full logits: which positions, which targets."""
    (row, *_) = examples(256)
    model = engine.load(random_gpt2)
    logits = model.full_logits(np.array([row.tokens]))[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.mean([log_p[t - 1, row.tokens[t]] for t in range(1, len(row.tokens)) if row.trained[t]])
    assert model.evaluate(sft.loss, [collate([row], 64)])["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_starts_as_the_base_and_the_base_never_moves(engine, random_gpt2, kind):
    tokens = np.arange(30)[None]
    base = engine.load(random_gpt2).full_logits(tokens)
    model = prepared(engine, random_gpt2, kind)
    assert np.abs(model.full_logits(tokens) - base).max() < 1e-5
    trainer = engine.trainer(model, AdamW())
    batch = collate(examples(256), 64)
    for _ in range(3):
        trainer.step(sft.kl_loss(0.1, "forward"), [batch], 5e-3)
    assert np.abs(model.full_logits(tokens) - base).max() > 1e-3
    # With the policy's own loss removed, the KL is measured against the untouched base.
    untouched = engine.load(random_gpt2)
    untouched.keep_reference()
    assert untouched.evaluate(sft.loss, [batch])["loss"] == pytest.approx(
        -float(np.mean(_reference_logprobs(model, batch))), rel=1e-4
    )


def _reference_logprobs(model, batch):
    """Mean log-prob of the targets under the model's reference, through the engine's own loss machinery."""
    from mlx_posttrain.losses.sft import token_logprobs, token_mean

    def loss(m, b):
        value = token_mean(token_logprobs(m.reference_logits(b), b.target), b.mask, b.total)
        return value, {}

    return model.evaluate(loss, [batch])["loss"]


def test_unknown_target_names_what_there_is(engine, random_gpt2):
    with pytest.raises(UserError, match="q_proj"):
        engine.load(random_gpt2).add_adapter(AdapterSpec(targets=("q_proj",)), seed=0)


def test_too_long_a_sequence_is_refused(engine, random_gpt2):
    model = engine.load(random_gpt2)
    with pytest.raises(UserError, match="65 tokens does not fit the model's context of 64"):
        model.full_logits(np.ones((1, 65), int))
    long = Example(tuple([1] * 80), tuple([True] * 80))
    with pytest.raises(UserError, match="context of 64"):
        model.evaluate(sft.loss, [collate([long])])
    with pytest.raises(UserError, match="no room"):
        model.generate([[1] * 64], max_tokens=4, stop=None)


def test_a_non_finite_loss_leaves_weights_and_moments_alone(engine, random_gpt2):
    model = engine.load(random_gpt2)
    trainer = engine.trainer(model, AdamW())
    batch = collate(examples(256), 64)
    trainer.step(sft.loss, [batch], 1e-3)
    before = model.full_logits(np.arange(20)[None])

    def broken(m, b):
        value, metrics = sft.loss(m, b)
        return value * float("nan"), metrics

    with pytest.raises(FloatingPointError, match="nan"):
        trainer.step(broken, [batch], 1e-3)
    assert np.array_equal(model.full_logits(np.arange(20)[None]), before)
    clean = engine.load(random_gpt2)
    other = engine.trainer(clean, AdamW())
    other.step(sft.loss, [batch], 1e-3)
    assert trainer.step(sft.loss, [batch], 1e-3)["loss"] == other.step(sft.loss, [batch], 1e-3)["loss"]


def test_gradient_checkpointing_gives_the_same_step(engine, random_gpt2):
    losses = []
    for on in (False, True):
        model = prepared(engine, random_gpt2, None, gradient_checkpointing=on)
        trainer = engine.trainer(model, AdamW())
        batch = collate(examples(256), 64)
        losses.append([trainer.step(sft.loss, [batch], 1e-3)["loss"] for _ in range(3)])
        # Generation right after training with checkpointing must use the cache.
        answers = model.generate([[3, 4, 5, 6]], max_tokens=12, stop=None)
        assert answers[0].tokens == greedy(model, [3, 4, 5, 6], 12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """Greedy continuation by full forward passes, no cache."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model.full_logits(np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_optimizer_matches_a_numpy_adamw(engine, random_gpt2):
    """A step of AdamW on one matrix and one bias, recomputed by hand; only the matrix decays."""
    settings = AdamW(beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.3, clip=None)
    batch = collate(examples(256), 64)
    lr = 1e-2
    name_matrix, name_bias = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"
    model = engine.load(random_gpt2)
    trainer = engine.trainer(model, settings)
    before = dict(model.weights())
    # Finite differences give the gradient of one entry.
    entry = (5, 7)
    gradient = _finite_difference(engine, random_gpt2, batch, name_matrix, entry)
    trainer.step(sft.loss, [batch], lr)
    after = model.weights()
    update = (after[name_matrix] - before[name_matrix])[entry]
    wanted = -lr * (
        gradient / (abs(gradient) + settings.eps) + settings.weight_decay * before[name_matrix][entry]
    )
    assert update == pytest.approx(wanted, rel=5e-3)
    # A bias is not decayed: Adam's first step is lr in size, whatever the bias is.
    moved = np.abs(after[name_bias] - before[name_bias])
    assert np.median(moved) == pytest.approx(lr, rel=1e-2)


def _finite_difference(engine, folder, batch, name, entry, step=2e-3):
    losses = []
    for sign in (1, -1):
        import shutil
        import tempfile
        from pathlib import Path

        from safetensors.numpy import load_file, save_file

        with tempfile.TemporaryDirectory() as temporary:
            changed = Path(temporary) / "model"
            shutil.copytree(folder, changed)
            weights = load_file(changed / "model.safetensors")
            weights[name][entry] += sign * step
            save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
            losses.append(engine.load(changed).evaluate(sft.loss, [batch])["loss"])
    return (losses[0] - losses[1]) / (2 * step)


def test_torch_answers_as_transformers_does() -> None:
    """With the fused activation in place of transformers' own.

    On the embedded model, whose activations are large enough to tell the two apart.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = base_folder("tiny")
    tokens = np.random.default_rng(0).integers(1, 4000, (4, 64))
    with torch.no_grad():
        wanted = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(torch.from_numpy(tokens))
            .logits.numpy()
        )
    np.testing.assert_allclose(engines.get("torch").load(folder).full_logits(tokens), wanted, atol=1e-4)


@pytest.mark.parametrize("engine", engines.available())
def test_a_trainer_counts_the_shapes_it_compiled(engine, random_gpt2):
    from mlx_posttrain.engines.mlx.cpu.compile_check import compile_works

    trainer = engines.get(engine).trainer(engines.get(engine).load(random_gpt2), AdamW())
    for length in (8, 16, 8):
        trainer.step(sft.loss, [collate([Example(tuple(range(1, length)), (True,) * (length - 1))])], 1e-4)
    assert trainer.compiled == (2 if engine == "mlx" and compile_works() else 0)
