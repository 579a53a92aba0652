"""Broken model folders and awkward input end in one line that says what to do, or work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_posttrain import engines
from mlx_posttrain.convert import adapters, gpt2, hub
from mlx_posttrain.convert.weights import convert
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests.helpers import cli, command, refused

ENGINES = engines.available()


# broken model folders


def config(**changes: object) -> Callable[[Path], object]:
    """Change keys of config.json; None takes one away."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def file(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no n_layer, so 12": (
        config(n_layer=None),
        r"lack model.h.2.ln_1.weight \(and 119 more\) for a GPT-2 with n_layer 12",
    ),
    "n_layer a word": (
        config(n_layer="two"),
        r"config.json has n_layer 'two'; it must be a whole number of at least "
        r"1",
    ),
    "no heads": (config(n_head=0), r"config.json has n_head 0; it must"),
    "heads do not divide": (
        config(n_head=3),
        r"config.json has n_embd 64, which its n_head 3 does not divide",
    ),
    "architectures a word": (
        config(architectures="GPT2LMHeadModel"),
        r"architectures 'GPT2LMHeadModel'; it must be a list",
    ),
    "no model type": (config(model_type=None), r"names no model_type"),
    "empty config": (file("config.json", lambda _: b""), r"config.json is not valid JSON"),
    "list for config": (
        file("config.json", lambda _: b"[]"),
        r"config.json must hold a JSON object, found list",
    ),
    "junk weights": (
        file("model.safetensors", lambda _: b"hello" * 1000),
        r"model.safetensors is damaged "
        r"or is not a safetensors file",
    ),
    "truncated weights": (
        file("model.safetensors", lambda d: d[: len(d) // 2]),
        r"model.safetensors is damaged",
    ),
    "empty weights": (file("model.safetensors", lambda _: b""), r"model.safetensors is damaged"),
    "list for tokenizer config": (
        file("tokenizer_config.json", lambda _: b"[]"),
        r"tokenizer_config.json must hold a JSON "
        r"object",
    ),
    "list for generation config": (
        file("generation_config.json", lambda _: b"[]"),
        r"generation_config.json must hold a JSON "
        r"object",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("engine", ENGINES)
def test_broken_folders(engine, what, random_gpt2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(random_gpt2, folder)
    change, message = BROKEN[what]
    change(folder)
    for attempt in (lambda: open_model(folder, engine), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["h.0.mlp.c_fc.weight", "h.1.attn.c_attn.bias", "wpe.weight", "ln_f.bias"])
def test_a_tensor_of_the_wrong_shape(name, random_gpt2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(random_gpt2, folder)
    tensors = load_file(folder / "model.safetensors")
    (key,) = [k for k in tensors if k.endswith(f"transformer.{name}") or k == name]
    tensors[key] = np.ascontiguousarray(tensors[key][..., :-1])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match=rf"model.{name} has shape \(.*\), and config.json asks for "
        r"\(".replace(".", r"\.", 1),
    ):
        convert(folder, tmp_path / "out")


def test_the_shapes_of_a_gpt2():
    """A block of width 2 written out by hand, (out, in)."""
    sizes = {"vocab_size": 5, "n_positions": 4, "n_embd": 2, "n_layer": 1, "n_head": 1}
    right = {
        "wte.weight": (5, 2),
        "wpe.weight": (4, 2),
        "ln_f.weight": (2,),
        "ln_f.bias": (2,),
        "h.0.ln_1.weight": (2,),
        "h.0.ln_1.bias": (2,),
        "h.0.ln_2.weight": (2,),
        "h.0.ln_2.bias": (2,),
        "h.0.attn.c_attn.weight": (6, 2),
        "h.0.attn.c_attn.bias": (6,),
        "h.0.attn.c_proj.weight": (2, 2),
        "h.0.attn.c_proj.bias": (2,),
        "h.0.mlp.c_fc.weight": (8, 2),
        "h.0.mlp.c_fc.bias": (8,),
        "h.0.mlp.c_proj.weight": (2, 8),
        "h.0.mlp.c_proj.bias": (2,),
    }
    tensors = {f"model.{name}": np.zeros(shape) for name, shape in right.items()}
    gpt2.check_shapes(tensors, sizes)
    for name, tensor in tensors.items():
        with pytest.raises(UserError, match=name):
            gpt2.check_shapes({**tensors, name: np.zeros((*tensor.shape[:-1], tensor.shape[-1] + 1))}, sizes)


def test_an_index_that_names_a_missing_shard(random_gpt2, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(random_gpt2, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"lacks the shard model-00002-of-00002.safetensors"):
        hub.resolve(folder)


# generate


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("budget", [1, 2 * 256, 4 * 256, 7 * 256])
def test_decoding_in_parts_gives_the_texts_of_one_batch(engine, budget, random_gpt2):
    model, tokenizer, _ = open_model(random_gpt2, engine)
    prompts = [
        tokenizer.encode(text)
        for text in ("The cat", "A small dog ran over the hill", "Numbers", "Once upon a time", "The moon")
    ]
    options = {"max_tokens": 6, "stop": tokenizer.eos_token_id, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    calls: list[int] = []
    generate = model.generate

    def counted(part, **more):
        assert max(len(p) for p in part) + 6 <= 256  # so that a row takes one block of the cache
        calls.append(len(part) * more["samples"])
        assert calls[-1] == 1 or calls[-1] * 256 <= budget
        return generate(part, **more)

    together = model.generate(prompts, samples=3, **options)
    model.generate = counted
    parts = list(decoding.in_batches(model, prompts, samples=3, token_budget=budget, **options))
    assert [c.tokens for c in parts] == [c.tokens for c in together] and [c.stopped for c in parts] == [
        c.stopped for c in together
    ]
    assert calls == {1: [1] * 15, 2 * 256: [2, 1] * 5, 4 * 256: [3] * 5, 7 * 256: [6, 6, 3]}[budget]


def test_a_file_of_prompts_that_is_no_text(random_gpt2, tmp_path, capfd):
    (tmp_path / "prompts").write_bytes(b"The cat\n\xff\xfe\x00")
    assert "prompts: not UTF-8 text (byte 9); give a text file" in refused(
        capfd, "generate", str(random_gpt2), "--file", str(tmp_path / "prompts")
    )
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it
    assert "pipe: not a regular file; save the prompts as one" in refused(
        capfd, "generate", str(random_gpt2), "--file", str(tmp_path / "pipe")
    )


def test_a_line_is_what_ends_in_a_newline(random_gpt2, tmp_path, capfd):
    """A byte-order mark is no text, and Unicode's other separators stand inside a prompt."""
    (tmp_path / "prompts").write_bytes("\ufeffThe cat\r\n\n A\u2028dog\n".encode())
    file = str(tmp_path / "prompts")
    assert cli("generate", str(random_gpt2), "--file", file, "--max-tokens", "2", "--json") == 0
    assert [json.loads(line)["prompt"] for line in capfd.readouterr().out.split("\n")[:-1]] == [
        "The cat",
        " A\u2028dog",
    ]


@pytest.mark.parametrize("given", [["generate", "tiny", "--prompt", "x"], ["chat", "tiny"], ["demo"]])
def test_a_seed_below_zero(given, capfd):
    assert "--seed" in refused(capfd, *given, "--seed", "-1")


def test_a_demo_into_a_file(tmp_path, capfd):
    (tmp_path / "taken").write_text("mine")
    assert "is a file" in refused(capfd, "demo", "--output", str(tmp_path / "taken"))
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_a_chat_outlives_a_question_that_is_too_long(engine, random_gpt2):
    asked = b"The cat\n" + b"The cat sat on the mat. " * 40 + b"\n\xff\xfe\nThe cat\n"
    done = subprocess.run(
        command("chat", random_gpt2, "--max-tokens", 3, "--temperature", 0, "--engine", engine),
        input=asked,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.decode().strip().splitlines()
    assert "more than the 63 that fit; shorten it" in line
    assert done.stdout.count(b"\n") == 3  # the first, the bytes that are no text, the last


@pytest.mark.parametrize("engine", ENGINES)
def test_a_config_that_contradicts_its_weights_is_one_line(engine, random_gpt2, tmp_path, capfd):
    for key, value in (("n_layer", 5), ("n_embd", 96), ("vocab_size", 7), ("n_head", 5)):
        folder = tmp_path / f"{key}-{engine}"
        shutil.copytree(random_gpt2, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        said = refused(
            capfd, "generate", str(folder), "--prompt", "Hi", "--max-tokens", "2", "--engine", engine
        )
        assert str(folder) in said or "config" in said, (key, said)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_for_another_width_is_one_line(engine, random_gpt2, tmp_path, capfd):
    layers = {
        f"model.h.{i}.attn.c_attn": {"lora_a": np.ones((65, 2)), "lora_b": np.ones((2, 192))}
        for i in range(2)
    }
    adapters.save_adapter(
        tmp_path / "a", layers, base_model=str(random_gpt2), rank=2, alpha=4, targets=["c_attn"]
    )
    said = refused(capfd, "generate", str(tmp_path / "a"), "--prompt", "Hi", "--engine", engine)
    assert said.endswith(
        "the adapter was made for another model: its matrices of transformer.h.0.attn.c_attn are (65, 2) and "
        "(2, 192), and the layer is (64, 192) (in, out)"
    )


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        (
            "tokenizer_config.json",
            "model_max_length",
            "abc",
            "has model_max_length 'abc'; it must be a number",
        ),
        ("config.json", "layer_norm_epsilon", "1e-5", "cannot read its config.json .*layer_norm_epsilon"),
        ("config.json", "layer_norm_epsilon", -1, "cannot read its config.json .*layer_norm_epsilon"),
        ("config.json", "tie_word_embeddings", "no", "cannot read its config.json .*tie_word_embeddings"),
        ("config.json", "eos_token_id", "x", "cannot read its config.json .*eos_token_id"),
        ("config.json", "activation_function", ["a"], "cannot read its config.json .*activation_function"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(file, key, value, said, random_gpt2, tmp_path):
    folder = Path(shutil.copytree(random_gpt2, tmp_path / "model"))
    given = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(given | {key: value}))
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--max-tokens", "--samples"])
def test_a_number_that_no_machine_holds(option, capfd):
    assert "less than or equal to 2147483647" in refused(
        capfd, "generate", "tiny", "--prompt", "a", option, "9" * 20
    )


def test_a_folder_without_a_tokenizer(random_gpt2, tmp_path, capfd):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(random_gpt2 / name, folder / name)
    assert "has no tokenizer" in refused(capfd, "generate", str(folder), "--prompt", "Hi")


@pytest.mark.parametrize("engine", ENGINES)
def test_moments_of_another_run_are_refused(engine, random_gpt2, tmp_path):
    from mlx_posttrain.engines.base import AdamW, AdapterSpec

    own = engines.get(engine)
    full, adapted = own.load(random_gpt2), own.load(random_gpt2)
    adapted.add_adapter(AdapterSpec(rank=2), seed=0)
    full_trainer, adapter_trainer = own.trainer(full, AdamW()), own.trainer(adapted, AdamW())
    for model, trainer in ((full, full_trainer), (adapted, adapter_trainer)):
        tokens = np.array([[1, 2, 3, 4]], np.int32)
        index = np.arange(3, dtype=np.int32)
        ones = np.ones(3, np.float32)
        batch = Batch(tokens, index, tokens[0, 1:], np.zeros(3, np.int32), ones, ones)
        trainer.step(_nll, [batch], 1e-3)
        del model
    full_trainer.save(tmp_path / "full.safetensors")
    with pytest.raises(UserError, match="belongs to another run"):
        adapter_trainer.load(tmp_path / "full.safetensors")
    full_trainer.load(tmp_path / "full.safetensors")


def _nll(model, batch):
    value = -model.logprobs(batch).mean()
    return value, {"nll": value}
