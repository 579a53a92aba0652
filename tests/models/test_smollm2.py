"""A real chat model with its own template, through data, LoRA, QLoRA, answers and export on both engines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.generation.model import LoadedModel
from mlx_posttrain.models.export import export
from mlx_posttrain.models.open import open_model
from tests.helpers import cli, read_jsonl, run_recipe
from tests.smollm2 import write_folder

pytestmark = pytest.mark.exhaustive
ENGINES = engines.available()
QUESTIONS = ("What is the capital of France?", "Write one sentence about 2 cats and 15 dogs.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def runs(folder, rows_file, tmp_path_factory):
    """Short adapter runs by (engine, kind), made once."""
    scratch = tmp_path_factory.mktemp("runs")

    def get(engine: str, *further: str):
        output = scratch / "-".join([engine, *(word.replace("=", "") for word in further)])
        if not output.exists():
            given = [f"model={folder}", f"data.source={rows_file}", f"output={output}", f"engine={engine}"]
            sizes = ["data.limit=10", "data.holdout=2", "data.max_length=96", "train.batch_size=2"]
            steps = ["train.steps=3", "train.lr=1e-3", "sample.count=0", "data.template=chat"]
            run_recipe("01_sft", *given, *sizes, *steps, "adapter.rank=4", *further)
        return output

    return get


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_answers_are_those_of_transformers(engine, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = LoadedModel(folder, engine, "float32").generate(QUESTIONS, max_tokens=32)
    for question, answer in zip(QUESTIONS, ours, strict=True):
        messages = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        whole = net.generate(**asked, max_new_tokens=32, do_sample=False)
        theirs = tokenizer.decode(whole[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert len(answer) > 10 and answer == theirs.strip()


def test_rows_are_shown_in_the_models_own_format(folder, rows_file, capsys):
    given = [f"model={folder}", f"data.source={rows_file}", "data.template=chat", "data.holdout=2"]
    assert cli("data", "03_lora", *given, "--json") == 0
    assert "<|im_start|>assistant" in capsys.readouterr().out


def test_lora_is_the_same_on_both_engines_and_in_peft(runs, folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = np.arange(100, 140)[None]
    curves, logits = [], []
    for engine in ENGINES:
        run = runs(engine)
        curves.append([row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row])
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            net = PeftModel.from_pretrained(base, str(run / "final")).eval()
            theirs = net(input_ids=torch.from_numpy(tokens)).logits.numpy()
            with net.disable_adapter():
                before = net(input_ids=torch.from_numpy(tokens)).logits.numpy()
        ours = open_model(run, engine, "float32")[0].full_logits(tokens)
        assert np.abs(ours - theirs).max() < 2e-3 < 2e-2 < np.abs(before - theirs).max()
        logits.append(ours)
    assert curves[0] == pytest.approx(curves[-1], rel=1e-3) and curves[0][-1] < curves[0][0]
    assert np.abs(logits[0] - logits[-1]).max() < 5e-2


@pytest.mark.skipif("mlx" not in ENGINES, reason="needs mlx")
def test_qlora_learns_and_answers(runs, capsys):
    # a product with packed weights is slow on a CPU
    run = runs("mlx", "adapter.quantize=4", "train.batch_size=1", "train.steps=2", "data.limit=6")
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    asked = ["--prompt", QUESTIONS[0], "--max-tokens", "8", "--engine", "mlx", "--json"]
    capsys.readouterr()
    assert cli("generate", str(run), *asked) == 0
    assert json.loads(capsys.readouterr().out)["answer"]


def test_its_own_chat_template_reaches_ollama_and_its_tokenizer_llama_cpp(runs, tmp_path):
    from gguf import GGUFReader

    done = export(runs(ENGINES[-1]), tmp_path / "out", "gguf", dtype="q8_0")
    fields = GGUFReader(tmp_path / "out" / "model-q8_0.gguf").fields
    assert "note" not in done and fields["tokenizer.ggml.pre"].contents() == "smollm"
    recipe = (tmp_path / "out" / "Modelfile").read_text()
    named = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    start = f"<|im_start|>system\n{named}<|im_end|>\n"
    assert f"{{{{ else }}}}{start}<|im_start|>user\n{{{{ end }}}}" in recipe
    assert 'PARAMETER num_ctx 8192\nPARAMETER stop "<|im_end|>"' in recipe


def test_llama_cpp_itself_answers_as_transformers_does(folder, tmp_path):
    cpp = pytest.importorskip("xllamacpp")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(folder, tmp_path / "out", "gguf", dtype="float32")
    settings = cpp.CommonParams()
    settings.model.path, settings.n_ctx = str(tmp_path / "out" / "model-f32.gguf"), 256
    settings.cpuparams.n_threads, settings.warmup, settings.verbosity = 1, False, -1
    server = cpp.Server(settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        found = server.handle_chat_completions({"messages": messages, "max_tokens": 24, "temperature": 0})
        found = json.loads(found) if isinstance(found, str) else found
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert found["usage"]["prompt_tokens"] == asked["input_ids"].shape[1]
        whole = net.generate(**asked, max_new_tokens=24, do_sample=False)
        theirs = tokenizer.decode(whole[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found["choices"][0]["message"]["content"] == theirs
