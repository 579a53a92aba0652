"""Model folders and PEFT adapter folders in Hugging Face's format, as both engines write and read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain.convert import adapters, gpt2, token_rows, weights
from mlx_posttrain.convert import names as layer_names
from mlx_posttrain.convert.arrays import read_float32
from mlx_posttrain.convert.files import copy_tokenizer, write_json
from mlx_posttrain.convert.hub import check_config, weight_files
from mlx_posttrain.engines.base import AdapterSpec
from mlx_posttrain.errors import UserError

#: layer path under Hugging Face's name -> {"lora_a": [in, r], "lora_b": [r, out], "m": [out] for DoRA},
#: float32
Adapter = dict[str, dict[str, np.ndarray]]

#: Name of the scalar head in a *ForSequenceClassification with one label.
HEAD = "score.weight"
#: A language model's scalar head lies in a file beside it that transformers does not read.
HEAD_FILE = "head.safetensors"


def save_model(folder: Path, tensors: Mapping[str, Any], base: Path, pad: int | None = None) -> None:
    """Write a model folder that transformers loads.

    tensors: weights under Hugging Face's names; with ``score.weight`` among them the folder becomes a
    sequence classifier with one label that pools by ``pad``. base: the folder whose config and tokenizer
    files are taken; ``vocab_size`` is that of the tensors.
    """
    given = check_config(base)
    if given["model_type"] == "gpt_neox":
        tensors = layer_names.to_hf(tensors, "gpt_neox")
    if HEAD in tensors:
        heads = ("lm_head.weight", "embed_out.weight")
        tensors = {name: value for name, value in tensors.items() if name not in heads}
    weights.save_weights(folder, tensors)
    config = {
        k: v
        for k, v in given.items()
        if k not in ("torch_dtype", "_name_or_path", "quantization", "quantization_config")
    }
    config["vocab_size"] = token_rows.vocabulary(tensors) or config.get("vocab_size")
    config["dtype"] = str(next(iter(tensors.values())).dtype).rpartition(".")[2]
    if config.get("model_type") == "gpt2":
        config = {**gpt2.completed(config), "architectures": ["GPT2LMHeadModel"]}
    if HEAD in tensors:
        name = str((config.get("architectures") or [""])[0])
        stem = re.sub(r"(LMHeadModel|ForCausalLM|ForSequenceClassification)$", "", name)
        config |= {
            "architectures": [f"{stem}ForSequenceClassification"],
            "num_labels": 1,
            "pad_token_id": pad,
        }
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    write_json(folder / "config.json", config)
    tokens = {
        k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None
    }
    if HEAD in tensors:
        pass  # a classifier generates nothing
    elif (base / "generation_config.json").is_file():
        (folder / "generation_config.json").write_bytes((base / "generation_config.json").read_bytes())
    else:
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    copy_tokenizer(base, folder)


def check_names(folder: Path, config: Mapping[str, Any], trained: Sequence[str]) -> None:
    """Raise UserError where a trained tensor has no namesake in the folder, and so could not be saved.

    trained: tensors' names, Hugging Face's. An engine may hold tensors in another form, for example experts
    joined into one.
    """
    from safetensors import safe_open

    if config["model_type"] == "gpt2":
        return  # whose names and layouts are converted and checked one by one
    known = {HEAD}
    for file in weight_files(folder):
        with safe_open(folder / file, "numpy") as f:
            known |= {layer_names.hf_path(name, config["model_type"]) for name in f.keys()}  # noqa: SIM118
    odd = sorted(name for name in trained if layer_names.hf_path(name, config["model_type"]) not in known)
    if odd:
        raise UserError(
            f"{folder}: {odd[0]} cannot be trained on this engine: {config['model_type']}'s files have no "
            "tensor of that name, so it could not be saved; train an adapter on other layers (adapter.rank, "
            "adapter.targets)"
        )


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a model folder's config says that it is a sequence classifier."""
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")


def save_head(folder: Path, weight: np.ndarray) -> None:
    """Write a scalar head [1, width] beside the model or adapter in ``folder``."""
    from safetensors.numpy import save_file

    save_file({HEAD: np.ascontiguousarray(weight, np.float32)}, folder / HEAD_FILE)


def read_head(folder: Path) -> np.ndarray | None:
    """The scalar head in a folder, [1, width] float32; None where there is none.

    It is a classifier's, a classifier adapter's, or in a file beside a model. Raises UserError for a head
    with several labels.
    """
    from safetensors import safe_open

    if (folder / HEAD_FILE).is_file():
        names = [HEAD_FILE]
    elif (folder / adapters.TENSORS).is_file():
        names = [adapters.TENSORS]
    else:
        names = weight_files(folder)
    for name in names:
        with safe_open(folder / name, "numpy") as f:
            for key in f.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                if key.removeprefix(adapters.PREFIX) == HEAD:
                    weight = read_float32(folder / name)[key]
                    if weight.ndim != 2 or len(weight) != 1:
                        raise UserError(
                            f"{folder}: its head has shape {weight.shape}; a reward model has one label, so "
                            "(1, width)"
                        )
                    return weight
    return None


def save_adapter(
    folder: Path,
    modules: Adapter,
    spec: AdapterSpec,
    model_type: str,
    base: str,
    head: np.ndarray | None = None,
    rows: token_rows.TokenRows | None = None,
) -> None:
    """Write a PEFT adapter folder.

    With ``head`` [1, width] the task type is SEQ_CLS and the head is among the tensors. Such a model has no
    other head, and so no rows of it.
    """
    if rows is not None and head is not None:
        rows = replace(rows, head=None)
    adapters.save_adapter(
        folder,
        modules,
        base_model=base,
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=spec.dropout,
        targets=list(spec.targets or ()),
        rslora=spec.rslora,
        dora=spec.kind == "dora",
        fan_in_fan_out=model_type == "gpt2",
        head=head,
        rows=rows,
    )


def read_adapter(folder: Path, layers: Mapping[str, tuple[int, int]]) -> Adapter:
    """Read the tensors of a PEFT adapter folder for exactly these layers.

    layers: (in, out) of each, their widths. Raises UserError when the adapter's layers are others.
    """
    _, modules = adapters.read_adapter(folder)
    modules = {adapters.hf_path(path): parts for path, parts in modules.items()}
    if set(modules) != set(layers):
        odd = sorted(set(modules) ^ set(layers))[0]
        raise UserError(
            f"{folder}: the adapter and the model's adapted layers differ, for example in {odd}; set "
            "adapter.targets to the adapter's own"
        )
    for path, parts in modules.items():
        a, b = parts["lora_a"].shape, parts["lora_b"].shape
        if (a[0], b[1]) != layers[path]:
            raise UserError(
                f"{folder}: the adapter was made for another model: its matrices of {path} are {a} and {b}, "
                f"and the layer is {layers[path]} (in, out)"
            )
    return {
        path: {name: np.asarray(value, np.float32) for name, value in parts.items()}
        for path, parts in modules.items()
    }


def read_rows(folder: Path, tokens: Sequence[int]) -> token_rows.TokenRows:
    """Read the rows of an embedding in a PEFT adapter folder, for exactly these tokens.

    Raises UserError when the adapter's are others.
    """
    rows = token_rows.read_rows(folder)
    if rows is None or rows.tokens != tuple(tokens):
        raise UserError(
            f"{folder}: the adapter's new tokens and the model's differ: it belongs to another run"
        )
    return rows


def spec_of(folder: Path, dropout: float | None = None) -> AdapterSpec:
    """The spec of a PEFT adapter folder, to put the same adapter on a model before loading it.

    dropout: in place of the adapter's own. Raises UserError where the layers differ in rank or alpha.
    """
    config, modules = adapters.read_adapter(folder)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UserError(
            f"{folder}: the adapter's layers differ in rank or alpha (rank_pattern); merge it with PEFT and "
            "start from that model"
        )
    # The layers themselves, not target_modules: PEFT also writes patterns and "all-linear" there.
    config["target_modules"] = sorted(adapters.hf_path(path) for path in modules)
    rows = token_rows.read_rows(folder)
    return AdapterSpec(
        kind="dora" if config.get("use_dora") else "lora",
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0) if dropout is None else dropout,
        rslora=config["use_rslora"],
        targets=tuple(config["target_modules"]),
        tokens=() if rows is None else rows.tokens,
    )


def torch_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A folder's tensors as torch tensors under transformers' names, whichever layout the folder has."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in weight_files(folder):
        tensors.update(load_file(folder / file))
    return layer_names.hf_weights(tensors, config)
