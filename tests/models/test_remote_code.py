"""No code of a model folder is ever run: model_file and auto_map, on both engines and in every release."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model

ENGINES = engines.available()


@pytest.fixture
def folder(random_gpt2, tmp_path):
    """A function that edits a file of a model folder whose Python files would leave a mark."""
    target = tmp_path / "model"
    shutil.copytree(random_gpt2, target)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n"
    for name in ("custom.py", "tokenization_custom.py"):
        (target / name).write_text(code + "class Model: pass\nModelArgs = Config = Tokenizer = Model\n")

    def edit(file: str = "config.json", **changes):
        settings = json.loads((target / file).read_text())
        (target / file).write_text(json.dumps(settings | changes))
        return target

    yield edit
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_file_is_refused(engine, folder, tmp_path):
    given = folder(model_file="custom.py")
    for use in (lambda: open_model(given, engine), lambda: convert(given, tmp_path / "out")):
        with pytest.raises(
            UserError, match=r"custom\.py \(model_file\): code from a model folder is never run"
        ):
            use()
    with pytest.raises(UserError, match="model_file"):
        open_model(folder(model_type="llama"), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_auto_map_is_ignored_where_the_architecture_is_known(engine, folder, random_gpt2):
    names = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    model, _, _ = open_model(folder(auto_map=names), engine)
    ids = np.arange(5, 25)[None]
    plain = open_model(random_gpt2, engine)[0]
    assert np.array_equal(model.full_logits(ids), plain.full_logits(ids)) and "auto_map" not in model.config


@pytest.mark.parametrize("engine", ENGINES)
def test_an_auto_map_of_an_unknown_architecture_is_refused(engine, folder):
    names = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    with pytest.raises(UserError, match=r"needs code from the model folder \(auto_map\), which is never run"):
        open_model(folder(auto_map=names, model_type="custom"), engine)


def test_a_tokenizers_code_is_not_run(folder, random_gpt2):
    """Its vocabulary in tokenizer.json needs none."""
    given = folder(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_custom.Tokenizer", None]},
        tokenizer_class="CustomTokenizer",
    )
    text = "The cat sat on the mat."
    found, plain = (open_model(name, ENGINES[0])[1].encode(text) for name in (given, random_gpt2))
    assert found == plain
