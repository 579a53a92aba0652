"""Model and adapter folders: configs, tokenizer settings, and headers of safetensors files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from mlx_posttrain import engines
from mlx_posttrain.convert import adapters, hub
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.engines import files
from mlx_posttrain.memory.model_size import size
from mlx_posttrain.models.source import locate
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests.arbitrary import COUNTS, changed, texts, try_examples, values
from tests.architectures import CASES, build


@pytest.fixture
def folder(random_gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(random_gpt2, tmp_path / "model"))


SIZES = [*hub.gpt2.SIZES, "n_inner", "layer_norm_epsilon", "activation_function", "tie_word_embeddings"]
KEYS = [
    *(*SIZES, "model_type", "architectures", "auto_map", "model_file", "quantization", "quantization_config"),
    *(
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "dtype",
        "torch_dtype",
        "rope_parameters",
        "text_config",
    ),
    *("scale_attn_weights", "num_labels", "id2label", "attn_pdrop", "use_cache", "n_ctx", "surprise"),
]


@pytest.fixture(params=["gpt2", "llama"])
def either(request, random_gpt2, tmp_path) -> Path:
    """A folder of one of two architectures."""
    if request.param == "gpt2":
        return Path(shutil.copytree(random_gpt2, tmp_path / "model"))
    pytest.importorskip("torch")
    build(next(case for case in CASES if case.kind == "llama"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("count", COUNTS)
def test_configs(count, either):
    folder, sound = either, json.loads((either / "config.json").read_text())

    def read(config: dict) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        size(locate(folder).shape_folder)
        for name in engines.available():
            engines.get(name).context(folder)

    try_examples(count, changed(sound, [*KEYS, *sound]), read, first=sound)


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(600, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("engine", engines.available())
def test_configs_that_are_loaded(engine, count, either):
    folder, sound = either, json.loads((either / "config.json").read_text())

    def load(config: dict) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        hub.resolve(folder)
        model = engines.get(engine).load(folder)
        model.full_logits(np.array([[1, 2, 3]]))

    try_examples(count, changed(sound, [*KEYS, *sound]), load, first=sound)


@pytest.mark.parametrize("count", COUNTS)
def test_tokenizer_settings(count, folder):
    """generation_config.json too, which names the ends of a text."""
    name = st.sampled_from(["tokenizer_config.json", "generation_config.json"])
    content = st.dictionaries(
        st.one_of(
            st.sampled_from(
                ["eos_token", "eos_token_id", "chat_template", "tokenizer_class", "added_tokens_decoder"]
            ),
            texts,
        ),
        values,
        max_size=3,
    )
    sound = {n: (folder / n).read_bytes() for n in ("tokenizer_config.json", "generation_config.json")}

    def read(one: tuple) -> None:
        for n, data in sound.items():
            (folder / n).write_bytes(data)
        (folder / one[0]).write_text(json.dumps(one[1]))
        hub.check_folder(folder)
        load_tokenizer(folder)

    name_of, sound_one = "generation_config.json", {"eos_token_id": 0}
    try_examples(count, st.tuples(name, st.one_of(content, values)), read, first=(name_of, sound_one))


headers = st.dictionaries(
    st.one_of(st.sampled_from(["__metadata__", "wte.weight", "h.0.ln_1.bias"]), texts),
    st.one_of(
        values,
        st.fixed_dictionaries(
            {
                "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "BOOL", "F8_E4M3"]), values),
                "shape": st.one_of(st.lists(st.integers(-1, 2**40), max_size=3), values),
                "data_offsets": st.one_of(st.lists(st.integers(-1, 2**40), max_size=3), values),
            }
        ),
    ),
    max_size=3,
)


@pytest.mark.parametrize("count", COUNTS)
def test_headers_of_weights(count, folder, tmp_path):
    def read(one: tuple) -> None:
        header, data, length = one
        text = json.dumps(header).encode()
        start = (len(text) if length is None else length).to_bytes(8, "little")
        (folder / "model.safetensors").write_bytes(start + text + data)
        size(locate(folder).shape_folder)
        convert(folder, tmp_path / "out")

    lengths = st.one_of(st.none(), st.none(), st.integers(0, 2**64 - 1))
    try_examples(count, st.tuples(headers, st.binary(max_size=40), lengths), read)


@pytest.mark.parametrize("count", COUNTS)
def test_adapters(count, tmp_path):
    modules = {"model.h.0.attn.c_attn": {"lora_a": np.ones((8, 2)), "lora_b": np.ones((2, 24))}}
    folder = tmp_path / "adapter"
    adapters.save_adapter(folder, modules, base_model="tiny", rank=2, alpha=4, targets=None)
    sound = json.loads((folder / "adapter_config.json").read_text())
    keys = [*sound, "rank_pattern", "alpha_pattern", "bias", *adapters.UNSUPPORTED]

    def read(config: dict) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        read_config, read_modules = adapters.read_adapter(folder)
        adapters.to_mlx_lm(tmp_path / "mlx", read_modules, read_config)
        files.spec_of(folder)
        locate(folder)

    try_examples(count, changed(sound, keys), read, first=sound)


@pytest.mark.parametrize("count", COUNTS)
def test_headers_of_adapters(count, tmp_path):
    modules = {"model.h.0.attn.c_attn": {"lora_a": np.ones((8, 2)), "lora_b": np.ones((2, 24))}}
    adapters.save_adapter(tmp_path, modules, base_model="tiny", rank=2, alpha=4, targets=None)

    def read(one: tuple) -> None:
        text = json.dumps(one[0]).encode()
        (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + one[1])
        adapters.read_adapter(tmp_path)

    try_examples(count, st.tuples(headers, st.binary(max_size=40)), read)
