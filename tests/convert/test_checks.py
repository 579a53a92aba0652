"""What is refused in a model or adapter folder before anything is made of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_posttrain import engines
from mlx_posttrain.convert import adapters, checks, hub
from mlx_posttrain.convert.files import output_folder
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model

ENGINES = engines.available()


@pytest.fixture
def model(random_gpt2, tmp_path) -> Path:
    return Path(shutil.copytree(random_gpt2, tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def reweigh(folder: Path, name: str, value: object) -> None:
    """Replace the tensor whose name ends with ``name``."""
    tensors = load_file(folder / "model.safetensors")
    (key,) = [k for k in tensors if k.endswith(name)]
    tensors[key] = np.ascontiguousarray(value(tensors[key]) if callable(value) else value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_a_size_far_beyond_the_weights(key, model):
    change(model / "config.json", **{key: 10**9})
    begun = time.process_time()
    with pytest.raises(UserError, match=f"config.json has {key} 1000000000, and the weights have 28 tensors"):
        hub.resolve(model)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "64"), ("num_hidden_layers", 2.0), ("num_attention_heads", 0), ("vocab_size", True)],
)
def test_a_size_that_is_no_whole_number(key, value, model):
    change(model / "config.json", model_type="llama", **{key: value})
    with pytest.raises(UserError, match=rf"config.json has {key} {value!r}; it must be a whole number"):
        hub.check_config(model)


@pytest.mark.parametrize("labels", [10**9, -1, 2.0, "3", [1]])
def test_a_number_of_labels_that_cannot_be(labels, model):
    """transformers writes a name for each, a billion of which do not fit in memory."""
    for extra in ({"num_labels": labels}, {"model_type": "llama", "vision_config": {"num_labels": labels}}):
        change(model / "config.json", **extra)
        with pytest.raises(UserError, match=r"has num_labels .*; it must be a whole number to 100,000"):
            hub.check_config(model)
        change(model / "config.json", num_labels=3)
    change(model / "config.json", vision_config=None)
    assert hub.check_config(model)["num_labels"] == 3


@pytest.mark.parametrize("key", ["quantization", "quantization_config", "text_config"])
def test_a_section_that_is_none(key, model):
    change(model / "config.json", **{key: "4 bits"})
    with pytest.raises(UserError, match=f"config.json has {key} '4 bits'; it must be an object"):
        hub.check_config(model)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_weights_that_are_no_floats(dtype, model):
    reweigh(model, "h.0.attn.c_attn.weight", lambda x: x.astype(dtype))
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn\.weight has type (I32|BOOL), and weights are"):
        hub.resolve(model)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_in_weights_is_refused(engine, model, tmp_path):
    def spoil(x: np.ndarray) -> np.ndarray:
        x[0, 0] = np.nan
        return x

    reweigh(model, "h.1.mlp.c_fc.weight", spoil)
    for attempt in (lambda: open_model(model, engine), lambda: convert(model, tmp_path / "out")):
        with pytest.raises(UserError, match=r"c_fc\.weight holds values that are no numbers"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_infinity_is_a_number(model):
    import mlx.core as mx

    checks.check_finite([("mask", mx.array([0.0, -np.inf])), ("packed", mx.array([1, 2]))], "here")


def test_fewer_embedding_rows_than_tokens(model, tmp_path):
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    reweigh(model, "wte.weight", lambda x: x[:-1])
    change(model / "config.json", vocab_size=rows - 1)
    said = f"the tokenizer has {rows} tokens and the model's embedding {rows - 1}"
    with pytest.raises(UserError, match=said):
        convert(model, tmp_path / "out")


def test_a_model_type_that_is_a_module_of_mlx_lm(model):
    pytest.importorskip("mlx_lm")
    change(model / "config.json", model_type="switch_layers")
    with pytest.raises(UserError, match=r"model: "):
        open_model(model, "mlx")


# links


def test_a_link_out_of_the_folder_is_not_copied(model, tmp_path):
    (tmp_path / "secret").write_text('{"mine": 1}')
    (model / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(
        UserError, match=r"special_tokens_map\.json is a link to .*secret, outside of the model"
    ):
        convert(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_the_folder_and_the_hubs_cache_are_followed(model, tmp_path):
    cached = tmp_path / "models--a--b"
    (cached / "snapshots").mkdir(parents=True)
    snapshot = model.rename(cached / "snapshots" / "0123")
    (cached / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(cached / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    (snapshot / "again.json").symlink_to("config.json")
    checks.check_links(snapshot)
    assert convert(snapshot, tmp_path / "out").model_type == "gpt2"


def test_what_weights_cannot_be(model):
    change(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match=r"weights are quantised by gptq, which is not supported: give the"):
        hub.check_config(model)
    change(model / "config.json", quantization_config=None, model_type="llama")
    with pytest.raises(UserError, match=r"model_type 'llama' and the sizes of a GPT-2 \(n_embd\)"):
        hub.resolve(model)


# adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    modules = {"model.h.0.attn.c_attn": {"lora_a": np.ones((64, 2)), "lora_b": np.ones((2, 192))}}
    adapters.save_adapter(tmp_path / "a", modules, base_model="tiny", rank=2, alpha=4, targets=None)
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("r", "16", "'16'; it must be a whole number above 0"),
        ("r", None, "None; it must be"),
        ("r", True, "True; it must be"),
        ("lora_alpha", None, "None; it must be a finite number"),
        ("lora_alpha", float("nan"), "nan; it must be a finite number"),
        ("lora_alpha", float("inf"), "inf; it must be"),
        ("lora_dropout", "0", "'0'; it must be a number of at least 0"),
        ("rank_pattern", 3, "3; it must be a mapping"),
        ("rank_pattern", {"c_attn": "2"}, "it must be a mapping of patterns to whole numbers"),
        ("rank_pattern", {"(": 2}, "it must be a mapping of patterns"),
        ("alpha_pattern", {"c_attn": float("nan")}, "it must be a mapping of patterns to finite numbers"),
        ("base_model_name_or_path", ["tiny"], "it must be text"),
        ("rank_pattern", {"(([a-z_.0-9])*)*x": 2}, "a pattern is a layer's name, with at most 3 of .*"),
        ("alpha_pattern", {"(x+x+)+y": 2}, "a pattern is a layer's name"),
        ("alpha_pattern", {".*.*.*.*": 2}, "a pattern is a layer's name"),
        ("alpha_pattern", {"(a|a)(a|a)(a|a)": 2}, "2 lists (a|b)"),
        ("use_rslora", "false", "'false'; it must be true or false"),
        ("use_dora", 1, "1; it must be true or false"),
    ],
)
def test_a_value_of_the_wrong_kind_in_an_adapter(key, value, words, adapter):
    change(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json has {key} ") as caught:
        adapters.read_adapter(adapter)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "c_attn",
        r"h\.0\.attn\.c_attn",
        "transformer.h.0.attn.c_attn",
        "^transformer.h.[0-9]+.attn.c_attn$",
        r".*\.h\.\d+\.attn\.(c_attn|c_proj)$",
        r"h\.[01]\.attn\..*",
        "c_proj|c_attn",
    ],
)
def test_the_usual_patterns_of_ranks(pattern, adapter):
    change(adapter / "adapter_config.json", r=5, rank_pattern={"c_fc": 3, pattern: 2})
    config, modules = adapters.read_adapter(adapter)
    assert adapters.rank_of(config, next(iter(modules))) == 2


def test_the_slowest_pattern_takes_little_time():
    begun = time.process_time()
    for pattern in (".*.*.*x", "(.*|.*)(.*|a)x", f"({'a|' * 60}a)({'a|' * 60}a)x"):
        config = {"r": 4, "rank_pattern": {pattern: 2}}
        adapters._check_values(config, "config")
        assert adapters.rank_of(config, "a." * 64) == 4
    assert time.process_time() - begun < 2


def test_nan_in_an_adapter(adapter):
    adapters.read_adapter(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has values that are not finite"):
        adapters.read_adapter(adapter)


# what a kill and a full disk leave


def test_a_full_disk_is_one_line(tmp_path):
    said = r"/out cannot be written \(No space left on device\): free some space"
    with pytest.raises(UserError, match=said), output_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_for_good(tmp_path):
    """Nor does it take away what another process is writing at the same time."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mlx_posttrain.convert.files import output_folder\n"
        f"with output_folder(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "    (folder / 'model.safetensors').write_bytes(b'x' * 1000)\n    print('there', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"there\n"
        assert len(list(tmp_path.glob(".out.*"))) == 2
        (tmp_path / ".out.mine").mkdir()
        writers[0].kill()
        writers[0].wait()
        with output_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
        assert len(list(tmp_path.glob(".out.*"))) == 2  # the living one, and one that is no such folder
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    with output_folder(tmp_path / "out", force=True):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {".out.mine", "out"}
