"""Inputs of a benchmark: a model folder, perhaps with random weights, and instruction-like rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.convert import hub
from mlx_posttrain.data.labelled import exchange
from mlx_posttrain.data.types import Example, Judged, Labelled
from mlx_posttrain.engines.base import hidden_size, initial_head
from mlx_posttrain.errors import UserError

#: GPT-2's published sizes: layers, heads, width (Radford et al. 2019, table 2).
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
VOCABULARY, CONTEXT = 50257, 1024


@dataclass(frozen=True)
class Shape:
    """Number and size of a benchmark's rows.

    Every row has ``length`` tokens, or where that is None a prompt of 20 to 60 and an answer of 10 to 200.
    paired: every two neighbours have one prompt, and answers of 10 to 100.
    """

    rows: int = 32
    length: int | None = None
    batch_size: int = 8
    paired: bool = False


def rows(shape: Shape, vocabulary: int, seed: int = 0) -> list[Example]:
    """Rows of random tokens with their answers trained, the same in every process.

    Token frequencies follow Zipf's law.
    """
    rng = np.random.default_rng([seed, 0xBE7C4])
    found: list[Example] = []
    for i in range(shape.rows):
        second = shape.paired and i % 2 == 1
        asked = found[-1].tokens[: found[-1].answer_start] if second else ()
        prompt = len(asked) or int(rng.integers(20, 61))
        answer = int(rng.integers(10, 101 if shape.paired else 201))
        if shape.length is not None:
            prompt = max(1, shape.length // 8)
            answer = shape.length - prompt
        tokens = np.minimum(rng.zipf(1.2, prompt + answer), vocabulary - 2)
        tokens[: len(asked)] = asked
        found.append(Example(tuple(tokens.tolist()), (False,) * prompt + (True,) * answer))
    return found


def labelled(examples: Sequence[Example], batch_size: int) -> list[Judged]:
    """The first of every two rows as an answer, good and bad in turns, with its mismatched answer.

    That is the answer before it, or the last one, of the same batch of ``batch_size`` answers, as in TRL.
    """
    answers, found = examples[::2], []
    for begin in range(0, len(answers), batch_size):
        part = answers[begin : begin + batch_size]
        for i, answer in enumerate(part):
            row = Labelled(prompt=(), completion="", label=i % 2 == 0)
            found.append(Judged(answer, exchange(answer, part[i - 1]), row.label, begin + i, row))
    return found


def model_folder(name: str, scratch: Path) -> Path:
    """The folder of a model.

    A name of ``SIZES`` gets random weights, written to ``scratch``; any other name means what it means to
    every other command. Raises UserError as loading does.
    """
    if name not in SIZES or Path(name).exists():
        from mlx_posttrain.models.merge import base_folder

        return base_folder(name)
    from safetensors.numpy import save_file

    from mlx_posttrain.methods.pretrain import PretrainSection, gpt2_config, random_weights

    layers, heads, model_width = SIZES[name]
    size = PretrainSection(
        vocab_size=VOCABULARY, layers=layers, heads=heads, width=model_width, context=CONTEXT
    )
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(gpt2_config(VOCABULARY, size, eos=VOCABULARY - 1), indent=2) + "\n"
    )
    save_file(random_weights(VOCABULARY, size, 0), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose words are its token numbers, because random weights come with none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(
        models.WordLevel({str(i): i for i in range(VOCABULARY - 1)} | {end: VOCABULARY - 1}, unk_token=end)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="")
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def reward_folder(folder: Path, scratch: Path) -> Path:
    """Write a reward model with the same weights and a random head, as a sequence classifier.

    Raises UserError for an architecture whose classifier is not GPT-2's.
    """
    from mlx_posttrain.convert import weights
    from mlx_posttrain.engines import files

    config = hub.check_config(folder)
    if config["model_type"] != "gpt2":
        raise UserError(
            f"bench: PPO is measured on GPT-2 only, not on {config['model_type']}; leave ppo out of --what"
        )
    target = scratch / "reward"
    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Any] = {
        f"transformer.{name.removeprefix('transformer.')}": np.array(value)
        for name, value in weights.load_weights(folder).items()
        if not name.startswith("lm_head")  # a copy of the embedding
    }
    tensors[files.HEAD] = initial_head(hidden_size(config), 0)
    files.save_model(target, tensors, folder, pad=config["eos_token_id"])
    return target
