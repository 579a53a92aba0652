"""Model look-up: the embedded model, a local folder, or a Hugging Face hub id through the hub's own cache."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

from . import gpt2
from .checks import check_kinds, check_sizes
from .files import home, read_json

EMBEDDED = "tiny"

# Weights are loaded from safetensors only: pickle files (.bin, .pt) and Python files are never downloaded.
ALLOWED = [
    "*.json",
    "model*.safetensors",
    "adapter_model.safetensors",
    "*.txt",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "*.tiktoken",
]
IGNORED = ["*.bin", "*.py", "*.pt", "*.msgpack", "*.h5", "*.onnx", "*/*"]

_GIVE = "give an existing folder or a hub id such as openai-community/gpt2"

# Ids from before the hub had organisations. The hub redirects them; the cache has them under the requested
# name.
LEGACY = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}


def resolve(model: str | Path, kind: str = "model") -> Path:
    """Return the local folder of a model.

    `model` is "tiny" (embedded), an existing folder, or a hub id ("openai-community/gpt2", "gpt2"). A
    complete copy in the hub cache is used without a network call; otherwise the hub's client downloads the
    model and shows its progress. `kind` "adapter" looks for a PEFT adapter instead of a model; "either"
    accepts both, see `holds_adapter`.

    Raises:
        UserError: in one line, what is wrong and what to do: no such folder, no such id, gated, offline and
            not cached, no config, no safetensors.
    """
    name = str(model).strip()
    if not name:
        raise UserError("no model given; give a folder, a hub id such as openai-community/gpt2, or tiny")
    if name == EMBEDDED and kind != "adapter":
        return _embedded()
    folder = home(name)
    if folder.is_dir():
        check_folder(folder, _kind_of(folder, kind))
        return folder
    if folder.exists():
        raise UserError(
            f"{name} is a file; give the folder that holds {_config_name(kind)} and the safetensors weights"
        )
    if isinstance(model, Path) or _looks_like_path(name):
        raise UserError(_missing_folder(name) or f"the folder {name} does not exist; {_GIVE}")
    return _from_hub(name, kind)


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter and no model."""
    return (folder / _config_name("adapter")).is_file() and not weight_files(folder)


def check_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a model folder (or the file itself) as a dictionary.

    A GPT-2's is completed with its default sizes, and an `auto_map` that is not needed is left out.

    Raises:
        UserError: it is missing or broken JSON (with line and column), names no model_type, needs code from
            the folder, or gives a GPT-2 impossible sizes.
    """
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{file} names no model_type, so the architecture is unknown")
    _check_code(config, str(file))
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(
            f"{file} has architectures {names!r}; it must be a list of class names, for example "
            '["GPT2LMHeadModel"]'
        )
    check_kinds(config, str(file))
    return gpt2.with_sizes(config, str(file)) if config["model_type"] == "gpt2" else config


def _check_code(config: dict[str, Any], where: str) -> None:
    """Take away `auto_map` where transformers has the architecture itself.

    Raises UserError for a model that is made by Python code of its folder, which is never run. mlx-lm 0.31
    would run a `model_file` without asking.
    """
    if config.get("model_file") is not None:
        raise UserError(
            f"{where} names the Python file {config['model_file']} (model_file): code from a model folder is "
            "never run here; use a model whose architecture mlx-lm and transformers have themselves"
        )
    if config.pop("auto_map", None) is None:
        return
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        raise UserError(
            f"{where} needs code from the model folder (auto_map), which is never run here: transformers has "
            f"no architecture {config['model_type']}; use another model, or a newer transformers"
        )


def check_tensors(file: Path) -> None:
    """Check that a file is in safetensors' format and as long as its header says.

    The tensors themselves are not read.

    Raises:
        UserError: it is cut off, empty, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or is not a safetensors file ({error}); download or copy it again"
        ) from None


def check_folder(folder: Path, kind: str = "model", name: str | None = None) -> None:
    """Check that a folder holds a model (config.json and safetensors weights) or a PEFT adapter.

    `name` is the user's name for it.

    Raises:
        UserError: it does not, or one of its files is damaged; the message states what was found instead.
    """
    shown = name or str(folder)
    config = _config_name(kind)
    if not (folder / config).is_file():
        other = "adapter_config.json" if kind == "model" else "config.json"
        if (folder / other).is_file():
            what = (
                "a PEFT adapter, not a model; give the model it was trained on"
                if kind == "model"
                else "a model, not a PEFT adapter"
            )
            raise UserError(f"{shown} has {other} but no {config}: it holds {what}")
        raise UserError(f"{shown} has no {config}; give a folder in Hugging Face's format")
    if kind == "adapter":
        if not (folder / "adapter_model.safetensors").is_file():
            raise UserError(
                f"{shown} has no adapter_model.safetensors{_pickle_hint(folder, 'adapter_model.bin')}"
            )
        check_tensors(folder / "adapter_model.safetensors")
        return
    shards = weight_files(folder)
    if not shards:
        raise UserError(f"{shown} has no model.safetensors{_pickle_hint(folder, 'pytorch_model*.bin')}")
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError(
                f"{shown} lacks the shard {shard} that model.safetensors.index.json names; "
                "download or copy the model again"
            )
        check_tensors(folder / shard)
    check_sizes(folder, shards)
    for settings in ("tokenizer_config.json", "generation_config.json"):
        if (folder / settings).is_file():
            read_json(folder / settings)


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model folder's weight files, from its index if it has one.

    The list is empty without safetensors files. Raises UserError for a damaged index.
    """
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(v, str) and v == os.path.basename(v) for v in shards.values()
        ):
            raise UserError(f"{index} has no usable weight_map; download the model again")
        return sorted(set(shards.values()))
    return sorted(path.name for path in folder.glob("model*.safetensors"))


def _embedded() -> Path:
    from importlib.resources import files

    folder = Path(str(files("mlx_posttrain") / "assets" / EMBEDDED))
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise UserError(
            "the embedded model tiny is not in this installation; install mlx-posttrain again "
            "or give another model"
        )
    return folder


def _config_name(kind: str) -> str:
    return "adapter_config.json" if kind == "adapter" else "config.json"


def _kind_of(folder: Path, kind: str) -> str:
    if kind != "either":
        return kind
    return "adapter" if holds_adapter(folder) else "model"


def _pickle_hint(folder: Path, pattern: str) -> str:
    files = sorted(folder.glob(pattern))
    if files:
        return (
            f"; {files[0].name} is refused, as loading pickle files can run code: only safetensors load "
            "(save the model again with transformers to get them)"
        )
    return "; only safetensors weights load"


def _looks_like_path(name: str) -> bool:
    # Recipes write to runs/NAME: a misspelt run must not be looked up on the hub.
    return (
        name.startswith((".", "~", "/", "runs/"))
        or name.endswith(("/", ".safetensors"))
        or "\\" in name
        or name.count("/") > 1
    )


def _ids(name: str) -> list[str]:
    """Return the ids under which the cache may hold `name`, the requested one first."""
    if name in LEGACY:
        return [name, LEGACY[name]]
    return [name, *(old for old, new in LEGACY.items() if new == name)]


def _from_hub(name: str, kind: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{name!r} is neither an existing folder nor a valid hub id (an id looks like "
            "openai-community/gpt2)"
        ) from None
    partial = None
    for repo in _ids(name):
        cached = _cached(repo, kind)
        if cached and _complete(cached, _kind_of(cached, kind), tokenizer=True):
            return cached
        partial = partial or cached
    try:
        folder = Path(snapshot_download(name, allow_patterns=ALLOWED, ignore_patterns=IGNORED))
    except Exception as error:  # any error of the hub's client becomes one line
        if partial and _complete(partial, _kind_of(partial, kind), tokenizer=False):
            return partial
        raise UserError(_explain(name, error)) from error
    kind = _kind_of(folder, kind)
    # Offline, the client may return the snapshot of an interrupted download.
    if not _complete(folder, kind, tokenizer=False):
        if partial is None:
            check_folder(folder, kind, name)
        raise UserError(
            f"{name} is in the hub cache without complete safetensors weights; complete it while online (hf "
            f"download {name}), "
            "or give another model if it has only pickle files such as pytorch_model.bin, which do not load"
        )
    check_folder(folder, kind, name)
    return folder


def _cached(repo: str, kind: str) -> Path | None:
    """Return the snapshot folder of the main branch in the cache, complete or not, or None."""
    from huggingface_hub import try_to_load_from_cache

    for one in ("model", "adapter") if kind == "either" else (kind,):
        file = try_to_load_from_cache(repo, _config_name(one))
        if isinstance(file, str):
            return Path(file).parent
    return None


def _missing_folder(name: str) -> str | None:
    """Return an error line if `name` is a mistyped folder rather than a hub id, else None.

    It is one if its parent folder exists here.
    """
    path = home(name)
    if path.parent == Path(".") or not path.parent.is_dir():
        return None
    near = difflib.get_close_matches(
        path.name, [p.name for p in path.parent.iterdir() if p.is_dir()], n=1, cutoff=0.6
    )
    hint = f"did you mean {path.parent / near[0]}?" if near else _GIVE
    return f"the folder {name} does not exist; {hint}"


def _complete(folder: Path, kind: str, tokenizer: bool) -> bool:
    """Return whether a snapshot can be used: an interrupted download lacks some files."""
    if kind == "adapter":
        return (folder / "adapter_model.safetensors").is_file()
    names = weight_files(folder)
    numbered = re.match(r"model-\d+-of-(\d+)\.safetensors$", names[0]) if names else None
    if numbered and len(names) < int(numbered[1]):  # shards are missing, and so is their index
        return False
    if not names or not all((folder / shard).is_file() for shard in names):
        return False
    return not tokenizer or any(
        (folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "tokenizer.model")
    )


def _explain(name: str, error: Exception) -> str:
    """Return one line for an error of the hub's client: what happened and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # The client wraps the hub's response in "not found locally"; the response tells more.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    download = f"download it once while online (hf download {name}) or give a folder"
    if isinstance(cause, GatedRepoError):
        return f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run: hf auth login"
    if isinstance(cause, RepositoryNotFoundError | LocalEntryNotFoundError | OfflineModeIsEnabled) and (
        missing := _missing_folder(name)
    ):
        return missing
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"{name} is neither an existing folder nor a model on the hub; check the spelling, or if it "
            "is private run: hf auth login"
        )
    if isinstance(cause, HfHubHTTPError) and status in (401, 403):
        return f"the hub refused access to {name} (HTTP {status}); run: hf auth login"
    if isinstance(cause, HfHubHTTPError) and status is not None:
        return (
            f"the hub answered HTTP {status} for {name}, which is not in the cache; try again later or "
            "give a folder"
        )
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"{name} is not a folder here and not in the hub cache, and offline mode is on "
            f"(HF_HUB_OFFLINE); {download}"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name} is not a folder here and not in the hub cache, and the hub cannot be reached; {download}"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"the hub's answer for {name} cannot be read; try again later or give a folder"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name} could not be downloaded: {reason}; {download}"
