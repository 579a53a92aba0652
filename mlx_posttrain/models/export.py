"""Export of a run for PEFT, transformers, mlx-lm or llama.cpp, merged or not, with a model card.

Runs already use Hugging Face's formats, so most of this is copying. An adapter trained on a quantised base
needs more care: when it is merged into that base, rounding to the grid swallows small updates, and on the
unquantised base its outputs differ from those in training. Both effects on the logits are measured, printed,
and written into the card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_posttrain import engines
from mlx_posttrain.convert import adapters, gguf_file, merge, token_rows, weights
from mlx_posttrain.convert.arrays import require_mlx
from mlx_posttrain.convert.files import home, output_folder, read_json
from mlx_posttrain.data.tokens import bos_ids, stop_ids
from mlx_posttrain.engines import files
from mlx_posttrain.errors import UserError
from mlx_posttrain.models import dtypes
from mlx_posttrain.models.card import base_name, model_card
from mlx_posttrain.models.merge import base_bits, merge_below, model_type, write_merged
from mlx_posttrain.models.ollama import NO_TEMPLATE, modelfile
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.prompt_format import own_chat_template, write_prompt_format, write_tokenizer
from mlx_posttrain.models.source import Source, locate, saves_language_model
from mlx_posttrain.models.tokenizer import load_tokenizer
from mlx_posttrain.models.usage import gguf_usage, usage

FORMATS = ("peft", "hf", "mlx-lm", "gguf")

#: A GGUF file's number format unless another is asked for: llama.cpp's own quantiser starts from it.
GGUF_DTYPE = "float16"

#: Largest share of the adapter's effect on the logits that a merge into a quantised base may lose. At .25 the
#: greedy answers of the embedded model still agree almost everywhere; a small adapter on a 4-bit base loses
#: much more.
MAX_LOST = 0.25


def export(
    run: str | Path,
    destination: str | Path,
    to: str = "peft",
    *,
    merged: bool = False,
    force: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a finished run for another program.

    Formats: peft, an adapter folder; hf, a model folder for transformers (an adapter run needs ``merged``);
    mlx-lm, a model folder or, for an adapter run without ``merged``, an adapter folder, for mlx-lm; gguf, one
    file for llama.cpp and Ollama with an adapter merged, in the number format ``dtype`` (GGUF_DTYPE if None).

    Returns {"path", "format", "merged"} and, if the export differs from the run, "drift" and a "note". Raises
    UserError for an unknown format, a run that cannot be written in that format, a destination in use
    (``force`` writes into it), or a quantised merge that would lose more than MAX_LOST of the adapter's
    effect (``force`` does it anyway).
    """
    if to not in FORMATS:
        raise UserError(f"cannot export to {to!r}; formats: {', '.join(FORMATS)}")
    if dtype is not None and to != "gguf":
        raise UserError(f"--dtype is for --to gguf; --to {to} keeps the run's number format")
    if dtype is not None and dtype not in gguf_file.TYPES:
        raise UserError(f"a GGUF file has no --dtype {dtype}; there are {', '.join(gguf_file.TYPES)}")
    source = locate(run)
    target = home(destination)
    if source.adapter is None and to == "peft":
        raise UserError(f"{run} trained all weights and has no adapter: use --to hf")
    if source.adapter is None and merged:
        raise UserError(f"{run} trained all weights, so there is no adapter to merge: leave out --merge")
    if source.adapter is not None and to == "hf" and not merged:
        raise UserError(f"{run} is an adapter: add --merge for a model folder, or use --to peft")
    if merged and to == "peft":
        raise UserError(
            "--merge folds the adapter into its base, so there is nothing left for --to peft: "
            "use --to hf or --to mlx-lm"
        )
    summary: dict[str, Any] = {
        "path": str(target),
        "format": to,
        "merged": (merged or to == "gguf") and source.adapter is not None,
    }
    with output_folder(target, force) as folder:
        if to == "gguf":
            summary |= _write_gguf(source, Path(run), folder, dtype or GGUF_DTYPE)
        elif source.adapter is None:
            _write_full(source, folder, to)
        elif not merged:
            if to == "peft":
                _write_peft(source, folder)
            elif token_rows.has_rows(source.adapter):
                raise UserError(
                    f"{run} has new tokens, for which mlx-lm's adapters have no place: add --merge, or use "
                    "--to peft"
                )
            else:
                config, modules = adapters.read_adapter(source.adapter, model_type(source))
                adapters.to_mlx_lm(folder, modules, config, model_type(source))
            if source.quantize:
                summary |= _on_unquantised_base(source, run)
        elif to == "mlx-lm" and base_bits(source):
            summary |= _requantised(source, run, folder, force)
        elif to == "mlx-lm":
            with _temporary(folder) as intermediate:
                write_merged(source, intermediate, as_base=True)
                weights.convert(intermediate, folder, to="mlx", force=True)
        else:
            write_merged(source, folder, as_base=True)
        if to == "gguf":
            pass  # tokenizer and prompt format are in the file
        elif not _is_classifier(source):
            write_prompt_format(folder, source)
        elif source.adapter is not None and token_rows.has_rows(source.adapter):
            write_tokenizer(folder, source)
        note = f"\n## Difference from the run\n\n{summary['note']}\n" if "note" in summary else ""
        (folder / "README.md").write_text(_card(source, run, to, merged, dtype) + note, encoding="utf-8")
    return summary


def is_export(folder: Path, run: str | Path, to: str, merged: bool, dtype: str | None = None) -> bool:
    """Return whether ``folder`` holds the export that :func:`export` writes with these arguments.

    It compares the card, which is written last.
    """
    card_file = folder / "README.md"
    return card_file.is_file() and card_file.read_text(encoding="utf-8").startswith(
        _card(locate(run), run, to, merged, dtype)
    )


def gguf_name(dtype: str) -> str:
    """The name of an export's GGUF file."""
    return f"model-{gguf_file.TYPES[dtype].lower()}.gguf"


def push(folder: Path, repo: str) -> str:
    """Upload an exported folder to the hub and return its address.

    Raises UserError if not logged in, refused, or without a network.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo))
    # the hub's own errors, and those of its HTTP library, which differs between releases
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"upload to {repo} failed: {reason}; the folder {folder} is complete: log in with `hf auth "
            "login` or restore the network, "
            "and give the same command again"
        ) from None


def _card(source: Source, run: str | Path, to: str, merged: bool, dtype: str | None) -> str:
    how = None if _is_classifier(source) else partial(usage, source, to, merged)
    if to == "gguf":
        how = partial(gguf_usage, source, gguf_name(dtype or GGUF_DTYPE))
    return model_card(source, Path(run), to, source.adapter is not None and (merged or to == "gguf"), how)


def _is_classifier(source: Source) -> bool:
    return not saves_language_model(source.adapter or source.folder)


def _write_full(source: Source, folder: Path, to: str) -> None:
    if to == "mlx-lm":
        weights.convert(source.folder, folder, to="mlx", force=True)
        return
    for file in source.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _write_gguf(source: Source, run: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Write a GGUF file and a Modelfile, and say where Ollama's prompts are not the run's."""
    gguf_file.require_gguf()
    if _is_classifier(source):
        raise UserError(f"{run} is a reward model, which llama.cpp does not run: use --to hf")
    merge_below(source)
    with _temporary(folder) as made:
        if source.adapter is None:
            model = source.folder
            for name in ("config.json", "generation_config.json"):  # which names ends of answers
                if (model / name).is_file():
                    shutil.copyfile(model / name, made / name)
            write_prompt_format(made, source)
        else:
            model = made
            write_merged(source, model, as_base=True)
        tokenizer, template = load_tokenizer(made), own_chat_template(made)
        config, ends, bos = gguf_file.check_model(model), stop_ids(tokenizer), bool(bos_ids(tokenizer))
        gguf_file.write_gguf(
            model,
            folder / gguf_name(dtype),
            tokenizer,
            dtype=dtype,
            name=run.resolve().name,
            template=template,
            ends=ends,
            bos=bos,
        )
    context = gguf_file.context_length(config)
    recipe = modelfile(gguf_name(dtype), tokenizer, template, ends, context)
    (folder / "Modelfile").write_text(recipe, encoding="utf-8")
    missing = [line for line in recipe.splitlines() if line.startswith(NO_TEMPLATE)]
    return {"note": f"The Modelfile has {missing[0].removeprefix('# ')}"} if missing else {}


def _write_peft(source: Source, folder: Path) -> None:
    assert source.adapter is not None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source.adapter / name, folder / name)
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = base_name(source)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _temporary(folder: Path) -> Any:
    import tempfile

    class Folder(tempfile.TemporaryDirectory):
        def __enter__(self) -> Path:
            return Path(super().__enter__())

    return Folder(dir=folder, prefix=".merge.")


def _model_and_probe(source: Source, run: str | Path) -> tuple[Any, np.ndarray]:
    """Return the run's model on MLX, and token ids [4, 32] to compare logits on."""
    assert source.adapter is not None
    model = open_model(run, "mlx", scores=files.read_head(source.adapter) is not None)[0]
    return model, np.random.default_rng(0).integers(0, model.config["vocab_size"], (4, 32))


def _on_unquantised_base(source: Source, run: str | Path) -> dict[str, Any]:
    """Return what the adapter loses on the unquantised base, on which other programs load it."""
    assert source.adapter is not None
    trained = (
        f"The adapter was trained on a base quantised to {source.quantize} bits; on the unquantised base"
    )
    if "mlx" not in engines.available():
        return {
            "note": f"{trained} it answers differently; how much was not measured, as MLX is not installed."
        }
    model, probe = _model_and_probe(source, run)
    adapted = model.full_logits(probe)
    with model.adapters_off():
        base = model.full_logits(probe)
    spec, mlx = files.spec_of(source.adapter), engines.get("mlx")
    other = mlx.load(
        source.folder, dtype=dtypes.of_source(source, mlx), vocabulary=max(spec.tokens, default=-1) + 1
    )
    other.add_adapter(spec, seed=0)
    other.load_trained(source.adapter)
    drift = merge.logit_drift(adapted, other.full_logits(probe), base)
    return {
        "drift": drift,
        "note": f"{trained}, {_describe(drift)}. Merging to full precision (--to hf --merge) keeps the run.",
    }


def _requantised(source: Source, run: str | Path, folder: Path, force: bool) -> dict[str, Any]:
    require_mlx("merging into a quantised base")
    from mlx_posttrain.engines.mlx.load import save_requantised

    model, probe = _model_and_probe(source, run)
    drift = save_requantised(model, folder, probe)
    if drift["lost"] > MAX_LOST and not force:
        raise UserError(
            f"merging into the {base_bits(source)}-bit base costs too much: {_effect_lost(drift)} (bound "
            f"{MAX_LOST:.0%}): "
            "keep the adapter separate (--to peft or --to mlx-lm without --merge), merge to full precision "
            "with --to hf --merge, or add --force"
        )
    return {"drift": drift, "note": f"The adapter was merged into the quantised base: {_describe(drift)}."}


def _describe(drift: Mapping[str, float]) -> str:
    return (
        f"{_effect_lost(drift)}, largest difference {drift['max_logit_difference']:.3f}, "
        f"KL {drift['kl']:.4f} nats"
    )


def _effect_lost(drift: Mapping[str, float]) -> str:
    if drift["lost"] > 1:
        return f"rounding changes the logits {drift['lost']:.1f} times as much as the adapter does"
    return f"{drift['lost']:.1%} of the adapter's effect on the logits is lost"
