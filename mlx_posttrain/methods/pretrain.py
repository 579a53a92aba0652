"""Pre-training from random weights: how the embedded tiny model was made, and how to make another.

A byte-level BPE is trained on the texts, a GPT-2 of the given size is drawn from N(0, 0.02) with the residual
projections scaled by 1/sqrt(2 * layers) (Radford et al. 2019, section 2.3), and every token of the packed
texts is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mlx_posttrain import config
from mlx_posttrain.data import sources
from mlx_posttrain.data.dataset import Collator, Dataset
from mlx_posttrain.data.read import ModelFacts, row_dataset
from mlx_posttrain.data.types import Conversation, Turn
from mlx_posttrain.errors import UserError
from mlx_posttrain.methods import sft
from mlx_posttrain.models.merge import base_folder
from mlx_posttrain.training.method import Method

EOS = "<|endoftext|>"


class PretrainSection(config.Section):
    """Size of the new model."""

    vocab_size: int = Field(
        4096,
        ge=300,
        le=1_000_000,
        description="entries of the byte-level BPE, its end-of-text token included",
    )
    layers: int = Field(6, ge=1, le=1000, description="transformer blocks")
    heads: int = Field(6, ge=1, le=1000, description="attention heads")
    width: int = Field(192, ge=8, le=65_536, description="hidden size, a multiple of heads")
    context: int = Field(512, ge=16, le=1_000_000, description="longest sequence in tokens")
    start: str | None = Field(
        None, description="continue from this model or run instead of new weights and a new tokenizer"
    )
    repeated: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of documents that are random words of the texts said again and "
        "again; see repeated_lists",
    )


class Recipe(config.Recipe):
    """Pre-training from scratch."""

    method: Literal["pretrain"] = Field(description="pretrain: a new model from random weights")
    pretrain: PretrainSection = Field(default_factory=lambda: PretrainSection())

    @model_validator(mode="after")
    def _one_source(self) -> Recipe:
        if self.data.sources is not None:
            raise ValueError("pre-training reads one data.source: join the texts in one file or folder")
        return self


def start(recipe: Recipe, folder: Path) -> Path:
    """The folder of the first model: ``pretrain.start``, or ``folder/start`` with new weights and tokenizer.

    The tokenizer is trained on the recipe's texts. Raises UserError for rows without texts.
    """
    if recipe.pretrain.start is not None:
        return base_folder(recipe.pretrain.start)
    target = folder / "start"
    if not (target / "model.safetensors").is_file():
        data = recipe.data
        assert data.source is not None
        rows = sources.load_rows(
            data.source, split=data.split, config=data.config, limit=data.limit, seed=recipe.seed
        )
        texts = [str(row.get("text", "")) for row in rows]
        if not any(texts):
            raise UserError(
                f"{data.origin}: pre-training reads the column 'text', found {', '.join(rows[0])}"
            )
        make_model(target, texts, recipe.pretrain, recipe.seed)
    return target


def dataset(recipe: Recipe, facts: ModelFacts, collate: Collator) -> Dataset:
    """The texts, every token trained, with the share of repeated lists that the recipe asks for."""
    share = recipe.pretrain.repeated

    def with_lists(conversations: list[Conversation]) -> list[Conversation]:
        texts = [c.turns[-1].content for c in conversations]
        characters = int(sum(map(len, texts)) * share / (1 - share))
        lists = [
            Conversation((Turn("assistant", text),), templated=False)
            for text in repeated_lists(texts, characters, recipe.seed)
        ]
        mixed = conversations + lists
        order = np.random.default_rng([recipe.seed, 0x11575]).permutation(len(mixed))
        return [mixed[i] for i in order]

    return row_dataset(recipe, facts, collate, with_lists if share else lambda rows: rows)


def repeated_lists(texts: list[str], characters: int, seed: int) -> list[str]:
    """Documents of about ``characters`` characters in all: word lists, each written several times.

    A list has 2 to 16 random words of one text and is written 2 to 8 times.

    The words come in random order, so nothing but looking back predicts them the second time. Plain text
    teaches a small model to copy only after far more tokens than it is given here (induction heads: Olsson et
    al. 2022), and without copying no instruction about given words can be followed.
    """
    rng = np.random.default_rng([seed, 0x1157])
    pools = [words for words in (text.split() for text in texts) if len(words) >= 32]
    found: list[str] = []
    while characters > 0 and pools:
        words = pools[rng.integers(len(pools))]
        chosen = [words[i] for i in rng.integers(0, len(words), rng.integers(2, 17))]
        inner, outer = ((" ", "\n"), (", ", ".\n"), (" ", " / "), ("\n", "\n\n"), (", ", " and again "))[
            rng.integers(5)
        ]
        found.append(outer.join([inner.join(chosen)] * int(rng.integers(2, 9))))
        characters -= len(found[-1])
    return found


def make_model(folder: Path, texts: list[str], size: PretrainSection, seed: int) -> None:
    """Write a GPT-2 folder with a new tokenizer and random weights.

    Raises UserError when width is no multiple of heads.
    """
    from safetensors.numpy import save_file

    if size.width % size.heads:
        raise UserError(f"pretrain.width={size.width} is no multiple of pretrain.heads={size.heads}")
    folder.mkdir(parents=True, exist_ok=True)
    vocab = make_tokenizer(folder, texts, size.vocab_size, size.context)
    eos = 0
    settings = gpt2_config(vocab, size, eos)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}, indent=2) + "\n"
    )
    save_file(random_weights(vocab, size, seed), folder / "model.safetensors", metadata={"format": "pt"})


def gpt2_config(vocab: int, size: PretrainSection, eos: int) -> dict[str, Any]:
    """config.json of a GPT-2 of this size, without dropout, float32."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab,
        "n_positions": size.context,
        "n_ctx": size.context,
        "n_embd": size.width,
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def make_tokenizer(folder: Path, texts: list[str], vocab_size: int, context: int) -> int:
    """Train a byte-level BPE and write it as tokenizer files; returns its size.

    It has one special token: id 0, end of text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": EOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": EOS,
        "add_prefix_space": False,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def random_weights(vocab: int, size: PretrainSection, seed: int) -> dict[str, np.ndarray]:
    """GPT-2's first weights under Hugging Face's names, float32, from one NumPy generator."""
    rng = np.random.default_rng([seed, 0x6F72])
    d = size.width

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * (0.02 * scale)).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.ones(d, np.float32), f"{name}.bias": np.zeros(d, np.float32)}

    weights: dict[str, Any] = {
        "transformer.wte.weight": normal(vocab, d),
        "transformer.wpe.weight": normal(size.context, d),
    }
    residual = (2 * size.layers) ** -0.5
    for i in range(size.layers):
        h = f"transformer.h.{i}."
        weights |= norm(h + "ln_1") | norm(h + "ln_2")
        for name, shape, scale in (
            ("attn.c_attn", (d, 3 * d), 1.0),
            ("attn.c_proj", (d, d), residual),
            ("mlp.c_fc", (d, 4 * d), 1.0),
            ("mlp.c_proj", (4 * d, d), residual),
        ):
            weights[f"{h}{name}.weight"] = normal(*shape, scale=scale)
            weights[f"{h}{name}.bias"] = np.zeros(shape[1], np.float32)
    return weights | norm("transformer.ln_f")


METHOD = Method(
    name="pretrain",
    summary="pre-training of a new, small model from random weights",
    Recipe=Recipe,
    start=start,
    dataset=dataset,
    loss=lambda recipe: sft.loss,
)
