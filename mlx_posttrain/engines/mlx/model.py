"""Models of the MLX engine: mlx-lm's networks and adapters behind the Model protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_posttrain.convert import names
from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines import decoding, files
from mlx_posttrain.engines.base import (
    REFERENCE_HIDDEN,
    AdapterSpec,
    DeviceBatch,
    Generated,
    Loss,
    Stop,
    check_fits,
    device_batch,
    initial_adapter,
    match_targets,
    micro_batch_totals,
)
from mlx_posttrain.engines.mlx import device, token_rows
from mlx_posttrain.engines.mlx import fused as mlx_fused
from mlx_posttrain.engines.mlx import lean as mlx_lean
from mlx_posttrain.engines.mlx import load as mlx_load
from mlx_posttrain.engines.mlx import mixed as mlx_mixed
from mlx_posttrain.engines.mlx import packed as mlx_packed
from mlx_posttrain.engines.mlx.decoding import MLXDecoder
from mlx_posttrain.engines.mlx.packed_head import PackedHead, packed_head
from mlx_posttrain.errors import UserError
from mlx_posttrain.losses.policy import entropy
from mlx_posttrain.losses.sft import full_kl, token_logprobs


class MLXModel:
    """An mlx-lm model.

    Adapters are mlx-lm's LoRALinear and DoRALinear, in place of the layers they adapt. reload: reads the
    network again, for a copy that serves as the reference. weights: in mixed precision the float32 weights by
    name, of which the network has copies.
    """

    def __init__(
        self,
        net: nn.Module,
        folder: Path,
        config: dict[str, Any],
        context: int | None,
        reload: Callable[[], nn.Module],
        weights: dict[str, mx.array],
    ):
        self.net = net
        self.folder = folder
        self.base_name = str(folder)
        self.config = config
        self.context = context
        self.spec: AdapterSpec | None = None
        self._reload = reload
        self._weights = weights
        self._reference: nn.Module | None = None
        self._split = _splits(net)
        head = files.read_head(folder)
        if head is not None:
            self.add_head(head)

    @property
    def shares_prefixes(self) -> bool:
        return self._split and mlx_packed.applies(self.net)

    @property
    def exact_sampler(self) -> bool:
        dtypes = {p.dtype for _, p in tree_flatten(self.net.parameters())}
        return dtypes == {mx.float32} and not device.shortens_float32()

    def to_device(self, batch: Batch, total: float) -> DeviceBatch:
        """The batch as MLX arrays; total: see :class:`~mlx_posttrain.engines.base.DeviceBatch`."""
        packing = mlx_packed.arrays(batch) if self.shares_prefixes else {}
        return device_batch(replace(batch, extra={**batch.extra, **packing}), total, mx.array)

    # The vocabulary of losses.

    def _logits(self, net: nn.Module, batch: DeviceBatch) -> mx.array:
        check_fits(batch.tokens.shape[1], self.context)
        # Hidden states first, so that the head runs at trained positions only. Right padding needs no mask,
        # see data/batches.py.
        if not self._split:
            return net(batch.tokens).flatten(0, 1)[batch.index].astype(mx.float32)
        return _head(net, self._hidden(net, batch))

    def _hidden(self, net: nn.Module, batch: DeviceBatch) -> mx.array:
        check_fits(batch.tokens.shape[1], self.context)
        if f"{mlx_packed.PREFIX}tokens" in batch.extra:
            return mlx_packed.hidden(net.model, batch.extra).astype(mx.float32)
        return net.model(batch.tokens).flatten(0, 1)[batch.index].astype(mx.float32)

    def logits(self, batch: DeviceBatch) -> mx.array:
        return self._logits(self.net, batch)

    @contextmanager
    def _frozen(self) -> Iterator[nn.Module]:
        if self._reference is not None:
            yield self._reference
        elif self.spec is None:
            raise RuntimeError("a reference needs keep_reference() first")
        else:
            with self.adapters_off():
                yield self.net

    def reference_logits(self, batch: DeviceBatch) -> mx.array:
        with self._frozen() as net:
            return mx.stop_gradient(self._logits(net, batch))

    def _fused_head(self, net: nn.Module) -> tuple[mlx_fused.Head, dict[str, Any]] | None:
        """The head's weight [V, d] and how its gradient is made, as arguments of engines/mlx/fused.py.

        None for a head that is not one matrix.
        """
        if not self._split:
            return None
        layer = _head_layer(net)
        if "bias" in layer:
            return None
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return packed_head(layer), {"trained": False, "training": net.training}
        if not isinstance(layer, nn.Linear | nn.Embedding):
            return None
        how = {"trained": "weight" in layer.trainable_parameters(), "training": net.training}
        if token_rows.active(layer):
            return layer.whole(), {**how, "rows": (layer._index, layer.rows)}
        return layer.weight, how

    def _logprobs(self, net: nn.Module, batch: DeviceBatch, temperature: float) -> mx.array:
        head = self._fused_head(net)
        if head is None:
            return token_logprobs(self._logits(net, batch) / temperature, batch.target)
        return mlx_fused.logprobs(self._hidden(net, batch) / temperature, head[0], batch.target, **head[1])

    def logprobs(self, batch: DeviceBatch, temperature: float = 1.0) -> mx.array:
        return self._logprobs(self.net, batch, temperature)

    def reference_logprobs(self, batch: DeviceBatch, temperature: float = 1.0) -> mx.array:
        with self._frozen() as net:
            return mx.stop_gradient(self._logprobs(net, batch, temperature))

    def logprobs_and_kl(
        self, batch: DeviceBatch, direction: str, beta: float | None = None
    ) -> tuple[mx.array, mx.array]:
        head = self._fused_head(self.net)
        if head is None:
            logits = self.logits(batch)
            return token_logprobs(logits, batch.target), full_kl(
                logits, self.reference_logits(batch), direction
            )
        with self._frozen() as net:
            reference = self._fused_head(net)
            assert reference is not None
            weight, cached = reference[0], batch.extra.get(REFERENCE_HIDDEN)
            hidden = mx.stop_gradient(self._hidden(net, batch)) if cached is None else cached
        return mlx_fused.logprobs_and_kl(
            self._hidden(self.net, batch), head[0], hidden, weight, batch.target, direction, beta, **head[1]
        )

    @property
    def reference_width(self) -> int | None:
        head = self._fused_head(self.net)
        return None if head is None else head[0].shape[1]

    def reference_hidden(self, batch: Batch) -> np.ndarray:
        device.begin("evaluation")
        self.net.eval()
        with self._frozen() as net:
            return np.array(self._hidden(net, self.to_device(batch, 1.0)))

    def policy_terms(
        self, batch: DeviceBatch, temperature: float = 1.0
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        head = self._fused_head(self.net)
        if head is None:
            logits = self.logits(batch) / temperature
            return (
                token_logprobs(logits, batch.target),
                entropy(logits),
                self.scores(batch) if self.has_head else None,
            )
        hidden = self._hidden(self.net, batch)
        terms = mlx_fused.logprobs_and_entropy(hidden / temperature, head[0], batch.target, **head[1])
        return *terms, self.net.score(hidden)[:, 0] if self.has_head else None

    def scores(self, batch: DeviceBatch) -> mx.array:
        return self.net.score(self._hidden(self.net, batch))[:, 0]

    def full_logits(self, tokens: np.ndarray) -> np.ndarray:
        check_fits(tokens.shape[1], self.context)
        net, ids = self.net.eval(), mx.array(tokens.astype(np.int32))
        logits = _head(net, net.model(ids).astype(mx.float32)) if self._split else net(ids)
        return np.array(logits.astype(mx.float32))

    def decoding_head(self) -> Callable[[mx.array], mx.array] | None:
        """A function from hidden states [R, d] to float32 logits [R, V], for many tokens.

        A copy in float32 of a head in half precision is multiplied with. None where the model's logits are
        more than its head's output.
        """
        head = self._fused_head(self.net)
        if head is None or isinstance(head[0], PackedHead) or head[0].dtype == mx.float32:
            return (lambda hidden: _head(self.net, hidden.astype(mx.float32))) if self._split else None
        weight = head[0].astype(mx.float32)
        return lambda hidden: hidden.astype(mx.float32) @ weight.T

    def adapted(self) -> list[tuple[str, nn.Module]]:
        """The adapted layers and their paths in the network."""
        return [(path, m) for path, m in self.net.named_modules() if hasattr(m, "lora_a")]

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        # A scale of 0 does not switch off DoRA, whose magnitude still acts: put the plain layers back
        # instead.
        layers = self.adapted()
        self.net.update_modules(tree_unflatten([(path, m.linear) for path, m in layers]))
        try:
            with token_rows.off(self.net):
                yield
        finally:
            self.net.update_modules(tree_unflatten(layers))

    # Around training.

    def parameter_counts(self) -> tuple[int, int]:
        # A quantised layer stores 32 / bits weights in one uint32, and scales and biases beside them.
        packed = 0
        for _, m in self.net.named_modules():
            if hasattr(m, "bits") and hasattr(m, "scales"):
                packed += (
                    m.weight.size * 32 // m.bits
                    - m.weight.size
                    - m.scales.size
                    - (m.biases.size if "biases" in m else 0)
                )
        total = sum(v.size for _, v in tree_flatten(self.net.parameters())) + packed
        return total, sum(v.size for _, v in tree_flatten(self.net.trainable_parameters()))

    def trained(self) -> Any:
        """The tree of what is trained, in mixed precision with the float32 weights."""
        tree = self.net.trainable_parameters()
        if not self._weights:
            return tree
        return tree_unflatten([(name, self._weights.get(name, v)) for name, v in tree_flatten(tree)])

    def set_trained(self, values: Mapping[str, mx.array]) -> list[mx.array]:
        """Replace trained parameters by name; returns the copies of them that the network computes with."""
        copied = {name: value for name, value in values.items() if name in self._weights}
        self._weights |= copied
        if whole := [(name, value) for name, value in values.items() if name not in copied]:
            self.net.update(tree_unflatten(whole))
        return mlx_mixed.place(self.net, copied)

    def add_adapter(self, spec: AdapterSpec, seed: int) -> None:
        from mlx_lm.tuner.dora import DoRALinear
        from mlx_lm.tuner.lora import LoRALinear

        if spec.dropout and self.config["model_type"] == "gpt2":
            mlx_lean.undo(self.net)
        layer_type = DoRALinear if spec.kind == "dora" else LoRALinear
        self.net.freeze()
        linear = {
            self._hf_path(p): (p, m)
            for p, m in self.net.named_modules()
            if isinstance(m, nn.Linear | nn.QuantizedLinear)
        }
        linear.pop("score", None)
        spec = spec.resolved(self.config["model_type"], linear)
        paths = match_targets(list(linear), spec.targets or ())
        files.check_names(self.folder, self.config, [f"{path}.weight" for path in paths])
        chosen = [linear[path] for path in paths]
        self.spec = spec
        if self.has_head:
            self.net.score.unfreeze()
        layers = {
            p: layer_type.from_base(m, r=spec.rank, dropout=spec.dropout, scale=spec.scale)
            for p, m in sorted(chosen)
        }
        initial = initial_adapter(
            {self._hf_path(p): m.lora_a.shape[:1] + m.lora_b.shape[1:] for p, m in layers.items()},
            spec.rank,
            seed,
        )
        for path, layer in layers.items():
            layer.lora_a = mx.array(initial[self._hf_path(path)].T)
            layer.linear.freeze()
            if spec.kind == "dora":  # train the magnitude, as PEFT does
                layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
        self.net.update_modules(tree_unflatten(list(layers.items())))
        if spec.tokens:
            token_rows.add(self.net, spec.tokens)
        mx.eval(self.net.parameters())

    @property
    def has_head(self) -> bool:
        return "score" in self.net

    def add_head(self, weight: np.ndarray) -> None:
        if not hasattr(self.net, "model"):
            raise UserError(
                f"{self.config['model_type']}: mlx-lm does not give this architecture's hidden states, so it "
                "cannot have a scalar head"
            )
        score = nn.Linear(weight.shape[1], 1, bias=False)
        score.weight = mx.array(weight)
        self.net.score = score
        mx.eval(score.parameters())

    def _hf_path(self, path: str) -> str:
        return names.hf_path(path, self.config["model_type"])

    def keep_reference(self) -> None:
        if self.spec is None:
            reference = self._reload()
            # Real copies: one array must not be both an input (the policy) and a constant (the reference) of
            # a compiled function.
            policy = {name: value for name, value in self.net.parameters().items() if name != "score"}
            reference.update(tree_map(lambda v: v + mx.zeros((), v.dtype), policy))
            mx.eval(reference.parameters())
            self._reference = reference.freeze().eval()

    def evaluate(self, loss: Loss, batches: Sequence[Batch]) -> dict[str, float]:
        device.begin("evaluation")
        self.net.eval()
        totals = micro_batch_totals(batches)
        sums: dict[str, float] = {}
        for batch in batches:
            value, metrics = loss(self, self.to_device(batch, totals[batch.term]))
            metrics = {**metrics, "loss": value}
            mx.eval(metrics)
            for name, part in metrics.items():
                sums[name] = sums.get(name, 0.0) + part.item()
        return sums

    def token_logprobs(self, batches: Sequence[Batch]) -> list[np.ndarray]:
        device.begin("evaluation")
        self.net.eval()
        return [np.array(self.logprobs(self.to_device(batch, 1.0))) for batch in batches]

    def apply(
        self,
        function: Callable[[Any, DeviceBatch], dict[str, mx.array]],
        batches: Sequence[Batch],
        beside: Sequence[Any] = (),
    ) -> list[dict[str, np.ndarray]]:
        device.begin("evaluation")
        for model in (self, *beside):
            model.net.eval()
        return [_to_numpy(function(self, self.to_device(batch, batch.count))) for batch in batches]

    def gradient(self, loss: Loss, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
        self.net.eval()
        totals = micro_batch_totals(batches)
        parameters = self.net.trainable_parameters()

        def value(parameters: Any, batch: DeviceBatch) -> mx.array:
            self.net.update(parameters)
            return loss(self, batch)[0]

        gradients: Any = None
        try:
            for batch in batches:
                part = mx.grad(value)(parameters, self.to_device(batch, totals[batch.term]))
                gradients = part if gradients is None else tree_map(mx.add, gradients, part)
                mx.eval(gradients)
        finally:
            self.net.update(parameters)  # tracing leaves placeholders in the module
        return {name: np.array(g.astype(mx.float32)) for name, g in tree_flatten(gradients)}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        stop: Stop,
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        first_row: int = 0,
        on_token: Callable[[int, int], None] | None = None,
        forbidden: Sequence[int] = (),
    ) -> list[Generated]:
        self.net.eval()  # dropout off, and with it gradient checkpointing
        device.begin("rollout")
        with device.wired():
            return decoding.decode(
                MLXDecoder(self.net, self.decoding_head()),
                prompts,
                context=self.context,
                max_tokens=max_tokens,
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                samples=samples,
                seed=seed,
                first_row=first_row,
                on_token=on_token,
                forbidden=forbidden,
            )

    # Files.

    def save(self, folder: Path) -> None:
        if self.spec is not None:
            self._save_adapter(folder)
        else:
            files.save_model(folder, {n: v for n, v in self._full().items() if n != files.HEAD}, self.folder)
        if self.has_head:
            files.save_head(folder, self.head())

    def save_classifier(self, folder: Path, pad: int) -> None:
        if self.spec is not None:
            self._save_adapter(folder, self.head())
        else:
            files.save_model(folder, self._full(), self.folder, pad)

    def _save_adapter(self, folder: Path, head: np.ndarray | None = None) -> None:
        assert self.spec is not None
        kind = self.config["model_type"]
        rows = token_rows.read(self.net, kind)
        files.save_adapter(folder, self._adapter(), self.spec, kind, self.base_name, head, rows)

    def _full(self) -> dict[str, mx.array]:
        weights = {**dict(tree_flatten(self.net.parameters())), **self._weights}
        return names.to_hf(weights, self.config["model_type"])

    def head(self) -> np.ndarray:
        return np.array(self.net.score.weight.astype(mx.float32))

    def load_trained(self, folder: Path) -> None:
        if self.spec is None:
            weights = mlx_load.read_weights(folder, self.config)
            current = dict(tree_flatten(self.net.parameters()))
            # The head is read below, from whichever file holds it.
            weights += [(files.HEAD, current[files.HEAD])] if self.has_head else []
            self.net.load_weights(weights, strict=True)
            self.set_trained({name: value for name, value in weights if name in self._weights})
        else:
            widths = {
                self._hf_path(path): (layer.lora_a.shape[0], layer.lora_b.shape[1])
                for path, layer in self.adapted()
            }
            modules = files.read_adapter(folder, widths)
            for path, layer in self.adapted():
                for name, value in modules[self._hf_path(path)].items():
                    setattr(layer, name, mx.array(np.ascontiguousarray(value)))
            if self.spec.tokens:
                token_rows.write(self.net, files.read_rows(folder, self.spec.tokens))
        head = files.read_head(folder)
        if head is not None:
            self.add_head(head)
        mx.eval(self.net.parameters())

    def _adapter(self) -> dict[str, dict[str, np.ndarray]]:
        modules = {}
        for path, layer in self.adapted():
            parts = ("lora_a", "lora_b", "m") if "m" in layer else ("lora_a", "lora_b")
            modules[self._hf_path(path)] = {n: np.array(layer[n].astype(mx.float32)) for n in parts}
        return modules

    def weights(self) -> Mapping[str, np.ndarray]:
        trained = dict(tree_flatten(self.trained()))
        if self.spec is None:
            trained = names.to_hf(trained, self.config["model_type"])
        return {name: np.array(v.astype(mx.float32)) for name, v in trained.items()}


def _to_numpy(arrays: dict[str, mx.array]) -> dict[str, np.ndarray]:
    mx.eval(arrays)  # together: they share most of their work
    return {name: np.array(value) for name, value in arrays.items()}


def _head_layer(net: nn.Module) -> nn.Module:
    if "lm_head" in net:
        return net.lm_head
    return next(net.model[name] for name in ("wte", "embed_in", "embed_tokens") if name in net.model)


def _head(net: nn.Module, hidden: mx.array) -> mx.array:
    """Logits of hidden states, in the wider of the two number formats."""
    layer = _head_layer(net)
    return layer(hidden) if "lm_head" in net else layer.as_linear(hidden)


def _splits(net: nn.Module) -> bool:
    """Whether the model computes ``head(backbone(x))``, found by trying it.

    Some architectures scale or cap their logits. A cap is not seen on the small logits of random weights.
    """
    if getattr(net, "final_logit_softcapping", None):
        return False
    probe = mx.array([[1, 2, 3, 4]])
    try:
        return bool(mx.allclose(_head(net, net.model(probe)), net(probe), rtol=1e-4, atol=1e-4).item())
    except (AttributeError, TypeError, ValueError, KeyError):
        return False
