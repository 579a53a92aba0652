"""A model's size, read from its files without loading a weight: shapes by name, and numbers from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_posttrain.convert import gpt2, hub
from mlx_posttrain.engines.base import AdapterSpec, match_targets
from mlx_posttrain.errors import UserError

_NO_LINEAR = re.compile(r"(^|\.)(wte|wpe|\w*embed\w*|lm_head|score)$")
_GATED = re.compile(r"\.(gate_proj|gate_up_proj)\.weight$")
_HEADS = ("lm_head", "wte", "transformer.wte", "model.wte", "model.embed_tokens")


@dataclass(frozen=True)
class Size:
    """A model as its files describe it.

    tensors: shapes by name; of a packed weight the shape of the weight that it stands for. file_bytes: their
    size on disk. packed_bytes: of packed weights, 0 where the folder is not quantised; plain: its other
    numbers, scales and offsets included. packed_head: whether its head is packed too. keys: width of all key
    heads together, where it is not ``width``. new_tokens: rows trained beside an adapter.
    """

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    context: int | None
    model_type: str
    tensors: Mapping[str, tuple[int, ...]]
    file_bytes: int = 0
    packed_bytes: int = 0
    plain: int = 0
    packed_head: bool = False
    keys: int | None = None
    new_tokens: int = 0

    @property
    def packed(self) -> bool:
        """Whether the folder is quantised."""
        return self.packed_bytes > 0

    @property
    def key_width(self) -> int:
        """Width of the keys, and of the values, in a block.

        Less than ``width`` with grouped-query attention (Ainslie et al. 2023).
        """
        return self.width if self.keys is None else self.keys

    @property
    def gated(self) -> bool:
        """Whether the feed-forward is gated (Shazeer 2020, "GLU Variants Improve Transformer")."""
        return any(_GATED.search(name) for name in self.tensors)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return not {"lm_head.weight", "embed_out.weight"} & self.tensors.keys()

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def outer(self) -> int:
        """Number of parameters of embeddings and heads, which mixed precision does not copy."""
        return sum(
            math.prod(shape)
            for name, shape in self.tensors.items()
            if _NO_LINEAR.search(name.removesuffix(".weight"))
        )

    @property
    def linear(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the linear layers' weights by the layers' paths, without embeddings and heads."""
        found = {
            name.removesuffix(".weight"): shape
            for name, shape in self.tensors.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        return {path: shape for path, shape in found.items() if not _NO_LINEAR.search(path)}


_INNER = ("n_inner", "intermediate_size")


def size(folder: Path) -> Size:
    """Read a model's size from its config and the headers of its weight files.

    Raises UserError when the config does not give it.
    """
    from safetensors import safe_open

    config = hub.check_config(folder)
    tensors: dict[str, tuple[int, ...]] = {}
    files = hub.weight_files(folder)
    for name in files:
        with safe_open(str(folder / name), framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                if not key.endswith((".attn.bias", ".attn.masked_bias")):
                    tensors[key] = tuple(file.get_slice(key).get_shape())
    if config.get("tie_word_embeddings", config["model_type"] == "gpt2"):
        tensors.pop("lm_head.weight", None)
    bits = (config.get("quantization") or {}).get("bits", 0)
    head = next((name for name in _HEADS if f"{name}.weight" in tensors), "lm_head")
    packed_head = f"{head}.scales" in tensors
    plain, packed_bytes = sum(map(math.prod, tensors.values())), 0
    for scales in [name for name in tensors if name.endswith(".scales")] if bits else []:
        path = scales.removesuffix(".scales")
        if len(tensors.get(f"{path}.weight", ())) != 2:
            raise UserError(f"{folder}: {scales} stands without the packed matrix that it belongs to")
        out, packed = tensors[f"{path}.weight"]
        plain, packed_bytes = plain - out * packed, packed_bytes + 4 * out * packed
        tensors[f"{path}.weight"] = (out, packed * 32 // bits)
        del tensors[scales]
        tensors.pop(f"{path}.biases", None)

    def number(*names: str) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return config[name]
        raise UserError(
            f"{folder}: config.json names none of {', '.join(names)}, so memory cannot be planned"
        )

    width, heads = number("n_embd", "hidden_size"), number("n_head", "num_attention_heads")
    keys = (config.get("num_key_value_heads") or heads) * (config.get("head_dim") or width // heads)
    return Size(
        layers=number("n_layer", "num_hidden_layers"),
        width=width,
        heads=heads,
        keys=keys,
        inner=next((v for k in _INNER if isinstance(v := config.get(k), int) and v > 0), 4 * width),
        vocabulary=number("vocab_size"),
        context=config.get("n_positions") or config.get("max_position_embeddings"),
        model_type=config["model_type"],
        tensors=tensors,
        file_bytes=sum((folder / name).stat().st_size for name in files),
        packed_bytes=packed_bytes,
        plain=plain,
        packed_head=packed_head,
    )


def grown(of: Size, vocabulary: int, new_tokens: int) -> Size:
    """The size with embedding and head of at least ``vocabulary`` rows; see ``Size.new_tokens``."""
    names = {f"{name}.weight" for name in (*_HEADS, "gpt_neox.embed_in", "embed_out")}
    tensors = {
        name: (max(shape[0], vocabulary), *shape[1:]) if name in names else shape
        for name, shape in of.tensors.items()
    }
    most = max(of.vocabulary, vocabulary)
    return replace(of, tensors=tensors, vocabulary=most, new_tokens=new_tokens)


def adapted(of: Size, spec: AdapterSpec) -> list[tuple[int, int]]:
    """(in, out) of every layer that an adapter stands on. Raises UserError when a target matches none."""
    targets = spec.resolved(of.model_type, of.linear).targets or ()
    shapes = [of.linear[path] for path in match_targets(list(of.linear), targets)]
    # Conv1D weights are [in, out]; all others are [out, in].
    conv1d = of.model_type == "gpt2" and not gpt2.is_mlx(of.tensors)
    return [(shape[0], shape[1]) if conv1d else (shape[1], shape[0]) for shape in shapes]


def adapter_parameters(of: Size, spec: AdapterSpec) -> int:
    """Number of parameters of an adapter.

    rank * (in + out) for each target (Hu et al. 2021, section 4.1), and out more with DoRA, for its
    magnitudes; and the rows of new tokens, in the embedding and in a head that is not tied. Raises
    UserError when a target matches no layer.
    """
    return sum(
        spec.rank * (enters + leaves) + (leaves if spec.kind == "dora" else 0)
        for enters, leaves in adapted(of, spec)
    ) + of.new_tokens * of.width * (1 if of.tied else 2)
