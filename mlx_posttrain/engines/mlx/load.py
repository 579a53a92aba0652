"""Loading of MLX models: read, quantise, recompute activations, merge into a quantised base."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_posttrain.convert import checks, hub, merge, mlx_config, names
from mlx_posttrain.convert import weights as weight_files
from mlx_posttrain.convert.files import copy_tokenizer
from mlx_posttrain.engines import files
from mlx_posttrain.engines.mlx import exact, long_rows, token_rows
from mlx_posttrain.engines.mlx import lean as mlx_lean
from mlx_posttrain.engines.mlx.cpu import attention as mlx_attention
from mlx_posttrain.engines.mlx.cpu import gelu as mlx_gelu
from mlx_posttrain.errors import UserError


def read_weights(folder: Path, config: dict[str, Any]) -> list[tuple[str, mx.array]]:
    """A folder's weights, without a scalar head, under the names of the network that ``load`` makes."""
    weights = _to_mlx(weight_files.load_weights(folder), config)
    weights.pop(files.HEAD, None)
    return list(weights.items())


def _to_mlx(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """A folder's weights under the MLX engine's names, each in one piece.

    Hugging Face's GPT-2 holds its matrices transposed. As views of those they would be multiplied in another
    order than after their first update: rounded otherwise, and the 32 rows of a rollout read them at 0.5 to
    0.8 of the speed on a CPU.
    """
    return {name: mx.contiguous(value) for name, value in names.to_mlx(weights, config).items()}


def load(
    folder: Path,
    config: dict[str, Any],
    dtype: str,
    quantize: int | None,
    group_size: int,
    vocabulary: int = 0,
    mixed: bool = False,
) -> nn.Module:
    """A network from a folder, in ``dtype`` and, with ``quantize``, with linear layers of so many bits.

    A quantised network is frozen. vocabulary: as in engines.base.Engine.load. mixed: whether it will compute
    in half precision. Raises UserError for a folder that cannot be loaded or has settings that mlx-lm would
    not compute, for a group size that does not divide a layer's width, and for a quantised embedding that
    would have to grow. Beside the result no more than one of the files' tensors is held.
    """
    from mlx_lm.utils import load_model

    # A classifier's folder has no language-model head.
    headless = {"architectures": None, "tie_word_embeddings": True} if files.is_classifier(config) else {}
    try:
        if config["model_type"] == "gpt2":
            settings = weight_files.gpt2_config({**config, **headless})
        else:
            settings = {
                **mlx_config.for_short_texts(mlx_config.readable(folder, config).settings),
                **headless,
            }
        net, _ = load_model(
            folder,
            lazy=True,
            model_config=settings,
            get_model_classes=partial(_classes, {**config, **settings}),
        )
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    # A config that contradicts its weights can fail anywhere in a library that trusts it.
    except Exception as error:
        raise UserError(
            f"{folder}: cannot be loaded: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from None
    exact.use_in(net, config)
    if config["model_type"] == "gpt2":
        mlx_lean.use_in(net)
        if dtype == "float32" and not mixed:
            mlx_gelu.use_in(net)
            mlx_attention.use_in(net)
    long_rows.use_in(net)
    quantised = any(isinstance(m, nn.QuantizedLinear) for m in net.modules())
    # In a quantised network this sets the dtype of the scales and of all weights that are not packed.
    net.set_dtype(getattr(mx, dtype))
    if quantize and not quantised:
        bad = [p for p, m in net.named_modules() if _packs(p, m) and m.weight.shape[-1] % group_size]
        if bad:
            raise UserError(f"adapter.group_size={group_size} does not divide the width of {bad[0]}; use 32")
        nn.quantize(net, group_size=group_size, bits=quantize, class_predicate=_packs)
    if vocabulary > (config.get("vocab_size") or 0):
        token_rows.enlarge(net, vocabulary)
    if quantised or quantize:
        net.freeze()
    try:
        _evaluate(net)
    except RuntimeError as error:  # a file that cannot be read to its end
        raise UserError(f"{folder}: cannot be loaded: {(str(error).splitlines() or [''])[0]}") from None
    checks.check_finite(tree_flatten(net.parameters()), folder)
    return net


def _evaluate(net: nn.Module) -> None:
    """Read, cast and quantise a network's weights one by one, the largest first.

    That is the embedding as a rule, of which both number formats are then held before anything else is.
    """
    for _, weight in sorted(tree_flatten(net.parameters()), key=lambda named: -named[1].nbytes):
        mx.eval(weight)


def _classes(settings: dict[str, Any], config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes of an architecture, the model's with a head that stands beside the backbone.

    settings: as mlx-lm gets them, with those of the folder that it does not know.
    """
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    kind = settings["model_type"]
    tied = settings.get("tie_word_embeddings", kind == "gpt2")

    class Adjusted(model_class):  # type: ignore[valid-type,misc]
        def __init__(self, args: Any):
            super().__init__(args)
            if kind == "gpt2" and not tied:
                self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
            elif kind == "gpt_neox":  # whose backbone gives logits in mlx-lm
                head, self.model.embed_out = self.model.embed_out, nn.Identity()
                if not tied:
                    self.lm_head = head

        def __call__(self, inputs: mx.array, cache: Any = None, **further: Any) -> mx.array:
            if kind in ("gpt2", "gpt_neox"):
                hidden = self.model(inputs, cache)
                if not tied:
                    return self.lm_head(hidden)
                return (self.model.wte if kind == "gpt2" else self.model.embed_in).as_linear(hidden)
            return super().__call__(inputs, cache, **further)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            # A classifier's head is put on afterwards.
            weights = {name: value for name, value in weights.items() if name != files.HEAD}
            if kind in ("gpt2", "gpt_neox"):
                return _to_mlx(weights, settings)
            return super().sanitize(weights) if hasattr(model_class, "sanitize") else weights

    return Adjusted, args_class


def _packs(path: str, module: nn.Module) -> bool:
    """Whether quantising packs a layer: the linear layers that adapters stand on.

    Embeddings stay as they are (Dettmers et al. 2023, section 3), and so do heads, as in bitsandbytes: a tied
    head is an embedding, and packed weights cannot give logits a chunk at a time.
    """
    return isinstance(module, nn.Linear) and path not in ("lm_head", "score")


def checkpoint_blocks(net: nn.Module) -> None:
    """Recompute each transformer block in the backward pass, in training only (Chen et al. 2016).

    Done per instance: mlx-lm's own helper patches the layer's class for the whole process, the reference and
    generation included.
    """

    def checkpointed(base: type) -> type:
        class Checkpointed(base):
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                if not self.training:
                    return super().__call__(*args, **kwargs)

                def inner(parameters: Any, *args: Any) -> Any:
                    self.update(parameters)
                    return base.__call__(self, *args, **kwargs)

                return mx.checkpoint(inner)(self.trainable_parameters(), *args)

        Checkpointed.__name__ = base.__name__
        return Checkpointed

    mlx_lean.undo(net)
    classes: dict[type, type] = {}
    for layer in net.layers:
        layer.__class__ = classes.setdefault(type(layer), checkpointed(type(layer)))


def dequantised_weights(folder: Path, bits: int | None, group_size: int, dtype: str) -> dict[str, mx.array]:
    """A folder's weights rounded to the quantisation grid and back: what a QLoRA adapter was trained on.

    dtype: in which it was trained. A folder that is already quantised has its own grid; ``bits`` and
    ``group_size`` are then ignored.
    """
    from mlx_lm.utils import dequantize_model

    net = load(folder, hub.check_config(folder), dtype, bits, group_size)
    return dict(tree_flatten(dequantize_model(net).parameters()))


def save_requantised(model: Any, folder: Path, probe: np.ndarray) -> dict[str, float]:
    """Fuse an adapter into its quantised base, quantise the result and write it as a folder for mlx-lm.

    probe: [B, T] token ids on which the cost of rounding is measured. Returns that cost, as
    convert.merge.logit_drift does.
    """
    from mlx_lm.utils import save_config

    net = model.net.eval()
    rows = token_rows.read(net, model.config["model_type"])
    adapted = model.full_logits(probe)
    with model.adapters_off():
        base = model.full_logits(probe)
    quantised = next(m.linear for _, m in model.adapted())
    net.update_modules(tree_unflatten([(path, layer.fuse()) for path, layer in model.adapted()]))
    if rows is not None:
        token_rows.fold(net)
    drift = merge.logit_drift(adapted, model.full_logits(probe), base)
    weights, model_type = dict(tree_flatten(net.parameters())), model.config["model_type"]
    if model_type != "gpt2":
        weights, config = names.to_hf(weights, model_type), mlx_config.for_mlx_lm(model.folder, model.config)
    elif "lm_head.weight" in weights:
        raise UserError(f"{model.folder} has an output head of its own, which mlx-lm's GPT-2 does not have")
    else:
        config = weight_files.gpt2_config(model.config)
    weight_files.save_weights(folder, weights, format="mlx")
    # A folder that was already quantised may have other grids for some layers; its config names them.
    grid = {"group_size": quantised.group_size, "bits": quantised.bits, "mode": quantised.mode}
    quantization = model.config.get("quantization") or grid
    save_config(
        {**config, "quantization": quantization, "quantization_config": quantization}, folder / "config.json"
    )
    copy_tokenizer(model.folder, folder)
    return drift
