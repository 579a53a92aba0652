"""LoRA and DoRA adapters, converted between PEFT's files and mlx-lm's modules.

PEFT has `lora_A.weight` (r, in), `lora_B.weight` (out, r) and, for DoRA, `lora_magnitude_vector` (out,),
whatever the layout of the base weight. mlx-lm has `lora_a` (in, r), `lora_b` (r, out) and `m` (out,).
Sources: `peft/tuners/lora/layer.py`, `peft/tuners/lora/model.py`, `mlx_lm/tuner/lora.py`,
`mlx_lm/tuner/dora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_posttrain.errors import UserError

from . import patterns, token_rows
from .arrays import read_float32, to_float32
from .files import read_json, require_space, write_atomically, write_json
from .gpt2 import CONV1D
from .hub import check_folder
from .names import hf_path, mlx_path
from .token_rows import CONFIG, PREFIX, TENSORS, TokenRows

Module = dict[str, Any]
Modules = dict[str, Module]

HEAD = "score.weight"  # of a sequence classifier

# In files the magnitude's key has no ".weight"; PEFT adds it when loading. Keys of a raw state dict may
# contain an adapter name.
_KEY = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.(?!weight$)[^.]+)?(\.weight)?$"
)
_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}

# Initialisations that leave the base weights unchanged. The others (pissa, olora, corda, loftq, lora_ga) move
# part of the base into the adapter, so that the adapter is meaningless on the original base.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Options of PEFT's LoRA that add parameters or change the formula.
UNSUPPORTED = (
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "megatron_config",
)


def peft_to_mlx(tensors: Mapping[str, Any], model_type: str = "gpt2") -> Modules:
    """Return PEFT's tensors as mlx-lm modules by path.

    Returns:
        {mlx-lm module path: {"lora_a": (in, r), "lora_b": (r, out), and with DoRA "m": (out,)}}.

    Raises:
        UserError: a tensor that is not a LoRA or DoRA matrix of a linear layer, or a module with a part
            missing or of a wrong shape.
    """
    modules: Modules = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key.removeprefix(PREFIX))
        if match is None or len(match["path"]) > patterns.LONGEST_PATH:
            raise UserError(
                f"the adapter holds {key[:200]}, which is not a LoRA or DoRA matrix of a linear layer; such "
                "adapters are not supported"
            )
        part = _PARTS[match["part"]]
        module = modules.setdefault(mlx_path(match["path"], model_type), {})
        if part in module:
            raise UserError(
                f"the adapter holds {match['part']} of {match['path']} twice, under two adapters' names: "
                "save the one that is meant with PEFT (save_pretrained, selected_adapters)"
            )
        module[part] = tensor.reshape(-1) if part == "m" else tensor.T
    for path, module in modules.items():
        _check_module(path, module)
    return modules


def mlx_to_peft(modules: Mapping[str, Module], model_type: str = "gpt2") -> dict[str, Any]:
    """Return mlx-lm modules as PEFT's tensors by key.

    The keys are `base_model.model.<path>.lora_A.weight` (r, in), `.lora_B.weight` (out, r) and, with DoRA,
    `.lora_magnitude_vector` (out,).

    Raises:
        UserError: a module with a part missing or of a wrong shape.
    """
    tensors = {}
    for path, module in modules.items():
        _check_module(path, module)
        key = PREFIX + hf_path(path, model_type)
        tensors[f"{key}.lora_A.weight"] = module["lora_a"].T
        tensors[f"{key}.lora_B.weight"] = module["lora_b"].T
        if "m" in module:
            tensors[f"{key}.lora_magnitude_vector"] = module["m"]
    return tensors


def rank_of(config: Mapping[str, Any], module: str, model_type: str = "gpt2") -> int:
    """Return the rank that a PEFT config gives a module, including `rank_pattern`.

    `module` is an mlx-lm or transformers path.
    """
    return int(patterns.by_pattern(config.get("rank_pattern"), hf_path(module, model_type), config["r"]))


def scale_of(config: Mapping[str, Any], module: str, model_type: str = "gpt2") -> float:
    """Return the factor on B A for a module: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732).

    `rank_pattern` and `alpha_pattern` are included.
    """
    rank = rank_of(config, module, model_type)
    alpha = float(
        patterns.by_pattern(config.get("alpha_pattern"), hf_path(module, model_type), config["lora_alpha"])
    )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def save_adapter(
    folder: Path,
    modules: Mapping[str, Module],
    *,
    base_model: str | None,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | str | None,
    rslora: bool = False,
    dora: bool = False,
    fan_in_fan_out: bool = True,
    extra_config: Mapping[str, Any] | None = None,
    model_type: str = "gpt2",
    head: Any | None = None,
    rows: TokenRows | None = None,
) -> None:
    """Write mlx-lm modules as PEFT's adapter_config.json and adapter_model.safetensors (float32).

    The modules hold NumPy, MLX or torch arrays. With `head` (1, width) the task type is SEQ_CLS, and the
    head, trained in full, is among the tensors. `rows`: of an embedding, trained beside the modules.
    `targets` are module name endings as PEFT matches them, a regular expression, or None for the full paths
    of the modules. `fan_in_fan_out` is True for GPT-2's Conv1D, else False. The config is written last, so
    that a half-written folder is not an adapter.

    Raises:
        UserError: not enough disk space, or a module with parts missing.
        ValueError: `targets`, `rank` or `dora` contradict the modules, so that PEFT would ignore tensors or
            make new ones.
    """
    from safetensors.numpy import save

    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "modules_to_save": None if head is None else ["score"],
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": sorted(hf_path(m, model_type) for m in modules)
        if targets is None
        else _sorted_targets(targets),
        "use_rslora": rslora,
        "use_dora": dora,
        "init_lora_weights": True,
        **({} if rows is None else {token_rows.INDICES: rows.config}),
        **(extra_config or {}),
    }
    _check_against_config(modules, config, model_type, ValueError)
    _check_targets(modules, config["target_modules"], model_type)
    tensors = {
        name: to_float32(value).copy(order="C") for name, value in mlx_to_peft(modules, model_type).items()
    }
    if head is not None:
        tensors[PREFIX + HEAD] = to_float32(head).copy(order="C")
    if rows is not None:
        tensors |= rows.tensors
    data = save(tensors, metadata={"format": "pt"})
    require_space(folder, len(data))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS, lambda path: path.write_bytes(data))
    write_json(folder / CONFIG, config)


def read_adapter(folder: Path, model_type: str = "gpt2") -> tuple[dict[str, Any], Modules]:
    """Return (config, modules) of a PEFT LoRA or DoRA adapter folder.

    The modules are in mlx-lm's layout, as NumPy float32 arrays. Ranks and scales may differ between modules
    (`rank_pattern`, `alpha_pattern`): use `rank_of` and `scale_of`. A classifier's head is left out, which
    engines/files.py reads, and rows of an embedding, which `token_rows.read_rows` returns.

    Raises:
        UserError: missing or damaged files, or an adapter of a kind that cannot be applied exactly, which the
            message names.
    """
    import numpy as np

    check_folder(folder, "adapter")
    config = read_json(folder / CONFIG)
    where = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type {config.get('peft_type')!r} is not supported, only LORA (with "
            "or without DoRA)"
        )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where}: bias {config['bias']!r} is not supported, only 'none': the adapter "
            "changes the base model's biases"
        )
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(
                f"{where}: {key} is not supported; merge the adapter with PEFT "
                "(merge_and_unload) and start from that model"
            )
    # For SEQ_CLS, PEFT itself lists both.
    if config.get("modules_to_save") not in (None, [], ["score"], ["classifier", "score"]):
        raise UserError(
            f"{where}: modules_to_save is not supported; merge the adapter with PEFT (merge_and_unload) and "
            "start from that model"
        )
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise UserError(
            f"{where}: init_lora_weights {init!r} changed the base model's weights, so the adapter does not "
            "fit the original base; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, **config}
    _check_values(config, str(where))
    tensors = read_float32(folder / TENSORS)
    left_out = {key for key in tensors if key.removeprefix(PREFIX) == HEAD}
    if token_rows.read(tensors, config, where) is not None:
        left_out |= {key for key in tensors if token_rows.is_table(key)}
    modules = peft_to_mlx({key: tensors[key] for key in tensors if key not in left_out}, model_type)
    if not modules:
        raise UserError(f"{folder / TENSORS} holds no tensor")
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(
                f"{folder / TENSORS}: {key} has values that are not finite: the training that made it had "
                "diverged; take an earlier checkpoint of it"
            )
    modules = {path: modules[path] for path in sorted(modules, key=_natural)}
    _check_against_config(modules, config, model_type, UserError)
    return config, modules


def to_mlx_lm(
    folder: Path, modules: Mapping[str, Module], config: Mapping[str, Any], model_type: str = "gpt2"
) -> None:
    """Write an adapter folder that `mlx_lm.load(model, adapter_path=folder)` loads.

    `config` is PEFT's, as `read_adapter` returns it. mlx-lm has one rank and one scale for all modules:
    smaller ranks are padded with zeros and other scales are folded into `lora_b`, which leaves every product
    unchanged. Modules are listed by full path, so the file does not depend on the model's number of layers.

    Raises:
        UserError: not enough disk space, no module, or a module with parts missing.
    """
    import numpy as np
    from safetensors.numpy import save

    if not modules:
        raise UserError("the adapter has no module")
    rank = max(int(module["lora_a"].shape[1]) for module in modules.values())
    scale = scale_of(config, next(iter(modules)), model_type)
    tensors = {}
    for path, module in modules.items():
        _check_module(path, module)
        a, b = to_float32(module["lora_a"]), to_float32(module["lora_b"])
        module_scale = scale_of(config, path, model_type)
        if module_scale != scale:
            b = b * np.float32(module_scale / scale)
        missing = rank - a.shape[1]
        tensors[f"{path}.lora_a"] = np.pad(a, ((0, 0), (0, missing)))
        tensors[f"{path}.lora_b"] = np.pad(b, ((0, missing), (0, 0)))
        if "m" in module:
            tensors[f"{path}.m"] = to_float32(module["m"])
    data = save({name: value.copy(order="C") for name, value in tensors.items()}, metadata={"format": "mlx"})
    require_space(folder, len(data))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapters.safetensors", lambda path: path.write_bytes(data))
    written = {
        "fine_tune_type": "dora" if config.get("use_dora") else "lora",
        "num_layers": _layers(modules),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": float(config.get("lora_dropout", 0.0)),
            "keys": sorted(modules),
        },
    }
    if config.get("base_model_name_or_path"):
        written["model"] = config["base_model_name_or_path"]
    write_json(folder / CONFIG, written)


def _sorted_targets(targets: Sequence[str] | str) -> list[str] | str:
    return targets if isinstance(targets, str) else sorted(targets)


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10; the order in files is arbitrary."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in path.split(".")]


def _layers(modules: Mapping[str, Module]) -> int:
    numbers = [int(n) for path in modules for n in re.findall(r"\.(\d+)\.", path)[:1]]
    return max(numbers, default=-1) + 1


def _check_values(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a value of the wrong kind in a PEFT config."""

    def rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def named(known: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: (
            value is None
            or (
                isinstance(value, dict)
                and all(map(known, value.values()))
                and all(map(patterns.is_pattern, value))
            )
        )

    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (rank, "a whole number above 0"),
        "lora_alpha": (number, "a finite number"),
        "lora_dropout": (
            lambda value: number(value) and 0 <= value < 1,
            "a number of at least 0 and below 1",
        ),
        "rank_pattern": (named(rank), f"a mapping of patterns to whole numbers above 0; {patterns.ALLOWED}"),
        "alpha_pattern": (named(number), f"a mapping of patterns to finite numbers; {patterns.ALLOWED}"),
        "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
        "use_dora": (lambda value: isinstance(value, bool), "true or false"),
        "base_model_name_or_path": (lambda value: isinstance(value, str | None), "text"),
    }
    for key, (right, what) in kinds.items():
        if key in config and not right(config[key]):
            raise UserError(f"{where} has {key} {repr(config[key])[:40]}; it must be {what}")


def _check_module(path: str, module: Mapping[str, Any]) -> None:
    for part in ("lora_a", "lora_b"):
        if part not in module:
            raise UserError(f"the adapter lacks {part} of {path}")
    a, b = tuple(module["lora_a"].shape), tuple(module["lora_b"].shape)
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise UserError(
            f"the adapter's matrices of {path} do not fit together: lora_a (in, r) is {a}, "
            f"lora_b (r, out) is {b}"
        )
    if "m" in module and tuple(module["m"].shape) != b[1:]:
        raise UserError(
            f"the adapter's magnitude vector of {path} has shape {tuple(module['m'].shape)}, expected {b[1:]}"
        )


def _check_against_config(
    modules: Mapping[str, Module], config: Mapping[str, Any], model_type: str, error: type[Exception]
) -> None:
    for path, module in modules.items():
        rank, expected = int(module["lora_a"].shape[1]), rank_of(config, path, model_type)
        if rank != expected:
            raise error(f"{path} has rank {rank}, but the config says {expected}")
        if bool(config.get("use_dora")) != ("m" in module):
            state = "has a" if "m" in module else "lacks the"
            raise error(
                f"{path} {state} magnitude vector, but the config says use_dora "
                f"{bool(config.get('use_dora'))}"
            )


def _check_targets(modules: Mapping[str, Module], targets: Sequence[str] | str, model_type: str) -> None:
    """Raise ValueError if the targets miss a module or, in a GPT-2, match one without an adapter.

    PEFT silently drops tensors of modules that no target matches, and silently makes new adapters for
    matched modules without tensors.
    """
    if targets == "all-linear":
        return

    def matched(path: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, path) is not None
        return any(path == target or path.endswith(f".{target}") for target in targets)

    paths = {hf_path(module, model_type) for module in modules}
    lost = sorted(path for path in paths if not matched(path))
    if lost:
        raise ValueError(f"targets {targets} do not match {lost[0]}, so PEFT would ignore its tensors")
    if model_type == "gpt2":
        possible = {f"transformer.h.{i}.{name}" for i in range(_layers(modules)) for name in CONV1D}
        absent = sorted(path for path in possible - paths if matched(path))
        if absent:
            raise ValueError(
                f"targets {targets} match {absent[0]} too, which has no adapter; PEFT would make a new one"
            )
