"""Tiny random GPT-2 folders, a tiny tokenizer, and a context that fails on the libraries' warnings."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from pathlib import Path

import pytest

SMALL = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture
def gpt2_model():
    """Return a function that makes a random GPT2LMHeadModel in eval mode.

    Its values are larger than the library's initial ones, so that differences show.
    """
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(seed=0, **options):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**{**SMALL, **options})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ln_" not in name:
                    parameter.normal_(0, 0.08)
        return model

    return make


@pytest.fixture
def write_tokenizer():
    """Return a function that writes a tiny byte-level BPE tokenizer like GPT-2's to a folder."""

    def write(folder: Path, tokenizer_class="GPT2TokenizerFast"):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": tokenizer_class, "eos_token": "<|endoftext|>", "model_max_length": 64}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))

    return write


@pytest.fixture
def gpt2_folder(tmp_path, gpt2_model, write_tokenizer):
    """Return a function that saves a random GPT-2 and a tokenizer as a Hugging Face folder.

    `layout` renames the tensors as in published files.
    """
    from safetensors.torch import save_file

    def make(name="hf", layout="transformer", dtype="float32", seed=0, shard=None, **options):
        import torch

        folder = tmp_path / name
        model = gpt2_model(seed, **options).to(getattr(torch, dtype))
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        if layout != "transformer":
            weights = {
                k.removeprefix("transformer."): v
                for k, v in model.state_dict().items()
                if k != "lm_head.weight"
            }
            if layout == "buffers":
                for i in range(model.config.n_layer):
                    weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8)
                    weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
            elif layout == "lm_head":
                weights = {f"transformer.{k}": v for k, v in weights.items()} | {
                    "lm_head.weight": weights["wte.weight"].clone()
                }
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        write_tokenizer(folder)
        return folder

    return make


class _Collect(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def quiet():
    """Return a context that fails on any warning, from the warnings module or the libraries' loggers.

    The loggers are those of transformers, peft and huggingface_hub, and the root logger.
    """

    @contextlib.contextmanager
    def watch():
        handler = _Collect()
        loggers = [logging.getLogger(name) for name in ("transformers", "peft", "huggingface_hub", "root")]
        for logger in loggers:
            logger.addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
        deprecations = (DeprecationWarning, PendingDeprecationWarning)
        # peft reads an attribute that transformers has renamed, for every adapter and whatever the files
        # hold.
        warned = [
            str(w.message)
            for w in caught
            if not issubclass(w.category, deprecations) and "is_gradient_checkpointing" not in str(w.message)
        ]
        assert not handler.messages + warned

    return watch


@pytest.fixture
def hf_logits():
    """Return a function that computes a transformers model's logits (batch, length, vocab) as NumPy."""

    def run(model, tokens):
        import torch

        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.float().numpy()

    return run


@pytest.fixture
def mlx_logits():
    """Return a function that computes an mlx-lm model's logits (batch, length, vocab) as NumPy."""

    def run(model, tokens):
        import mlx.core as mx
        import numpy as np

        return np.array(model(mx.array(tokens)).astype(mx.float32))

    return run


TOKENS = [[3, 14, 15, 92, 65, 35], [8, 97, 93, 23, 84, 62]]


@pytest.fixture
def tokens():
    return TOKENS
