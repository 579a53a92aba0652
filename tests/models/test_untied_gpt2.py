"""A GPT-2 with a head of its own (tie_word_embeddings false): loaded, trained, resumed, merged, exported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.convert.weights import convert, load_weights
from mlx_posttrain.data.batches import collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.errors import UserError
from mlx_posttrain.memory.model_size import size
from mlx_posttrain.methods import sft
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model
from tests import architectures as made
from tests.helpers import run_recipe

pytest.importorskip("torch")
ENGINES = engines.available()
TOKENS = made.tokens(30)
BATCH = collate([Example(tuple(range(1, 30)), (False,) * 9 + (True,) * 20)])


@pytest.fixture(params=ENGINES)
def engine(request):
    return engines.get(request.param)


@pytest.fixture(scope="module")
def untied(random_gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    settings = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 400}
    made.build(made.Case("gpt2", "untied", {**settings, "tie_word_embeddings": False}), folder)
    copy_tokenizer(random_gpt2, folder)
    return folder


def test_head_and_embedding_get_gradients_of_their_own(untied):
    gradients = [engines.get(e).load(untied).gradient(sft.loss, [BATCH]) for e in ENGINES]
    for name in ("wte.weight", "lm_head.weight"):
        found = [next(v for key, v in g.items() if key.endswith(name)) for g in gradients]
        assert np.abs(found[0] - found[-1]).max() < 1e-5 * np.abs(found[0]).max()


def test_what_a_step_trained_is_read_back(engine, untied, tmp_path):
    model = engine.load(untied)
    trainer = engine.trainer(model, AdamW())
    before = model.full_logits(TOKENS)
    for _ in range(3):
        trainer.step(sft.loss, [BATCH], 1e-2)
    trained = model.full_logits(TOKENS)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_weights(tmp_path)
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in weights
    assert made.difference(trained, before) > 1e-2
    fresh = engine.load(untied)
    fresh.load_trained(tmp_path)
    assert np.array_equal(fresh.full_logits(TOKENS), trained)
    assert all(
        made.difference(engines.get(e).load(tmp_path).full_logits(TOKENS), trained) < 1e-5 for e in ENGINES
    )


def test_a_head_that_begins_as_a_copy_of_the_embedding_stays_a_head(engine, untied, tmp_path):
    """As in a folder that someone untied in order to train the two apart."""
    from safetensors.numpy import save_file

    weights = {name: np.array(value) for name, value in load_weights(untied).items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"].copy()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((untied / "config.json").read_text())
    total, _ = engine.load(tmp_path).parameter_counts()
    assert total == size(tmp_path).parameters == size(untied).parameters


def test_a_lora_run_is_merged_and_exported_with_its_head(engine, untied, rows_file, tmp_path):
    from transformers import AutoModelForCausalLM

    given = [f"model={untied}", f"data.source={rows_file}", f"output={tmp_path / 'run'}"]
    short = ["train.steps=2", "train.lr=1e-2", "data.max_length=64", "sample.count=0", "data.holdout=4"]
    run_recipe("01_sft", *given, *short, f"engine={engine.name}", "adapter.rank=4")
    logits = open_model(tmp_path / "run", engine.name)[0].full_logits(TOKENS)
    export(tmp_path / "run", tmp_path / "hf", "hf", merged=True)
    import torch

    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()(torch.from_numpy(TOKENS)).logits
    assert made.difference(theirs.numpy(), logits) < 1e-5
    with pytest.raises(UserError, match=r"output head of its own .* mlx-lm's GPT-2 does not have"):
        export(tmp_path / "run", tmp_path / "mlx", "mlx-lm", merged=True)


def test_it_converts_to_hugging_face_and_not_to_mlx_lm(untied, tmp_path):
    convert(untied, tmp_path / "hf", to="hf")
    assert "lm_head.weight" in load_weights(tmp_path / "hf")
    with pytest.raises(UserError, match="output head of its own"):
        convert(untied, tmp_path / "mlx")


def test_torch_saves_what_mlx_lm_would_not_compute(random_gpt2, tmp_path):
    """Another activation: refused on MLX before anything is trained, and no hindrance on torch."""
    made.build(
        made.Case("gpt2", "relu", {"n_embd": 32, "n_layer": 1, "n_head": 2, "activation_function": "relu"}),
        tmp_path,
    )
    copy_tokenizer(random_gpt2, tmp_path)
    model = engines.get("torch").load(tmp_path)
    model.save(tmp_path / "saved")
    assert np.array_equal(
        engines.get("torch").load(tmp_path / "saved").full_logits(TOKENS), model.full_logits(TOKENS)
    )
