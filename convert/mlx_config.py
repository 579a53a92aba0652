"""A config.json as mlx-lm's classes read it, and the settings that they do not compute.

mlx-lm takes the values it knows by transformers 4's names, and leaves the rest unread without a word. What a
file means is therefore taken from transformers' own config class, whichever version wrote the file, and
written under mlx-lm's names. A setting that changes the logits and that mlx-lm's class does not read is
refused. tests/engines/test_architectures.py compares the logits of every entry of ``ARCHITECTURES`` with
transformers'; docs/models.md has the result.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlx_posttrain.errors import UserError

_INSTEAD = "use engine=torch"


class Computed(NamedTuple):
    """What mlx-lm's class of an architecture computes as transformers does.

    ropes: kinds of rotary embedding. windows: whether it masks sliding windows. same: settings that it does
    not read, with values other than transformers' default for which both compute the same.
    """

    ropes: tuple[str, ...] = ("default",)
    windows: bool = False
    same: Mapping[str, tuple[Any, ...]] = {}


SCALED = ("default", "linear", "llama3", "yarn")
#: The architectures whose logits are tested.
ARCHITECTURES = {
    "gemma2": Computed(),
    "gemma3_text": Computed(SCALED, windows=True, same={"tie_word_embeddings": (False,)}),
    "gpt2": Computed(),
    "gpt_neox": Computed(
        same={"hidden_act": ("gelu_fast", "gelu_new", "gelu_pytorch_tanh"), "tie_word_embeddings": (True,)}
    ),
    "llama": Computed(SCALED),
    "mistral": Computed(SCALED),
    "mixtral": Computed(),
    "phi3": Computed(("default", "longrope")),
    "qwen2": Computed(SCALED),
    "qwen3": Computed(SCALED),
    "qwen3_moe": Computed(),
}
# Some classes take rope_scaling and leave it aside.
_UNTESTED = Computed()

#: Settings of rotary embeddings that mlx-lm does not read, and values for which that does not matter.
_ROPE_UNREAD: dict[str, dict[str, tuple[Any, ...]]] = {
    "yarn": {"attention_factor": (None,), "truncate": (None, True)},
    "longrope": {"attention_factor": (None,), "factor": (None,)},
}
#: Settings that are brought into mlx-lm's form below, under both libraries' names.
_TRANSLATED = {
    "head_dim",
    "layer_types",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
    "sliding_window",
    "sliding_window_pattern",
}
#: Settings that change no logit of a text model, or whose contradiction to the weights' shapes is an error.
_NEUTRAL = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|model_type|use_cache|output_.*|return_dict|"
    r"initializer_.*|id2label|label2id|num_labels|problem_type|chunk_size_feed_forward|is_encoder_decoder|"
    r"is_decoder|pretraining_tp|summary_.*|router_(aux_loss_coef|jitter_noise)|max_window_layers|"
    r"max_position_embeddings|original_max_position_embeddings|use_sliding_window|name_or_path|intermediate_size|"
    r"(.*_)?token_id|.*(_pdrop|_dropout|dropout_prob)"
)


class Readable(NamedTuple):
    """A config for mlx-lm.

    settings: what replaces or completes config.json. context: the longest sequence that mlx-lm computes
    right, None without a bound. bound: why it is shorter than the model's own, or None. tested: whether the
    architecture's logits are.
    """

    settings: dict[str, Any]
    context: int | None
    bound: str | None
    tested: bool


def transformers_config(folder: Path) -> Any:
    """Return transformers' config of a model folder. Raises UserError for one that it does not read."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # A damaged or unknown config fails in whatever way its class does.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{folder}: transformers {transformers.__version__} cannot read its config.json ({reason}); "
            "correct it, or update transformers"
        ) from None


def readable(folder: Path, config: Mapping[str, Any]) -> Readable:
    """Return a folder's config in the form that mlx-lm reads; nothing is written.

    `config` is the folder's config.json. Not for a GPT-2, see `weights.gpt2_config`.

    Raises:
        UserError: an architecture that mlx-lm does not have, or a setting that it would not compute.
    """
    hf = transformers_config(folder)
    if _fields(config) is None:
        raise UserError(f"{folder}: mlx-lm has no {hf.model_type}; {_INSTEAD}")
    try:
        return _readable(folder, config, hf)
    except UserError:
        raise
    except Exception as error:  # a value of the wrong kind, wherever it is first used
        raise UserError(
            f"{folder}: config.json has a value that cannot be used: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None


def _readable(folder: Path, config: Mapping[str, Any], hf: Any) -> Readable:
    if getattr(hf, "text_config", None) is not None:  # images and text: mlx-lm has the part for text
        part = _in_mlx_lm(hf.text_config, config.get("text_config") or {}, str(folder))
        return part._replace(
            settings={"text_config": {**(config.get("text_config") or {}), **part.settings}}, tested=False
        )
    return _in_mlx_lm(hf, config, str(folder))


def for_mlx_lm(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a folder's config as mlx-lm itself reads it right. Raises UserError as `readable`."""
    return {**config, **readable(folder, config).settings}


def _in_mlx_lm(hf: Any, raw: Mapping[str, Any], where: str) -> Readable:
    kind = hf.model_type
    computed = ARCHITECTURES.get(kind, _UNTESTED)
    where = f"{where}: config.json has"
    fields = _fields({**raw, "model_type": kind})
    rope, short = _rope(hf, computed, fields, where)
    window, pattern = _window(hf, computed, where)
    if fields is not None:
        _check_read(hf, raw, computed, fields, where)
    known = _by_every_name(hf, hf.to_dict())
    settings = {name: known[name] for name in fields or () if name in known and name not in _TRANSLATED}
    translated = {
        **rope,
        "head_dim": getattr(hf, "head_dim", None),
        "sliding_window": getattr(hf, "sliding_window", None),
        "layer_types": None if kind in ARCHITECTURES else getattr(hf, "layer_types", None),
        "sliding_window_pattern": pattern,
    }
    settings |= {
        name: value
        for name, value in translated.items()
        if fields and name in fields and (value is not None or name in raw or _required(fields[name]))
    }
    longest = getattr(hf, "max_position_embeddings", None)
    bounds = [(limit, why) for limit, why in (window, short) if limit and limit < (longest or limit + 1)]
    context, why = min(bounds, default=(longest, None))
    return Readable(settings, context, why, kind in ARCHITECTURES and fields is not None)


def _fields(config: Mapping[str, Any]) -> Mapping[str, inspect.Parameter] | None:
    """The settings that mlx-lm's class of an architecture reads; None where it has no such class."""
    from mlx_lm.utils import _get_classes

    try:
        return inspect.signature(_get_classes(dict(config))[1]).parameters
    # SystemExit: its module misses a package; AttributeError: the module is none of a model
    except (ValueError, SystemExit, AttributeError, ImportError, TypeError):
        return None


def _by_every_name(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the further names that transformers has for them too."""
    further = {name: settings[own] for name, own in hf.attribute_map.items() if own in settings}
    return {**further, **settings}


def _required(field: inspect.Parameter) -> bool:
    return field.default is inspect.Parameter.empty


def _rope(
    hf: Any, computed: Computed, fields: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, Any], tuple[int | None, str]]:
    """(rotary settings under all of mlx-lm's names, (longest sequence that they hold for, why))."""
    parameters = getattr(hf, "rope_parameters", None) or {}
    local: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in parameters.values()):  # by type of layer
        local = parameters.get("sliding_attention") or {}
        parameters = parameters.get("full_attention") or local
        if local.get("rope_type", "default") != "default":
            raise UserError(f"{where} scaled rotary embeddings in layers with a window; {_INSTEAD}")
    if not parameters:
        return {}, (None, "")
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":  # scales only beyond max_position_embeddings, which is our bound
        kind = "default"
    if kind not in computed.ropes:
        raise UserError(f"{where} rope_type {kind!r}, which mlx-lm's {hf.model_type} ignores; {_INSTEAD}")
    for name, harmless in _ROPE_UNREAD.get(kind, {}).items():
        if parameters.get(name) not in harmless:
            raise UserError(f"{where} {name} {parameters[name]!r} for {kind}: mlx-lm ignores it; {_INSTEAD}")
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0 and not {"partial_rotary_factor", "rotary_pct", "rope_parameters"} & set(fields or ()):
        raise UserError(
            f"{where} partial_rotary_factor {partial}: mlx-lm's {hf.model_type} ignores it; {_INSTEAD}"
        )
    theta = parameters.get("rope_theta")
    scaling, short = None, (None, "")
    if kind != "default":
        scaling = {name: value for name, value in parameters.items() if value is not None} | {"type": kind}
        if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):  # transformers takes both or none
            scaling = {k: v for k, v in scaling.items() if not k.startswith("mscale")}
        if kind == "longrope":
            short = (
                scaling["original_max_position_embeddings"],
                "mlx-lm has one set of longrope's factors for all lengths",
            )
    return {
        "rope_theta": theta,
        "rotary_emb_base": theta,
        "rope_local_base_freq": local.get("rope_theta"),
        "partial_rotary_factor": partial,
        "rotary_pct": partial,
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_type": kind},
        **({"original_max_position_embeddings": short[0]} if short[0] else {}),
    }, short


def for_short_texts(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which longrope has the factors of texts that fit the original context.

    transformers takes them up to that length; mlx-lm takes the long ones always.
    """
    scaling = settings.get("rope_scaling") or {}
    if scaling.get("type") != "longrope":
        return settings
    return {**settings, "rope_scaling": {**scaling, "long_factor": scaling["short_factor"]}}


def _window(hf: Any, computed: Computed, where: str) -> tuple[tuple[int | None, str], int | None]:
    """((sliding window that mlx-lm does not mask, why), gemma3's distance between layers without one)."""
    window = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None) or ["sliding_attention"]
    if window is None or "sliding_attention" not in types:
        return (None, ""), None
    if not computed.windows:
        return (window, "mlx-lm does not mask the sliding window"), None
    pattern = types.index("full_attention") + 1 if "full_attention" in types else 0
    expected = [
        "sliding_attention" if (i + 1) % (pattern or 1) else "full_attention" for i in range(len(types))
    ]
    if types != expected:
        raise UserError(
            f"{where} layer_types in an order other than a window in all but each n-th layer; {_INSTEAD}"
        )
    return (None, ""), pattern


def _check_read(
    hf: Any, raw: Mapping[str, Any], computed: Computed, fields: Mapping[str, inspect.Parameter], where: str
) -> None:
    """Raise UserError for a setting that changes the logits on one side only."""
    known, defaults = hf.to_dict(), type(hf)().to_dict()
    for name, default in defaults.items():
        value = known.get(name, default)
        if name in _TRANSLATED or _NEUTRAL.fullmatch(name):
            continue
        read = [other for other in _by_every_name(hf, {name: value}) if other in fields]
        if read:
            # mlx-lm's class calculates with what it holds to be a number
            unread = value is None and isinstance(fields[read[0]].default, int | float)
        else:
            unread = value != default and value not in computed.same.get(name, ())
        if unread:
            raise UserError(f"{where} {name} {value!r}, which mlx-lm's {hf.model_type} ignores; {_INSTEAD}")
    for name in sorted(
        set(raw) & set(fields) - set(_by_every_name(hf, defaults)) - _TRANSLATED - {"model_type"}
    ):
        if raw[name] != fields[name].default:
            raise UserError(f"{where} {name} {raw[name]!r}, which transformers ignores; {_INSTEAD}")
    width = getattr(hf, "hidden_size", 0) // getattr(hf, "num_attention_heads", 1)
    if getattr(hf, "head_dim", None) not in (None, width) and "head_dim" not in fields:
        raise UserError(
            f"{where} head_dim {hf.head_dim}: mlx-lm's {hf.model_type} has hidden_size / num_attention_heads "
            f"= {width}; {_INSTEAD}"
        )
