"""Export of a run for PEFT, transformers or mlx-lm, merged or not, with a model card.

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
from mlx_posttrain.convert import adapters, merge, token_rows, weights
from mlx_posttrain.convert.arrays import require_mlx
from mlx_posttrain.convert.files import home, output_folder, read_json
from mlx_posttrain.engines import files
from mlx_posttrain.errors import UserError
from mlx_posttrain.models import dtypes
from mlx_posttrain.models.card import base_name, model_card
from mlx_posttrain.models.merge import base_bits, model_type, write_merged
from mlx_posttrain.models.open import open_model
from mlx_posttrain.models.prompt_format import write_prompt_format, write_tokenizer
from mlx_posttrain.models.source import Source, locate, saves_language_model
from mlx_posttrain.models.usage import usage

FORMATS = ("peft", "hf", "mlx-lm")

#: Largest share of the adapter's effect on the logits that a merge into a quantised base may lose. At .25 the
#: greedy answers of the embedded model still agree almost everywhere; a small adapter on a 4-bit base loses
#: much more.
MAX_LOST = 0.25


def export(
    run: str | Path, destination: str | Path, to: str = "peft", *, merged: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write a finished run for another program.

    Formats: peft, an adapter folder; hf, a model folder for transformers (an adapter run needs ``merged``);
    mlx-lm, a model folder or, for an adapter run without ``merged``, an adapter folder, for mlx-lm.

    Returns {"path", "format", "merged"} and, if the export differs from the run, "drift" and a "note". Raises
    UserError for an unknown format, a run that cannot be written in that format, a destination in use
    (``force`` writes into it), or a quantised merge that would lose more than MAX_LOST of the adapter's
    effect (``force`` does it anyway).
    """
    if to not in FORMATS:
        raise UserError(f"cannot export to {to!r}; formats: {', '.join(FORMATS)}")
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
        "merged": merged and source.adapter is not None,
    }
    with output_folder(target, force) as folder:
        if source.adapter is None:
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
        if not _is_classifier(source):
            write_prompt_format(folder, source)
        elif source.adapter is not None and token_rows.has_rows(source.adapter):
            write_tokenizer(folder, source)
        note = f"\n## Difference from the run\n\n{summary['note']}\n" if "note" in summary else ""
        (folder / "README.md").write_text(_card(source, run, to, merged) + note, encoding="utf-8")
    return summary


def is_export(folder: Path, run: str | Path, to: str, merged: bool) -> bool:
    """Return whether ``folder`` holds the export that :func:`export` writes with these arguments.

    It compares the card, which is written last.
    """
    card_file = folder / "README.md"
    return card_file.is_file() and card_file.read_text(encoding="utf-8").startswith(
        _card(locate(run), run, to, merged)
    )


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


def _card(source: Source, run: str | Path, to: str, merged: bool) -> str:
    how = None if _is_classifier(source) else partial(usage, source, to, merged)
    return model_card(source, Path(run), to, merged, how)


def _is_classifier(source: Source) -> bool:
    return not saves_language_model(source.adapter or source.folder)


def _write_full(source: Source, folder: Path, to: str) -> None:
    if to == "mlx-lm":
        weights.convert(source.folder, folder, to="mlx", force=True)
        return
    for file in source.folder.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


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
            f"merging into the {base_bits(source)}-bit base would lose {drift['lost']:.0%} of the adapter's "
            f"effect on the logits (bound {MAX_LOST:.0%}): "
            "keep the adapter separate (--to peft or --to mlx-lm without --merge), merge to full precision "
            "with --to hf --merge, or add --force"
        )
    return {"drift": drift, "note": f"The adapter was merged into the quantised base: {_describe(drift)}."}


def _describe(drift: Mapping[str, float]) -> str:
    return (
        f"{drift['lost']:.1%} of the adapter's effect on the logits is lost, largest difference "
        f"{drift['max_logit_difference']:.3f}, "
        f"KL {drift['kl']:.4f} nats"
    )
