"""Anything that names a model, opened on an engine: a hub id, a folder, ``tiny``, a finished run, a PEFT
adapter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_posttrain import engines, runs
from mlx_posttrain.convert import hub
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdapterSpec, Model
from mlx_posttrain.errors import UserError
from mlx_posttrain.progress import say
from mlx_posttrain.recipe import AdapterSection

#: Any of these makes a folder one with a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class Source:
    """Where a model's parts lie: the folder with its weights, the adapter on it if any, the recipe that made
    it if it is a run, and the hub id of an adapter's base if its config names one.
    """

    folder: Path
    adapter: Path | None = None
    recipe: dict[str, Any] | None = None
    base_id: str | None = None

    @property
    def template(self) -> str | None:
        """The template a run was trained with; None for a model that is no run."""
        if self.recipe is None:
            return None
        data = self.recipe["data"]
        # Rows taken as they stand were trained without marks, and are asked without them.
        if data.get("pack") or self.recipe.get("untemplated"):
            return "none"
        template = data.get("template", "instruction")
        return template if isinstance(template, str) else template[0]

    @property
    def system(self) -> str | None:
        """The system prompt that a run was trained with."""
        return (
            self.recipe["data"].get("system") if self.recipe is not None and "data" in self.recipe else None
        )

    @property
    def quantize(self) -> int | None:
        """Bits of a QLoRA run's base."""
        return ((self.recipe or {}).get("adapter") or {}).get("quantize")


def locate(name: str | Path) -> Source:
    """Find a model's parts. Raises UserError saying what is missing and what to do."""
    path = Path(name).expanduser()
    if runs.is_run(path):
        run, recipe = runs.reopen(path)
        if recipe.get("method") == "pipeline":
            # not at the top: pipeline imports this module
            from mlx_posttrain.methods.pipeline import language_model

            return locate(language_model(path))
        if not run.finished:
            raise UserError(
                f"{path} is an unfinished run: continue it with `mlx-posttrain run --resume {path}`"
            )
        if (run.final / "adapter_config.json").is_file():
            return Source(base_folder(recipe["model"]), run.final, recipe)
        hub.check_folder(run.final)
        return Source(run.final, None, recipe)
    if (path / "adapter_config.json").is_file():
        return _adapter(path, str(name))
    found = hub.resolve(str(name), kind="either")
    return _adapter(found, str(name)) if hub.holds_adapter(found) else Source(found)


def _adapter(folder: Path, name: str) -> Source:
    from mlx_posttrain.convert import adapters

    config, _ = adapters.read_adapter(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{name}: adapter_config.json names no base_model_name_or_path; add the base's folder or id there"
        )
    return Source(hub.resolve(base), folder, base_id=base if is_hub_id(base) else None)


def open_model(
    name: str | Path, engine: str = "auto", dtype: str = "float32", *, scores: bool = False
) -> tuple[Model, Any, Source]:
    """(model, tokenizer, source) ready to generate or evaluate.

    Raises UserError for a reward model, or with ``scores`` for a model that is none.
    """
    source = locate(name)
    chosen = engines.get(engine)
    group = ((source.recipe or {}).get("adapter") or {}).get("group_size", 64)
    model = chosen.load(source.folder, dtype=dtype, quantize=source.quantize, group_size=group)
    if source.adapter is not None:
        model.add_adapter(files.spec_of(source.adapter), seed=0)
        model.load_trained(source.adapter)
    if model.has_head and not scores:
        raise UserError(f"{name} is a reward model: it scores texts and writes none; give a language model")
    if scores and not model.has_head:
        raise UserError(
            f"{name} is no reward model: train one with 07_reward, or give a sequence "
            "classifier with one label"
        )
    tokenizer = load_tokenizer(source.folder)
    check_vocabulary(tokenizer, model, source.folder)
    return model, tokenizer, source


def adapter_spec(adapter: AdapterSection) -> AdapterSpec:
    """The adapter that a recipe asks for: its own, or with ``adapter.path`` that of the adapter it starts
    from.
    """
    if adapter.path is not None:
        return files.spec_of(adapter_folder(adapter.path), adapter.dropout)
    targets = tuple(adapter.targets) if adapter.targets else None
    return AdapterSpec(adapter.kind, adapter.rank, adapter.alpha, adapter.dropout, adapter.rslora, targets)


def adapter_folder(name: str) -> Path:
    """The folder of a PEFT adapter, which of a run is its ``final/``; a hub id's lies in the hub cache.

    Raises UserError as hub.resolve.
    """
    path = Path(name).expanduser()
    if (path / "final").is_dir():
        return path / "final"
    return hub.resolve(name, kind="adapter")


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer. Raises UserError when there is none."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    # transformers would make an empty one
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer: copy its base's tokenizer.json and tokenizer_config.json there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a damaged file fails anywhere in the libraries that read it
        raise UserError(
            f"{folder}: no tokenizer can be loaded from it "
            f"({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from None


def check_vocabulary(tokenizer: Any, model: Model, folder: Path) -> None:
    """Raise UserError when the tokenizer has ids beyond the embedding: MLX would read out of bounds,
    silently.
    """
    rows = model.config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model's embedding {rows}: they do "
            "not belong together"
        )


def pad_id(config: dict[str, Any], tokenizer: Any) -> int:
    """The token that does not count when a score's position is looked for: the config's pad, else the
    tokenizer's, else EOS.

    A GPT-2 has no pad, so it is EOS: a score is then read at the last token before it. See data/pairs.py,
    last_token.
    """
    for found in (config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise UserError(
        "neither the config nor the tokenizer names a pad or an end-of-text token, so scores have no position"
    )


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is looked up on the hub rather than on this machine."""
    return name != "tiny" and not Path(name).expanduser().exists()


def base_folder(name: str | Path) -> Path:
    """The folder that a new run starts from; an adapter run is merged once, beside its ``final/``.

    A folder that is quantised is taken back to float32 for that. Raises UserError for a QLoRA run, which
    others continue by its adapter.
    """
    source = locate(name)
    if source.adapter is None:
        return source.folder
    if source.quantize:
        raise UserError(
            f"{name}: a QLoRA run cannot be a new run's model; start from its adapter with "
            f"adapter.path={name}, or export it with --merge"
        )
    if source.recipe is None:
        raise UserError(
            f"{name} is an adapter without a run: start from it with adapter.path={name} and "
            f"model={source.base_id or source.folder}"
        )
    merged = source.adapter.parent / "merged"
    if not merged.is_dir():
        from mlx_posttrain import export

        if hub.check_config(source.folder).get("quantization"):
            say(
                f"{source.folder} is quantised: the adapter of {name} is merged into its weights as "
                "float32, several times their size"
            )
        runs.replace_folder(merged, lambda folder: export.write_merged(source, folder))
    return merged
