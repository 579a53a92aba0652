"""How to ask an exported model with other libraries: the part of its card that can be pasted and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_posttrain.convert.files import read_json
from mlx_posttrain.models.card import base_name
from mlx_posttrain.models.prompt_format import carried_template, own_chat_template
from mlx_posttrain.models.source import Source

QUESTION = "What is the opposite of hot?"

_HEADS = {
    "hf": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "peft": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
}
_CLASSES = {"hf": "AutoModelForCausalLM", "peft": "AutoPeftModelForCausalLM"}
_TRANSFORMERS = """{head}

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {name}.from_pretrained(folder, dtype="{dtype}")
{asking}
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_TRANSFORMERS_CHAT = """messages = {messages}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TRANSFORMERS_TEXT = 'inputs = tokenizer("{question}", return_tensors="pt")'

_MLX = """from mlx_lm import generate, load
{loading}
{asking}
print(generate(model, tokenizer, prompt=prompt, max_tokens=128))"""
_MLX_CHAT = """messages = {messages}
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"""
_MLX_TEXT = 'prompt = "{question}"'
_MLX_MODEL = """
model, tokenizer = load(".")  # this folder, or its name on the hub"""
_MLX_ADAPTER = """from transformers import AutoTokenizer

folder = "."  # this folder
model, _ = load("{base}", adapter_path=folder)
tokenizer = AutoTokenizer.from_pretrained(folder)  # which has the format of the prompts"""


def usage(source: Source, to: str, merged: bool, base: str) -> str:
    """The Markdown that says in which format a model is asked, and how other libraries do it.

    to: a format of export. base: what to call the base.
    """
    chat = carried_template(source) is not None or bool(
        own_chat_template(source.adapter or source.folder) or own_chat_template(source.shape_folder)
    )
    adapter = source.adapter is not None and not merged
    gpt2 = read_json(source.shape_folder / "config.json").get("model_type") == "gpt2"
    words = {"messages": _messages(source), "question": QUESTION}
    dtype = source.dtype or "float32"
    mlx_asking = (_MLX_CHAT if chat else _MLX_TEXT).format(**words)
    parts = [_format(source, chat)]
    if to == "mlx-lm" and adapter:
        converted = base.rpartition("/")[2] + "-mlx"
        if gpt2:
            parts.append(f"mlx-lm reads a GPT-2 as `mlx-posttrain convert {base} {converted}` writes it.")
        if Path(base_name(source)).is_absolute():
            what = "command" if gpt2 else "code"
            parts.append(f"The base is a folder: where the {what} says `{base}`, write where it lies.")
        loading = _MLX_ADAPTER.format(base=converted if gpt2 else base)
        return "\n\n".join([*parts, _block(_MLX.format(loading=loading, asking=mlx_asking))])
    if to != "mlx-lm":
        asking = (_TRANSFORMERS_CHAT if chat else _TRANSFORMERS_TEXT).format(**words)
        kind = "peft" if adapter else "hf"
        parts.append(
            _block(_TRANSFORMERS.format(head=_HEADS[kind], name=_CLASSES[kind], dtype=dtype, asking=asking))
        )
    if to == "mlx-lm" or not (adapter or gpt2):  # mlx-lm takes a GPT-2 only as it is exported for it
        parts.append(_block(_MLX.format(loading=_MLX_MODEL, asking=mlx_asking)))
        parts.append(f"Or `mlx_lm.generate --model . --prompt '{QUESTION}'`, and `mlx_lm.server --model .`.")
    return "\n\n".join(parts)


_GGUF = """With Ollama, in this folder:

```sh
ollama create my-model -f Modelfile
ollama run my-model "{question}"
```

With llama.cpp, which reads the format of the prompts from the file:

```sh
llama-cli -m {file} -p "{question}"
```"""


def gguf_usage(source: Source, file: str, base: str) -> str:
    """The Markdown of :func:`usage` for a GGUF file and its Modelfile."""
    chat = carried_template(source) is not None or own_chat_template(source.shape_folder) is not None
    return "\n\n".join([_format(source, chat), _GGUF.format(question=QUESTION, file=file)])


def _messages(source: Source) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    if source.template == "chat" and source.system:  # other templates have it in them
        messages = [{"role": "system", "content": source.system}, *messages]
    return json.dumps(messages, ensure_ascii=False)


def _format(source: Source, chat: bool) -> str:
    """Which format the prompts have, and where it comes from."""
    name = carried_template(source)
    given: Any = ((source.recipe or {}).get("data") or {}).get("template")
    if name == "none":
        return "Prompts are plain text: the tokenizer's chat template adds no marks."
    if name is None:
        own = "Prompts have the format of the base model's own chat template."
        return own if chat else "The model continues plain text; its tokenizer has no chat template."
    told = f"Prompts have the format `{name}`, which the tokenizer has as its chat template."
    if isinstance(given, list) and len(given) > 1:
        others = ", ".join(f"`{one}`" for one in given[1:])
        told += f" The model was trained in {others} too; of several formats the first travels."
    return told


def _block(code: str) -> str:
    return f"```python\n{code}\n```"
