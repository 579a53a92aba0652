"""Models of the torch engine: transformers' networks and peft's adapters behind the Model protocol."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from mlx_posttrain.engines.torch import fused as torch_fused
from mlx_posttrain.engines.torch import packed as torch_packed
from mlx_posttrain.engines.torch import token_rows
from mlx_posttrain.engines.torch.decoding import TorchDecoder
from mlx_posttrain.errors import UserError
from mlx_posttrain.losses.policy import entropy
from mlx_posttrain.losses.sft import full_kl, token_logprobs


def to_device(batch: Batch, total: float) -> DeviceBatch:
    """The batch as torch tensors; total: see :class:`~mlx_posttrain.engines.base.DeviceBatch`."""

    def array(values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.long() if tensor.dtype == torch.int32 else tensor  # torch indexes with 64 bits

    return device_batch(batch, total, array)


@torch.no_grad()
def load_weights(net: Any, folder: Path, config: dict[str, Any]) -> None:
    """Copy a folder's weights into ``net``.

    Raises UserError when weights are missing or have other shapes than the config says.
    """
    weights = files.torch_weights(folder, config)
    parameters = dict(net.named_parameters())
    # GPT-NeoX's head has one name in files and, in transformers 5, another in the network.
    if "embed_out.weight" in weights and "lm_head.weight" in parameters:
        weights["lm_head.weight"] = weights.pop("embed_out.weight")
    # A classifier's folder has no language-model head, and a scalar head may be in a file of its own.
    for name in ("lm_head.weight", files.HEAD):
        if name in parameters and name not in weights:
            del parameters[name]
    missing = sorted(set(parameters) - set(weights))
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights are missing, for example {missing[0]}")
    for name, p in parameters.items():
        if p.shape != weights[name].shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, the config says {tuple(p.shape)}"
            )
        p.copy_(weights[name])


class TorchModel:
    """A transformers causal model; ``net`` is the bare model, ``peft`` the wrapper once an adapter is on."""

    def __init__(self, net: Any, folder: Path, config: dict[str, Any], mixed: bool):
        self.net = net
        self.peft: Any = None
        self.spec: AdapterSpec | None = None
        self.folder = folder
        self.base_name = str(folder)
        self.config = config
        self.context: int | None = getattr(net.config, "n_positions", None) or getattr(
            net.config, "max_position_embeddings", None
        )
        self._mixed = mixed
        self._reference: Any = None
        self._split, self._embeds = _splits(net), _embeds(net)
        head = files.read_head(folder)
        if head is not None:
            self.add_head(head)

    @property
    def shares_prefixes(self) -> bool:
        return self._split and self.net.config._attn_implementation == torch_packed.ATTENTION

    @property
    def exact_sampler(self) -> bool:
        rotation = str(self.config.get("rope_parameters") or self.config.get("rope_scaling"))
        changing = any(kind in rotation for kind in ("longrope", "dynamic"))
        whole = all(p.dtype == torch.float32 for p in self.net.parameters())
        return whole and not changing and not self._mixed

    # The vocabulary of losses.

    def _logits(self, net: Any, batch: DeviceBatch) -> torch.Tensor:
        check_fits(batch.tokens.shape[1], self.context)
        # Hidden states first, so that the head runs at trained positions only. Right padding needs no mask,
        # see data/batches.py.
        if not self._split:
            with self._precision():
                logits = net(input_ids=batch.tokens, use_cache=False).logits
            return logits.flatten(0, 1)[batch.index].float()
        return _head(net, self._hidden(net, batch))

    def _hidden(self, net: Any, batch: DeviceBatch) -> torch.Tensor:
        check_fits(batch.tokens.shape[1], self.context)
        run = self._backbone(net)
        # Rows cannot share a prefix under dropout, whose mask differs from row to row.
        if self.shares_prefixes and not (net.training and self.spec is not None and self.spec.dropout):
            return torch_packed.hidden(run, batch.tokens, batch.index).float()
        return run(batch.tokens).flatten(0, 1)[batch.index].float()

    def _backbone(self, net: Any) -> Callable[..., torch.Tensor]:
        """A function from ids [B, T] and the backbone's other arguments to its hidden states [B, T, d]."""
        backbone = getattr(net, net.base_model_prefix)
        layer = net.get_input_embeddings()
        in_place = self._embeds and torch.is_grad_enabled() and layer.weight.requires_grad

        def run(tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
            inputs = (
                {"inputs_embeds": torch_fused.embed(tokens, layer.weight)}
                if in_place
                else {"input_ids": tokens}
            )
            with self._precision():
                return backbone(**inputs, use_cache=False, **arguments).last_hidden_state

        return run

    def _precision(self) -> torch.autocast:
        """A context in which blocks compute in bfloat16 where precision is mixed; losses stay outside."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self._mixed)

    def logits(self, batch: DeviceBatch) -> torch.Tensor:
        return self._logits(self.net, batch)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[Any]:
        with torch.no_grad():
            if self._reference is not None:
                yield self._reference
            elif self.peft is None:
                raise RuntimeError("a reference needs keep_reference() first")
            else:
                with self.adapters_off():
                    yield self.net

    def reference_logits(self, batch: DeviceBatch) -> torch.Tensor:
        with self._frozen() as net:
            return self._logits(net, batch)

    def _fused_head(self, net: Any) -> tuple[torch.Tensor, torch_fused.Rows] | None:
        """The head's weight [V, d] and its trained rows; None for a head that is not one plain matrix."""
        layer: Any = net.get_output_embeddings() if self._split else None
        if type(layer) is token_rows.RowLinear and layer.on:
            return layer.whole(), (layer.index, layer.rows)
        plain = type(layer) in (torch.nn.Linear, token_rows.RowLinear) and layer.bias is None
        return (layer.weight, None) if plain else None

    def _logprobs(self, net: Any, batch: DeviceBatch, temperature: float) -> torch.Tensor:
        head = self._fused_head(net)
        if head is None:
            return token_logprobs(self._logits(net, batch) / temperature, batch.target)
        hidden = self._hidden(net, batch) / temperature
        return torch_fused.logprobs(hidden, head[0], batch.target, head[1])

    def logprobs(self, batch: DeviceBatch, temperature: float = 1.0) -> torch.Tensor:
        return self._logprobs(self.net, batch, temperature)

    def reference_logprobs(self, batch: DeviceBatch, temperature: float = 1.0) -> torch.Tensor:
        with self._frozen() as net:
            return self._logprobs(net, batch, temperature)

    def logprobs_and_kl(
        self, batch: DeviceBatch, direction: str, beta: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = self._fused_head(self.net)
        if head is None:
            logits = self.logits(batch)
            return token_logprobs(logits, batch.target), full_kl(
                logits, self.reference_logits(batch), direction
            )
        with self._frozen() as net:
            reference_weight, cached = net.get_output_embeddings().weight, batch.extra.get(REFERENCE_HIDDEN)
            hidden = self._hidden(net, batch) if cached is None else cached
        return torch_fused.logprobs_and_kl(
            self._hidden(self.net, batch),
            head[0],
            hidden,
            reference_weight,
            batch.target,
            direction,
            beta,
            head[1],
        )

    @property
    def reference_width(self) -> int | None:
        head = self._fused_head(self.net)
        return None if head is None else head[0].shape[1]

    def reference_hidden(self, batch: Batch) -> np.ndarray:
        self.net.eval()
        with self._frozen() as net:
            return self._hidden(net, to_device(batch, 1.0)).numpy()

    def policy_terms(
        self, batch: DeviceBatch, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        head = self._fused_head(self.net)
        if head is None:
            logits = self.logits(batch) / temperature
            return (
                token_logprobs(logits, batch.target),
                entropy(logits),
                self.scores(batch) if self.has_head else None,
            )
        hidden = self._hidden(self.net, batch)
        terms = torch_fused.logprobs_and_entropy(hidden / temperature, head[0], batch.target, head[1])
        return *terms, self.net.score(hidden)[:, 0] if self.has_head else None

    def scores(self, batch: DeviceBatch) -> torch.Tensor:
        return self.net.score(self._hidden(self.net, batch))[:, 0]

    @torch.no_grad()
    def full_logits(self, tokens: np.ndarray) -> np.ndarray:
        check_fits(tokens.shape[1], self.context)
        net, ids = self.net.eval(), torch.from_numpy(tokens).long()
        if self._split:
            return _head(net, self._backbone(net)(ids)).numpy()
        with self._precision():
            return net(input_ids=ids, use_cache=False).logits.float().numpy()

    def decoding_head(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A function from hidden states [R, d] to float32 logits [R, V], for many tokens.

        A copy in float32 of a head in half precision is multiplied with. None where the model's logits are
        more than its head's output.
        """
        head = self._fused_head(self.net)
        if head is None:
            return (lambda hidden: _head(self.net, hidden)) if self._split else None
        whole = head[0].float()
        return lambda hidden: torch_fused.logits(hidden.float(), whole)

    # Around training.

    def parameter_counts(self) -> tuple[int, int]:
        parameters = list(self.net.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    def add_adapter(self, spec: AdapterSpec, seed: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        linear = [p for p, m in self.net.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        spec = spec.resolved(self.net.config.model_type, linear)
        paths = match_targets(linear, spec.targets or ())
        files.check_names(self.folder, self.config, [f"{path}.weight" for path in paths])
        try:
            self.peft = get_peft_model(
                self.net,
                LoraConfig(
                    r=spec.rank,
                    lora_alpha=spec.alpha,  # type: ignore[arg-type]  # a float in practice
                    lora_dropout=spec.dropout,
                    use_rslora=spec.rslora,
                    use_dora=spec.kind == "dora",  # type: ignore[arg-type]
                    target_modules=list(spec.targets or ()),
                    fan_in_fan_out=self.net.config.model_type == "gpt2",
                    task_type="CAUSAL_LM",
                    bias="none",
                ),
            )
        except ValueError as error:
            raise UserError(
                f"adapter.targets {list(spec.targets or ())}: {str(error).splitlines()[0]}"
            ) from None
        self.spec = spec
        if self.has_head:
            self.net.score.requires_grad_(True)
        layers = dict(self._adapted())
        initial = initial_adapter(
            {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}, spec.rank, seed
        )
        with torch.no_grad():
            for path, layer in layers.items():
                layer.lora_A["default"].weight.copy_(torch.from_numpy(initial[path]))
                layer.lora_B["default"].weight.zero_()
        if spec.tokens:
            token_rows.add(self.net, spec.tokens)

    @property
    def has_head(self) -> bool:
        return hasattr(self.net, "score")

    @torch.no_grad()
    def add_head(self, weight: np.ndarray) -> None:
        if self.has_head:  # keep the parameter, to which an optimizer may refer
            self.net.score.weight.copy_(torch.tensor(weight))
            return
        score = torch.nn.Linear(weight.shape[1], 1, bias=False)
        score.weight = torch.nn.Parameter(torch.tensor(weight, dtype=torch.float32))
        self.net.score = score

    def _adapted(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        return ((path, module) for path, module in self.net.named_modules() if isinstance(module, LoraLayer))

    def keep_reference(self) -> None:
        if self.peft is None:
            self._reference = copy.deepcopy(self.net).requires_grad_(False).eval()

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        with self.peft.disable_adapter(), token_rows.off(self.net):
            yield

    @torch.no_grad()
    def evaluate(self, loss: Loss, batches: Sequence[Batch]) -> dict[str, float]:
        self.net.eval()
        totals = micro_batch_totals(batches)
        sums: dict[str, float] = {}
        for batch in batches:
            value, metrics = loss(self, to_device(batch, totals[batch.term]))
            for name, part in {**metrics, "loss": value}.items():
                sums[name] = sums.get(name, 0.0) + float(part)
        return sums

    @torch.no_grad()
    def token_logprobs(self, batches: Sequence[Batch]) -> list[np.ndarray]:
        self.net.eval()
        return [self.logprobs(to_device(batch, 1.0)).numpy() for batch in batches]

    @torch.no_grad()
    def apply(
        self,
        function: Callable[[Any, DeviceBatch], dict[str, torch.Tensor]],
        batches: Sequence[Batch],
        beside: Sequence[Any] = (),
    ) -> list[dict[str, np.ndarray]]:
        for model in (self, *beside):
            model.net.eval()
        return [
            {name: v.numpy() for name, v in function(self, to_device(batch, batch.count)).items()}
            for batch in batches
        ]

    def gradient(self, loss: Loss, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
        self.net.eval()
        totals = micro_batch_totals(batches)
        for batch in batches:
            loss(self, to_device(batch, totals[batch.term]))[0].backward()
        gradients = {
            name: p.grad.float().numpy().copy() for name, p in self.trained_parameters() if p.grad is not None
        }
        self.net.zero_grad(set_to_none=True)
        return gradients

    @torch.no_grad()
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
        # Switches off dropout and gradient checkpointing, which would silently empty the cache.
        self.net.eval()
        return decoding.decode(
            TorchDecoder(self.net, self.decoding_head(), self._precision),
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
            files.save_model(
                folder, {n: p.detach() for n, p in self.trained_parameters() if n != files.HEAD}, self.folder
            )
        if self.has_head:
            files.save_head(folder, self.head())

    def save_classifier(self, folder: Path, pad: int) -> None:
        if self.spec is not None:
            self._save_adapter(folder, self.head())
        else:
            files.save_model(folder, {n: p.detach() for n, p in self.trained_parameters()}, self.folder, pad)

    def _save_adapter(self, folder: Path, head: np.ndarray | None = None) -> None:
        assert self.spec is not None
        kind, rows = self.net.config.model_type, token_rows.read(self.net)
        files.save_adapter(folder, self._adapter(), self.spec, kind, self.base_name, head, rows)

    def head(self) -> np.ndarray:
        return self.net.score.weight.detach().float().numpy()

    def load_trained(self, folder: Path) -> None:
        if self.spec is not None:
            widths = {
                path: (layer.lora_A["default"].in_features, layer.lora_B["default"].out_features)
                for path, layer in self._adapted()
            }
            modules = files.read_adapter(folder, widths)
            with torch.no_grad():
                for path, layer in self._adapted():
                    layer.lora_A["default"].weight.copy_(torch.from_numpy(modules[path]["lora_a"]).T)
                    layer.lora_B["default"].weight.copy_(torch.from_numpy(modules[path]["lora_b"]).T)
                    if "m" in modules[path]:
                        layer.lora_magnitude_vector["default"].weight.copy_(
                            torch.from_numpy(modules[path]["m"])
                        )
            if self.spec.tokens:
                token_rows.write(self.net, files.read_rows(folder, self.spec.tokens))
        else:
            load_weights(self.net, folder, self.config)
        head = files.read_head(folder)
        if head is not None:
            self.add_head(head)

    def _adapter(self) -> dict[str, dict[str, np.ndarray]]:
        modules = {}
        for path, layer in self._adapted():
            modules[path] = {
                "lora_a": layer.lora_A["default"].weight.detach().T.numpy(),
                "lora_b": layer.lora_B["default"].weight.detach().T.numpy(),
            }
            if "default" in layer.lora_magnitude_vector:
                modules[path]["m"] = layer.lora_magnitude_vector["default"].weight.detach().numpy()
        return modules

    def trained_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained parameters and their names in the network."""
        return ((name, p) for name, p in self.net.named_parameters() if p.requires_grad)

    def weights(self) -> Mapping[str, np.ndarray]:
        return {name: p.detach().float().numpy().copy() for name, p in self.trained_parameters()}


def _head(net: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits of hidden states; see engines/fused.py for heads in half precision."""
    layer = net.get_output_embeddings()
    if type(layer) is torch.nn.Linear:
        bias = None if layer.bias is None else layer.bias.float()
        return torch.nn.functional.linear(hidden.float(), layer.weight.float(), bias)
    return layer(hidden.to(layer.weight.dtype)).float()


@torch.no_grad()
def _splits(net: Any) -> bool:
    """Whether the model computes ``head(backbone(x))``, found by trying it.

    Some architectures scale or cap their logits. A cap is not seen on the small logits of random weights.
    """
    if getattr(net.config, "final_logit_softcapping", None):
        return False
    probe = torch.tensor([[1, 2, 3, 4]])
    hidden = getattr(net, net.base_model_prefix)(input_ids=probe, use_cache=False).last_hidden_state
    return torch.allclose(
        net.get_output_embeddings()(hidden).float(), net(input_ids=probe).logits.float(), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def _embeds(net: Any) -> bool:
    """Whether the backbone's input is just rows of one plain embedding, found by trying it.

    Every row of the embedding must have a gradient.
    """
    layer = net.get_input_embeddings()
    if (
        type(layer) is not torch.nn.Embedding
        or layer.padding_idx is not None
        or layer.max_norm is not None
        or layer.scale_grad_by_freq
    ):
        return False
    probe, backbone = torch.tensor([[1, 2, 3, 4]]), getattr(net, net.base_model_prefix)
    # Backbones that accept no embeddings raise whatever they like.
    with contextlib.suppress(Exception):
        ours = backbone(inputs_embeds=layer(probe), use_cache=False).last_hidden_state
        return torch.equal(ours, backbone(input_ids=probe, use_cache=False).last_hidden_state)
    return False
