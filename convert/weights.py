"""Weight files, and conversion of whole models between Hugging Face's and mlx-lm's folders."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain.errors import UserError

from . import gpt2, mlx_config
from .arrays import library, require_mlx
from .checks import check_finite, check_links, check_tokens
from .files import copy_tokenizer, home, output_folder, require_space, write_atomically, write_json
from .hub import check_config, check_tensors, resolve, weight_files

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "float16", "bfloat16")
BITS = (2, 3, 4, 5, 6, 8)
INDEX = "model.safetensors.index.json"

# Options of transformers' GPT-2 that mlx-lm's GPT-2 ignores, with the values for which both compute the same.
GPT2_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


class Converted(NamedTuple):
    """The result of `convert`."""

    path: Path
    model_type: str
    tensors: int  # their number
    bytes: int
    bits: int | None  # of a quantised model


def load_weights(path: Path) -> dict[str, Any]:
    """Return a model folder's tensors by name, from one safetensors file or from shards.

    They are MLX arrays, whose data is read on first use, or torch tensors if MLX is not installed.

    Raises:
        UserError: no safetensors weights, a shard that the index names is missing, or a file is cut off or
            not safetensors.
    """
    load: Callable[[str], Any]
    try:
        from mlx.core import load
    except ImportError:  # Intel Macs
        from safetensors.torch import load_file as load

    weights: dict[str, Any] = {}
    for file in _checked_files(path):
        weights.update(load(str(file)))
    return weights


def save_weights(
    path: Path, weights: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES, format: str = "pt"
) -> list[str]:
    """Write tensors (MLX, torch or NumPy) as model.safetensors, or as shards, and return the file names.

    Shards are numbered and have an index. Every file is written under a temporary name and renamed when all
    are complete; weight files of an earlier model in the folder are removed. `format` is the metadata entry
    that transformers reads ("pt"; "mlx" in mlx-lm's folders).

    Raises:
        UserError: not enough disk space.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=_nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    require_space(path, sum(_nbytes(w) for w in weights.values()))
    path.mkdir(parents=True, exist_ok=True)
    pending: dict[str, Path] = {}
    try:
        for name, keys in split.filename_to_tensors.items():
            pending[name] = path / f".tmp-{name}"
            _write_safetensors(pending[name], {key: weights[key] for key in keys}, format)
        for name, temporary in pending.items():
            temporary.replace(path / name)
    finally:
        for temporary in pending.values():
            temporary.unlink(missing_ok=True)
    if split.is_sharded:
        write_json(path / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    for stale in path.glob("model*.safetensors"):
        if stale.name not in pending:
            stale.unlink()
    if not split.is_sharded:
        (path / INDEX).unlink(missing_ok=True)
    return sorted(pending)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "mlx",
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Convert a model folder or hub id to a folder for mlx-lm (`to` "mlx") or transformers ("hf").

    A GPT-2 keeps every tensor bit for bit unless `dtype` or `quantize` (bits, through mlx-lm's
    quantize_model) are given. Other architectures go through mlx-lm's own conversion, to "mlx" only.
    Tokenizer files are copied byte for byte, see `copy_tokenizer`. `dst` appears only when everything is
    written.

    Raises:
        UserError: unusable options or source, a GPT-2 variant that mlx-lm would compute wrongly, `dst` in use
            without `force`, or no disk space.
    """
    _check_options(to, dtype, quantize, group_size)
    source, target = resolve(src), home(dst)
    check_links(source)
    config = check_config(source)
    check_tokens(source, config)
    model_type = config["model_type"]
    if model_type != "gpt2":
        if to == "hf":
            raise UserError(
                f"{src} is {model_type}; only GPT-2 converts to Hugging Face's format, use the original model"
            )
        with output_folder(target, force) as folder:
            _convert_with_mlx_lm(source, folder, model_type, dtype, quantize, group_size)
            return _summary(folder, target, model_type, quantize)
    config = gpt2_config(config)
    weights = _load_gpt2(source, config, dtype)
    check_finite(weights.items(), source)
    if gpt2.same_head(weights):
        del weights["lm_head.weight"]
    if "lm_head.weight" in weights and to == "mlx":
        raise UserError(
            f"{src} has an output head of its own (tie_word_embeddings false), which mlx-lm's GPT-2 does not "
            "have; use it as it is, or convert it --to hf"
        )
    for key in ("quantization", "quantization_config"):
        # The weights are dequantised by now: a quantised model without a dtype was refused.
        config.pop(key, None)
    # An identical head was dropped, so the model is tied whatever config.json says.
    config["tie_word_embeddings"] = "lm_head.weight" not in weights
    with output_folder(target, force) as folder:
        if to == "hf":
            _write_hf(source, folder, weights, config, max_shard_bytes)
        else:
            if quantize:
                weights, config = _quantise(weights, config, quantize, group_size)
            config = {**_with_dtype(config, weights), "architectures": ["GPT2LMHeadModel"]}
            save_weights(folder, weights, max_shard_bytes, format="mlx")
            write_json(folder / "config.json", config)
            _copy_if_present(source / "generation_config.json", folder)
        copy_tokenizer(source, folder)
        return _summary(folder, target, model_type, quantize)


def gpt2_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a GPT-2 config completed as `gpt2.completed` does.

    Raises:
        UserError: a head that is not a language model's, or an option with which mlx-lm's GPT-2 would compute
            something else.
    """
    full = gpt2.completed(config)
    for key, allowed in GPT2_FIXED.items():
        if full.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"config.json has {key} {full[key]!r}, which mlx-lm's GPT-2 does not compute; "
                f"supported: {allowed[0]!r}; use engine=torch"
            )
    if full.get("n_inner") not in (None, 4 * full["n_embd"]):
        raise UserError(
            f"config.json has n_inner {full['n_inner']}; mlx-lm's GPT-2 has 4 * n_embd = "
            f"{4 * full['n_embd']} only; use engine=torch"
        )
    architectures = full.get("architectures") or ["GPT2LMHeadModel"]
    if not {"GPT2LMHeadModel", "GPT2Model"} & set(architectures):
        raise UserError(
            f"config.json names {architectures[0]}; only GPT-2 language models (GPT2LMHeadModel) convert"
        )
    return full


def _checked_files(path: Path) -> Iterator[Path]:
    names = weight_files(path)
    if not names:
        raise UserError(f"{path} has no model.safetensors; only safetensors weights load")
    for name in names:
        file = path / name
        if not file.is_file():
            raise UserError(
                f"{path} lacks the shard {name} that {INDEX} names; download or copy the model again"
            )
        check_tensors(file)
        yield file


def _nbytes(array: Any) -> int:
    return int(array.nbytes)


def _write_safetensors(path: Path, tensors: dict[str, Any], format: str) -> None:
    library = type(next(iter(tensors.values()))).__module__.split(".")[0] if tensors else "numpy"
    if library == "mlx":
        import mlx.core as mx

        mx.save_safetensors(str(path), tensors, metadata={"format": format})
    elif library == "torch":
        from safetensors.torch import save_file as save_torch

        save_torch(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": format},
        )
    else:
        import numpy as np
        from safetensors.numpy import save_file as save_numpy

        save_numpy(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            path,
            metadata={"format": format},
        )


def _check_options(to: str, dtype: str | None, quantize: int | None, group_size: int | None) -> None:
    if to not in ("mlx", "hf"):
        raise UserError(f"cannot convert to {to!r}; choose mlx or hf")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if quantize is not None and quantize not in BITS:
        raise UserError(f"cannot quantise to {quantize} bits; choose one of {', '.join(map(str, BITS))}")
    if quantize is not None and to == "hf":
        raise UserError("quantised weights are MLX's own; use quantize with to mlx only")
    if group_size is not None and group_size not in (32, 64, 128):
        raise UserError(f"unknown group size {group_size}; choose 32, 64 or 128")


def _load_gpt2(source: Path, config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a GPT-2 folder's weights under mlx-lm's names, dequantised and cast if `dtype` is given."""
    if "quantization" in config or "quantization_config" in config:
        if dtype is None:
            raise UserError(
                f"{source} is quantised; give a dtype (float16, bfloat16 or float32) to "
                "dequantise it (lost bits stay lost)"
            )
        weights = _dequantised(source)
    else:
        weights = load_weights(source)
    weights = gpt2.hf_to_mlx(weights, config["n_layer"], config.get("tie_word_embeddings", True))
    gpt2.check_shapes(weights, config)
    if dtype is None:
        return weights
    return {name: cast(name, w, dtype) for name, w in weights.items()}


def _dequantised(source: Path) -> dict[str, Any]:
    require_mlx("dequantising")
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    list(_checked_files(source))
    try:
        model, _ = load_model(source, lazy=True)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{source} is quantised in a way that mlx-lm cannot read: {' '.join(str(error).split())[:200]}"
        ) from None
    return dict(tree_flatten(dequantize_model(model).parameters()))


def cast(name: str, array: Any, dtype: str) -> Any:
    """Return a floating MLX or torch array as `dtype`, and any other array unchanged.

    `name` is for errors.

    Raises:
        UserError: a finite value is beyond float16's range.
    """
    if library(array) == "torch":
        import torch

        if not array.is_floating_point():
            return array
        result, isfinite = array.to(getattr(torch, dtype)), torch.isfinite
    else:
        import mlx.core as mx

        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        result, isfinite = array.astype(getattr(mx, dtype)), mx.isfinite
    if (
        dtype == "float16"
        and array.dtype != result.dtype
        and not isfinite(result).all()
        and isfinite(array).all()
    ):
        raise UserError(f"{name} holds values beyond float16's range (65504); choose bfloat16 or float32")
    return result


def _quantise(
    weights: dict[str, Any], config: dict[str, Any], bits: int, group_size: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    require_mlx("quantising")
    from mlx.utils import tree_flatten
    from mlx_lm.models.gpt2 import Model, ModelArgs
    from mlx_lm.utils import quantize_model

    group_size = group_size or next((g for g in (64, 32) if config["n_embd"] % g == 0), None)
    if group_size is None or config["n_embd"] % group_size:
        raise UserError(
            f"n_embd {config['n_embd']} is not a multiple of the group size {group_size or 32}, "
            "so no matrix can be quantised"
        )
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(list(weights.items()))
    with contextlib.redirect_stdout(io.StringIO()):  # quantize_model prints a line
        model, config = quantize_model(model, config, group_size, bits)
    return dict(tree_flatten(model.parameters())), config


def _write_hf(
    source: Path, folder: Path, weights: dict[str, Any], config: dict[str, Any], max_shard_bytes: int
) -> None:
    save_weights(folder, gpt2.mlx_to_hf(weights), max_shard_bytes, format="pt")
    config = {**_with_dtype(config, weights), "architectures": ["GPT2LMHeadModel"]}
    write_json(folder / "config.json", config)
    if not _copy_if_present(source / "generation_config.json", folder):
        tokens = {
            key: config[key]
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if config.get(key) is not None
        }
        write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})


def _with_dtype(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the weights' floating type as `dtype`, without the older key for it."""
    name = str(weights["model.ln_f.weight"].dtype).rpartition(".")[2]
    return {**{k: v for k, v in config.items() if k not in ("torch_dtype", "_name_or_path")}, "dtype": name}


def _copy_if_present(file: Path, folder: Path) -> bool:
    """Copy a file into a folder and return whether it exists."""
    if not file.is_file():
        return False
    write_atomically(folder / file.name, lambda p: p.write_bytes(file.read_bytes()))
    return True


def _convert_with_mlx_lm(
    source: Path, folder: Path, model_type: str, dtype: str | None, bits: int | None, group_size: int | None
) -> None:
    """Run mlx-lm's own conversion into an empty folder, on a config.json that it understands."""
    require_mlx(f"converting {model_type}")
    from mlx_lm.convert import convert as mlx_lm_convert

    require_space(folder, sum(file.stat().st_size for file in _checked_files(source)))
    check_finite(load_weights(source).items(), source)
    config = mlx_config.for_mlx_lm(source, check_config(source))
    inner = folder / "model"
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as readable:
            for file in source.iterdir():
                if file.is_file() and file.suffix != ".py" and file.name != "config.json":
                    (Path(readable) / file.name).symlink_to(file.absolute())
            write_json(Path(readable) / "config.json", config)
            mlx_lm_convert(
                readable,
                str(inner),
                quantize=bits is not None,
                q_bits=bits,
                q_group_size=group_size,
                dtype=dtype,
            )
    except UserError:
        raise
    except Exception as error:  # mlx-lm trusts a config, and fails anywhere where that is wrong
        raise UserError(
            f"mlx-lm cannot convert {source} ({model_type}): {' '.join(str(error).split())[:200]}"
        ) from None
    for file in inner.iterdir():
        file.replace(folder / file.name)
    inner.rmdir()
    copy_tokenizer(source, folder)


def _summary(folder: Path, target: Path, model_type: str, bits: int | None) -> Converted:
    from safetensors import safe_open

    names = weight_files(folder)
    tensors = 0
    for name in names:
        with safe_open(str(folder / name), framework="np") as file:
            tensors += len(list(file.keys()))
    return Converted(target, model_type, tensors, sum((folder / name).stat().st_size for name in names), bits)
