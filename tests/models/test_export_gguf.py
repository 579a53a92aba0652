"""A run as a GGUF file and an Ollama Modelfile: the same model, asked in the same format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mlx_posttrain import engines
from mlx_posttrain.data.jinja import as_jinja
from mlx_posttrain.data.templates import TEMPLATES
from mlx_posttrain.errors import UserError
from mlx_posttrain.models.export import export, is_export
from mlx_posttrain.models.ollama import go_template, modelfile
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from tests.helpers import cli, reward_model, run_recipe

ENGINES = engines.available()
TOKENS = np.arange(3, 51)[None]
CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


def messages(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"number {i} from {role}"} for i, role in enumerate(roles)]


@pytest.fixture(scope="module")
def tokenizer(random_gpt2):
    return load_tokenizer(random_gpt2)


@pytest.fixture(scope="module")
def runs(random_gpt2, rows_file, tmp_path_factory):
    """Finished runs by name: of all weights and of an adapter, with other templates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, engine, further in (
        ("full", ENGINES[0], ["data.template=chatml"]),
        ("lora", ENGINES[-1], ["adapter.rank=4", "adapter.alpha=16", "data.system=Be brief."]),
    ):
        common = ["train.steps=3", "train.lr=2e-2", "sample.count=0", "data.limit=24", f"engine={engine}"]
        paths = [f"model={random_gpt2}", f"data.source={rows_file}", f"output={folder / name}"]
        run_recipe("01_sft", *paths, *common, *further)
    return folder


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_transformers_reads_the_run(name, dtype, runs, tmp_path):
    torch = pytest.importorskip("torch")
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = export(runs / name, tmp_path / "out", "gguf", dtype=dtype)
    assert done["merged"] is (name == "lora") and "note" not in done
    file = {"float32": "model-f32.gguf", "float16": "model-f16.gguf"}[dtype]
    where = {"pretrained_model_name_or_path": tmp_path / "out", "gguf_file": file}
    net = AutoModelForCausalLM.from_pretrained(**where, n_positions=64).eval()
    with torch.no_grad():
        theirs = net(torch.from_numpy(TOKENS)).logits.numpy()
    ours, own, _ = open_model(runs / name, ENGINES[0])
    assert np.abs(theirs - ours.full_logits(TOKENS)).max() < (1e-4 if dtype == "float32" else 2e-2)
    text = "The cat's 42 mats,\n\n  and the  moon."
    assert AutoTokenizer.from_pretrained(**where)(text)["input_ids"] == own(text)["input_ids"]

    fields = gguf.GGUFReader(tmp_path / "out" / file).fields
    written = fields["tokenizer.chat_template"].contents()
    asked = {"add_generation_prompt": True, "tokenize": False}
    prompt = own.apply_chat_template(messages("user"), chat_template=written, **asked)
    wanted = {
        "full": "<|im_start|>user\nnumber 0 from user<|im_end|>\n<|im_start|>assistant\n",
        "lora": "Be brief.\n\n### Instruction:\nnumber 0 from user\n\n### Response:\n",
    }
    assert prompt == wanted[name]
    assert own.decode(fields["tokenizer.ggml.eos_token_id"].contents()) == "<|endoftext|>"
    recipe = (tmp_path / "out" / "Modelfile").read_text()
    assert recipe.startswith(f'FROM ./{file}\nTEMPLATE """')
    assert recipe.endswith('PARAMETER num_ctx 64\nPARAMETER stop "<|endoftext|>"\n')
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"llama-cli -m {file}" in card and "ollama create" in card
    assert ("- merged" in card) is (name == "lora")
    assert is_export(tmp_path / "out", runs / name, "gguf", False, dtype)
    assert not is_export(tmp_path / "out", runs / name, "gguf", False, "q8_0")


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_language_writes_what_the_chat_template_does(name, system, tokenizer, tmp_path):
    """Rendered by Go itself, where it is installed."""
    jinja = as_jinja(name, system)
    template = go_template(tokenizer, jinja)
    if not shutil.which("go"):
        opened = template.count("{{ if ") + template.count("{{ range ")
        assert template.count("{{ .Content }}") == 1 and template.count("{{ end }}") == opened
        pytest.skip("needs Go")
    (tmp_path / "render.go").write_text(GO)
    given = [messages(*roles) for roles in CONVERSATIONS]
    done = subprocess.run(
        ["go", "run", str(tmp_path / "render.go")],
        input=json.dumps({"Template": template, "Conversations": given}),
        capture_output=True,
        text=True,
        check=True,
    )
    asked = {"chat_template": jinja, "add_generation_prompt": True, "tokenize": False}
    assert json.loads(done.stdout) == [tokenizer.apply_chat_template(one, **asked) for one in given]


GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var in struct {
		Template      string
		Conversations [][]Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Parse(in.Template))
	out := []string{}
	for _, one := range in.Conversations {
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"Messages": one}); err != nil {
			panic(err)
		}
		out = append(out, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def test_a_templates_texts_stand_between_the_messages(tokenizer):
    """By hand: the template `question`, whose answers have a space before them and an end after."""
    template = go_template(tokenizer, as_jinja("question"))
    start = '{{ if eq $i 0 }}{{ if eq .Role "system" }}{{ else }}Question: {{ end }}{{ end }}{{ .Content }}'
    assert start in template
    assert '{{ if eq .Role "system" }}\n\nQuestion: {{ else if' in template
    assert 'and (eq .Role "user") $last }}\n\nAnswer:{{ else' in template
    assert '{{ else if eq .Role "user" }}\n\nAnswer: {{ else' in template
    assert "{{ else if not $last }}<|endoftext|>\n\nQuestion: {{ end }}" in template


@pytest.mark.parametrize(
    ("jinja", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{{ loop.index }}{% endfor %}", "differently"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "differently"),
        ("{{ strftime_now('%d') }}{{ messages[0].content }}", "writes the date"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
         "{% for m in messages %}{{ m.content }}{% endfor %}", "refuses system, user: no system"),
        ("{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}", "braces"),
    ],
)  # fmt: skip
def test_a_chat_template_that_does_more_is_named_and_not_translated(jinja, why, tokenizer):
    text = modelfile("m.gguf", tokenizer, jinja, [0], 64)
    assert text.count("TEMPLATE") == 1
    assert "# no TEMPLATE: the chat template" in text and why in text


def test_a_long_context_is_not_reserved_and_a_prompt_without_template_is_passed_on(tokenizer):
    text = modelfile("m.gguf", tokenizer, None, [0], 131_072)
    assert 'TEMPLATE """{{ .Prompt }}"""\nPARAMETER num_ctx 8192\n' in text


def test_the_export_says_that_a_template_is_missing(runs, random_gpt2, tmp_path, capsys):
    pytest.importorskip("gguf")
    model = shutil.copytree(random_gpt2, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d') }}{{ messages[0].content }}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert cli("export", str(model), "--to", "gguf", "--output", str(tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "The Modelfile has no TEMPLATE: the chat template writes the date" in said


def test_what_cannot_be_written_is_refused_in_one_line(runs, random_gpt2, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="--dtype is for --to gguf"):
        export(runs / "full", tmp_path / "a", "hf", dtype="float16")
    with pytest.raises(UserError, match="no --dtype q4_k; there are float32, float16, bfloat16, q8_0"):
        export(runs / "full", tmp_path / "a", "gguf", dtype="q4_k")
    scores = reward_model(random_gpt2, tmp_path / "reward")
    with pytest.raises(UserError, match=r"is a reward model, which llama\.cpp does not run"):
        export(scores, tmp_path / "a", "gguf")
    assert not (tmp_path / "a").exists()


def test_a_missing_package_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "mlx-posttrain\[gguf\]"'):
        export(runs / "full", tmp_path / "a", "gguf")
    assert not (tmp_path / "a").exists()
