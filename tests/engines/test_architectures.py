"""MLX computes what transformers does, for every architecture of docs/models.md, or refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.convert import mlx_config
from mlx_posttrain.data.batches import by_row, collate
from mlx_posttrain.data.types import Example
from mlx_posttrain.errors import UserError
from tests import architectures as made

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif("mlx" not in engines.available(), reason="needs mlx")


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("case", made.CASES, ids=str)
def test_logits_are_those_of_transformers(case, version):
    assert made.measure(case, version) < 1e-4


def test_every_architecture_of_the_table_is_tested():
    assert {case.kind for case in made.CASES} == set(mlx_config.ARCHITECTURES)


@pytest.mark.parametrize("engine", engines.available())
@pytest.mark.parametrize("case", made.CASES, ids=str)
def test_a_sampler_that_says_so_is_exact(engine, case, tmp_path):
    """Its log-probabilities of 24 tokens are those of the forward pass that trains."""
    made.build(case, tmp_path)
    model = engines.get(engine).load(tmp_path)
    prompt, room = [5, 9, 2, 7], min(24, (model.context or 64) - 4)
    found = model.generate([prompt], max_tokens=room, stop=None, temperature=1.0, seed=1, samples=3)
    rows = [Example((*prompt, *one.tokens), (False,) * 4 + (True,) * len(one.tokens)) for one in found]
    batch = collate(rows, model.context)
    measured = np.concatenate(by_row(batch, model.token_logprobs([batch])[0]))
    sampled = np.concatenate([one.logprobs for one in found])
    changing = engine == "torch" and ("longrope" in str(case) or "dynamic" in str(case))
    off = np.abs(measured - sampled).max()
    assert model.exact_sampler is not changing
    assert off > 1 if changing and "longrope" in str(case) else off < 1e-4 or changing


def folder_of(tmp_path, kind: str, **settings):
    """The first case of an architecture with further settings in its config.json."""
    made.build(next(case for case in made.CASES if case.kind == kind), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', which mlx-lm's llama ignores"),
        ("llama", {"rope_traditional": True}, "rope_traditional True, which transformers ignores"),
        (
            "llama",
            {"rope_parameters": {**made.YARN, "attention_factor": 1.5}},
            "attention_factor 1.5 for yarn",
        ),
        ("llama", {"rope_parameters": {**made.YARN, "truncate": False}}, "truncate False for yarn"),
        ("llama", made.rope(1e4, partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        ("mixtral", {"rope_parameters": made.LINEAR}, "rope_type 'linear', which mlx-lm's mixtral ignores"),
        ("qwen3_moe", {"rope_parameters": made.YARN}, "rope_type 'yarn', which mlx-lm's qwen3_moe ignores"),
        ("mixtral", {"head_dim": 16}, "head_dim 16: mlx-lm's mixtral has"),
        ("mistral", {"attention_bias": True}, "attention_bias True, which transformers ignores"),
        ("gemma2", {"rope_parameters": made.LLAMA3}, "rope_type 'llama3'"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
            "layer_types in an order other than",
        ),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_a_setting_that_mlx_lm_would_not_compute_is_refused(kind, settings, message, tmp_path):
    with pytest.raises(UserError) as error:
        engines.get("mlx").load(folder_of(tmp_path, kind, **settings))
    assert message in str(error.value) and "engine=torch" in str(error.value)


@pytest.mark.parametrize("kind", sorted(mlx_config.ARCHITECTURES))
def test_a_folder_is_left_as_it_is_and_no_line_is_printed(kind, tmp_path, capfd):
    folder = folder_of(tmp_path, kind)
    before = (folder / "config.json").read_bytes()
    capfd.readouterr()
    engines.get("mlx").load(folder)
    assert (folder / "config.json").read_bytes() == before
    assert ("tokens here" in capfd.readouterr().err) == (kind == "gemma2")


def test_a_window_that_mlx_lm_does_not_mask_bounds_the_context(tmp_path, capfd):
    folder = folder_of(tmp_path, "mistral", sliding_window=16)
    model = engines.get("mlx").load(folder)
    line = capfd.readouterr().err.splitlines()[-1]
    assert "sliding window" in line and "at most 16 tokens" in line and "engine=torch" in line
    with pytest.raises(UserError, match="17 tokens does not fit the model's context of 16"):
        model.full_logits(made.tokens(17))
    (generated,) = model.generate([made.tokens(10)[0].tolist()], max_tokens=30, stop=None)
    assert len(generated.tokens) == 6
    assert engines.get("torch").context(folder) == 64


def test_a_recipe_whose_rows_would_exceed_the_window_is_refused(tmp_path, random_gpt2, rows_file):
    from mlx_posttrain import methods
    from mlx_posttrain.convert.files import copy_tokenizer

    folder = folder_of(tmp_path / "model", "mistral", sliding_window=16, vocab_size=400)
    copy_tokenizer(random_gpt2, folder)
    given = [f"model={folder}", f"data.source={rows_file}", f"output={tmp_path / 'run'}", "engine=mlx"]
    for call in (methods.run, methods.plan):
        with pytest.raises(
            UserError, match=r"data.max_length=32: on mlx .* at most 16 tokens .* engine=torch"
        ):
            call(methods.load_recipe("01_sft", [*given, "data.max_length=32"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_neox", "phi3"])
def test_decoding_with_a_cache_gives_the_most_likely_tokens_of_the_whole_text(kind, tmp_path):
    """Rows of several lengths, beyond gemma3's window of 8."""
    model = engines.get("mlx").load(folder_of(tmp_path, kind))
    prompts = [made.tokens(24)[0].tolist(), made.tokens(5)[1].tolist()]
    for prompt, found in zip(prompts, model.generate(prompts, max_tokens=16, stop=None), strict=True):
        text = np.array([prompt + found.tokens])
        likely = model.full_logits(text)[0].argmax(-1)
        assert found.tokens == likely[len(prompt) - 1 : -1].tolist()


def test_an_untested_architecture_loads_with_a_line_and_an_unknown_one_does_not(tmp_path, capfd):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    Olmo2ForCausalLM(Olmo2Config(**made.SIZES)).save_pretrained(tmp_path)
    engines.get("mlx").load(tmp_path)
    assert f"mlx-posttrain doctor --model {tmp_path}" in capfd.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": made.LINEAR}))
    with pytest.raises(UserError, match="rope_type 'linear'"):
        engines.get("mlx").load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nobody"}))
    with pytest.raises(UserError, match=r"transformers .* cannot read its config.json"):
        engines.get("mlx").load(tmp_path)


@pytest.mark.slow
def test_the_page_is_what_is_measured():
    """Written by ``python -m tests.architectures``; its second table has a test of its own."""
    assert made.PAGE.read_text(encoding="utf-8") == made.page(made.written_support())


@pytest.mark.exhaustive
def test_the_page_says_what_works():
    pytest.importorskip("gguf")
    from tests.architecture_support import table

    assert made.written_support() == table()


def test_the_text_part_of_a_model_of_images_and_text_is_translated_too(tmp_path):
    from transformers import Gemma3Config

    case = next(case for case in made.CASES if case.kind == "gemma3_text")
    Gemma3Config(text_config={**made.SIZES, **case.settings}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    found = mlx_config.readable(tmp_path, config)
    text = found.settings["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"], text["sliding_window_pattern"]) == (5e4, 1e3, 3)
    assert found.context == 64 and not found.tested
