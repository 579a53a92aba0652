"""Scalar heads: scores equal on both engines and in transformers.

For full models and adapters, written and read back.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdamW, AdapterSpec, initial_head
from mlx_posttrain.errors import UserError

ENGINES = engines.available()
PAD = 0
ROWS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 0], [20, 21, 22]]
LAST = [3, 6, 2]  # position of each row's last token that is not PAD


@pytest.fixture(params=ENGINES)
def engine(request):
    return engines.get(request.param)


def batch() -> Batch:
    tokens = np.zeros((3, 32), np.int32)
    for r, row in enumerate(ROWS):
        tokens[r, : len(row)] = row
    index = np.array([r * 32 + last for r, last in enumerate(LAST)], np.int32)
    ones = np.ones(3, np.float32)
    return Batch(
        tokens, index, np.zeros(3, np.int32), np.arange(3, dtype=np.int32), mask=ones, weight=ones, units=3.0
    )


def scores(model) -> np.ndarray:
    return model.apply(lambda m, b: {"scores": m.scores(b)}, [batch()])[0]["scores"]


def regress(model, b):
    """Squared error against the targets, a loss that moves trunk and head."""
    s = model.scores(b)
    target = s * 0 + b.weight * b.extra["target"]
    value = ((s - target) ** 2).sum() / b.total
    return value, {"mse": value}


def trained(engine, folder, adapter: bool, steps: int = 10):
    model = engine.load(folder)
    if adapter:
        model.add_adapter(AdapterSpec(rank=4, alpha=8.0), seed=3)
    model.add_head(initial_head(64, seed=5))
    b = replace(batch(), extra={"target": np.array([1, -1, 2], np.float32)})
    trainer = engine.trainer(model, AdamW(clip=None))
    return model, [trainer.step(regress, [b], 3e-4)["loss"] for _ in range(steps)]


def theirs(folder, base=None) -> np.ndarray:
    import torch
    from transformers import AutoModelForSequenceClassification

    if base is None:
        net, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    else:
        from peft import PeftModel

        net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=PAD)
        net = PeftModel.from_pretrained(net, folder)
    net.eval()
    longest = max(map(len, ROWS))
    tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in ROWS])
    with torch.no_grad():
        return net(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits[:, 0].numpy()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_scores_in_transformers_and_back(engine, adapter, random_gpt2, tmp_path):
    pytest.importorskip("torch")
    model, losses = trained(engine, random_gpt2, adapter)
    assert losses[-1] < losses[0]
    wanted = scores(model)
    model.save_classifier(tmp_path / "classifier", PAD)
    assert np.abs(theirs(tmp_path / "classifier", random_gpt2 if adapter else None) - wanted).max() < 1e-4
    model.save(tmp_path / "checkpoint")  # a language model, with the head in a file beside it
    for saved in ("classifier", "checkpoint"):
        for other in ENGINES:
            again = engines.get(other).load(random_gpt2)
            if adapter:
                again.add_adapter(files.spec_of(tmp_path / saved), seed=0)
            again.add_head(initial_head(64, seed=9))
            again.load_trained(tmp_path / saved)
            assert np.abs(scores(again) - wanted).max() < 1e-5
    if not adapter:  # a classifier's folder is loaded with its head
        for other in ENGINES:
            opened = engines.get(other).load(tmp_path / "classifier")
            assert opened.has_head
            assert np.abs(scores(opened) - wanted).max() < 1e-5


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_engines_train_heads_alike(adapter, random_gpt2):
    curves = [trained(engines.get(name), random_gpt2, adapter)[1] for name in ENGINES]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_zero_head_scores_zero_and_one_pass_gives_both(engine, random_gpt2):
    model = engine.load(random_gpt2)
    assert not model.has_head
    model.add_head(initial_head(64, None))
    assert np.array_equal(scores(model), np.zeros(3))
    model.add_head(initial_head(64, 1))
    found = model.apply(
        lambda m, b: dict(zip(("logprobs", "entropy", "scores"), m.policy_terms(b), strict=True)), [batch()]
    )[0]
    assert found["scores"] == pytest.approx(scores(model), abs=1e-6)
    assert found["logprobs"] == pytest.approx(model.token_logprobs([batch()])[0], abs=1e-5)


def test_adapter_freezes_all_but_itself_and_the_head(engine, random_gpt2):
    model = engine.load(random_gpt2)
    model.add_adapter(AdapterSpec(rank=4), seed=0)
    without = model.parameter_counts()[1]
    model.add_head(initial_head(64, 0))
    assert model.parameter_counts()[1] == without + 64
    other = engine.load(random_gpt2)
    other.add_head(initial_head(64, 0))
    other.add_adapter(AdapterSpec(rank=4), seed=0)
    assert other.parameter_counts()[1] == without + 64


def test_the_language_model_ignores_its_head(engine, random_gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = engine.load(random_gpt2)
    tokens = np.arange(3, 30)[None]
    plain = model.full_logits(tokens)
    model.keep_reference()
    model.add_head(initial_head(64, 2))
    assert np.array_equal(model.full_logits(tokens), plain)
    model.save(tmp_path / "lm")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    completion = model.generate([[5, 6]], max_tokens=4, stop=None)[0]
    assert len(completion.tokens) == 4


def test_a_classifier_of_several_labels_is_refused(engine, random_gpt2, tmp_path):
    model = engine.load(random_gpt2)
    model.add_head(initial_head(64, 0))
    model.save_classifier(tmp_path / "c", PAD)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "c" / "model.safetensors")
    save_file(
        {**tensors, "score.weight": np.zeros((3, 64), np.float32)},
        tmp_path / "c" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="one label"):
        engine.load(tmp_path / "c")
    assert initial_head(64, 0).std() == pytest.approx((1 / 65) ** 0.5, rel=0.3)
