"""An adapter folded into its base: a model folder that needs no adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_posttrain import runs
from mlx_posttrain.console import log
from mlx_posttrain.convert import adapters, hub, merge, names, token_rows, weights
from mlx_posttrain.convert.arrays import like, require_mlx
from mlx_posttrain.engines import files
from mlx_posttrain.models.prompt_format import write_prompt_format, write_tokenizer
from mlx_posttrain.models.source import Source, starting_folder
from mlx_posttrain.models.tokenizer import load_tokenizer, pad_id


def base_folder(name: str | Path) -> Path:
    """The folder of full weights that a new run starts from.

    An adapter run is merged once, beside its ``final/``.

    A base that is quantised is taken back to float32 for that. Raises UserError as starting_folder.
    """
    folder, unmerged = starting_folder(name)
    if unmerged is not None:
        _merge_into(folder, unmerged)
    return folder


def merge_below(source: Source) -> None:
    """Merge the adapter run that a source's folder is made of, where that has not been done."""
    if source.unmerged is not None and not source.folder.is_dir():
        _merge_into(source.folder, source.unmerged)


def _merge_into(merged: Path, source: Source) -> None:
    merge_below(source)
    if hub.check_config(source.folder).get("quantization"):
        log(
            f"{source.folder} is quantised: the adapter {source.adapter} is merged into its weights as "
            "float32, several times their size"
        )
    runs.replace_folder(merged, lambda folder: write_merged(source, folder))


def write_merged(source: Source, folder: Path, *, as_base: bool = False) -> None:
    """Write base plus adapter as a model folder.

    In float32 where the run computed so, since 16 bits round small updates away, or with ``as_base`` in the
    base's number format. The sums are in float32 either way. A base that was quantised is dequantised first.
    """
    assert source.adapter is not None
    config, modules = adapters.read_adapter(source.adapter)
    base = _base_weights(source, as_base)
    base.pop(files.HEAD, None)
    merged = merge.merge(base, modules, config, model_type(source))
    rows = token_rows.read_rows(source.adapter)
    if rows is not None:
        tied = hub.check_config(source.folder).get("tie_word_embeddings", model_type(source) == "gpt2")
        merged = token_rows.merge(merged, rows, tied)
    head = files.read_head(source.adapter)
    if head is None:
        files.save_model(folder, merged, source.folder)
        write_prompt_format(folder, source)
        return
    pad = pad_id(hub.check_config(source.folder), load_tokenizer(source.folder))
    files.save_model(
        folder, {**merged, files.HEAD: like(head, next(iter(merged.values())))}, source.folder, pad
    )
    write_tokenizer(folder, source)


def _base_weights(source: Source, as_base: bool) -> dict[str, Any]:
    if base_bits(source):
        require_mlx("dequantising")
        from mlx_posttrain.engines.mlx.load import dequantised_weights

        group = ((source.recipe or {}).get("adapter") or {}).get("group_size", 64)
        dtype = source.dtype or "float32"
        found = dequantised_weights(source.folder, source.quantize, group, dtype)
    else:
        found = weights.load_weights(source.folder)
    if not as_base and source.dtype in (None, "float32"):
        found = {name: weights.cast(name, value, "float32") for name, value in found.items()}
    return names.hf_weights(found, hub.check_config(source.folder))


def base_bits(source: Source) -> int | None:
    """Bits of a run's base: quantised for the run (QLoRA), or a folder that was quantised before."""
    return source.quantize or (hub.check_config(source.folder).get("quantization") or {}).get("bits")


def model_type(source: Source) -> str:
    """The architecture's name in config.json."""
    return str(hub.check_config(source.folder)["model_type"])
