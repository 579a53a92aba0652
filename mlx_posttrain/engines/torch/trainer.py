"""Training steps of the torch engine, with torch's AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines.base import AdamW, Loss, micro_batch_totals
from mlx_posttrain.engines.torch.model import TorchModel, to_device
from mlx_posttrain.errors import UserError


def _has_fused_adamw() -> bool:
    """Whether this torch updates CPU parameters in one kernel.

    torch 2.2, the last release for Intel Macs, refuses to.
    """
    try:
        from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
    except ImportError:
        return False
    return "cpu" in _get_fused_kernels_supported_devices()


class TorchTrainer:
    """torch.optim.AdamW over a model's trained parameters."""

    compiled = 0

    def __init__(self, model: TorchModel, settings: AdamW):
        self.model = model
        self.settings = settings
        named = list(model.trained_parameters())
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=_has_fused_adamw(),
        )

    def step(self, loss: Loss, batches: Sequence[Batch], lr: float) -> dict[str, float]:
        self.model.net.train()
        totals = micro_batch_totals(batches)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            value, metrics = loss(self.model, to_device(batch, totals[batch.term]))
            value.backward()
            for name, part in {**metrics, "loss": value}.items():
                sums[name] = sums.get(name, 0.0) + part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or float("inf"))
        result = {name: float(part) for name, part in sums.items()} | {"grad_norm": float(norm)}
        if not np.isfinite(result["loss"]) or not np.isfinite(result["grad_norm"]):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"loss {result['loss']}, gradient norm {result['grad_norm']}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        state = {}
        for name, p in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"{name}:{key}"] = value.contiguous()
        save_file(state, path)

    def load(self, path: Path) -> None:
        from safetensors.torch import load_file

        state = load_file(path)
        unknown = sorted({key.rpartition(":")[0] for key in state} - set(self.names))
        if unknown:
            raise UserError(
                f"{path}: its moments are of other parameters, for example {unknown[0]}: it "
                "belongs to another run"
            )
        for name, p in zip(self.names, self.parameters, strict=True):
            moments = {
                key.rpartition(":")[2]: value
                for key, value in state.items()
                if key.rpartition(":")[0] == name
            }
            if moments:
                self.optimizer.state[p] = moments
