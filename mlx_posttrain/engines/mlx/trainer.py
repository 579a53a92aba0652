"""Training steps of the MLX engine: mlx's AdamW, with gradient and update compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_posttrain.data.batches import Batch
from mlx_posttrain.engines.base import UPDATE_BYTES, AdamW, DeviceBatch, Loss, micro_batch_totals
from mlx_posttrain.engines.mlx import device
from mlx_posttrain.engines.mlx.model import MLXModel
from mlx_posttrain.errors import UserError


class _AdamW(optim.AdamW):
    """mlx's AdamW with decay on matrices only."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        if parameter.ndim > 1:
            return super().apply_single(gradient, parameter, state)
        return optim.Adam.apply_single(self, gradient, parameter, state)


class MLXTrainer:
    """Gradient and update as pure functions of (parameters, state, batch), compiled once per batch shape."""

    def __init__(self, model: MLXModel, settings: AdamW):
        self.model = model
        self.settings = settings
        # Off by default in mlx; without it nothing would match PyTorch.
        self.optimizer = _AdamW(
            learning_rate=0.0,
            betas=[settings.beta1, settings.beta2],
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(model.trained())
        self._state: dict[str, mx.array] = dict(tree_flatten(self.optimizer.state))
        self._gradients: dict[Loss, Callable[..., Any]] = {}
        self._update = _compile(self._update_plain)
        self._logged = _compile(_logged)
        self._shapes: set[tuple[Any, ...]] = set()

    @property
    def compiled(self) -> int:
        return len(self._shapes) if _compile_works() else 0

    def _gradient(self, loss: Loss) -> Callable[..., Any]:
        if loss not in self._gradients:
            net = self.model.net

            def with_parameters(parameters: Any, arrays: dict[str, mx.array]) -> Any:
                net.update(parameters)
                return loss(self.model, DeviceBatch(**arrays))

            function = mx.value_and_grad(with_parameters)
            self._gradients[loss] = _compile(function, inputs=mx.random.state, outputs=mx.random.state)
        return self._gradients[loss]

    def _update_plain(
        self,
        gradients: list[mx.array],
        parameters: list[mx.array],
        moments: list[dict[str, mx.array]],
        step: mx.array,
        lr: mx.array,
        factor: mx.array,
    ) -> Any:
        self.optimizer.state = {"step": step, "learning_rate": lr}
        updated = [
            self.optimizer.apply_single(g.astype(p.dtype) * factor.astype(p.dtype), p, m)
            for g, p, m in zip(gradients, parameters, moments, strict=True)
        ]
        # A gradient may be transposed and pass its strides on to the weight; a weight read from a checkpoint
        # is never transposed. With one layout for both, matmul rounds alike, and a resumed run equals an
        # uninterrupted one.
        return [mx.contiguous(u) for u in updated], moments

    def _apply(self, gradients: list[tuple[str, mx.array]], lr: float, factor: mx.array) -> None:
        """Update the parameters a group at a time.

        All at once, memory would hold every weight and moment twice. gradients: emptied, so that each group's
        memory can be freed. factor: of clipping, on every gradient.
        """
        state = self._state
        rate = mx.array(lr, mx.float32)
        state["step"] = state["step"] + 1
        while gradients:
            group, size = [], 0
            while gradients and size < UPDATE_BYTES:
                group.append(gradients.pop())
                size += group[-1][1].nbytes
            names = [name for name, _ in group]
            known = dict(tree_flatten(self.model.trained()))
            updated, moments = self._update(
                [g for _, g in group],
                [known.pop(name) for name in names],
                [{m: state.pop(f"{name}.{m}") for m in ("m", "v")} for name in names],
                state["step"],
                rate,
                factor,
            )
            copies = self.model.set_trained(dict(zip(names, updated, strict=True)))
            state |= {
                f"{name}.{m}": value
                for name, pair in zip(names, moments, strict=True)
                for m, value in pair.items()
            }
            # Only the work in progress refers to the old arrays now, so memory of what is done goes to what
            # follows.
            del group, known
            mx.async_eval(updated, moments, copies)

    def step(self, loss: Loss, batches: Sequence[Batch], lr: float) -> dict[str, float]:
        device.begin("training")
        net = self.model.net
        net.train()
        gradient = self._gradient(loss)
        parameters = net.trainable_parameters()
        totals = micro_batch_totals(batches)
        sums: dict[str, mx.array] = {}
        gradients: Any = None
        try:
            for batch in batches:
                arrays = self.model.to_device(batch, totals[batch.term])
                extra = sorted((name, value.shape) for name, value in arrays.extra.items())
                self._shapes.add((loss, batch.tokens.shape, batch.index.shape, *extra))
                (value, metrics), part = gradient(parameters, vars(arrays))
                gradients = part if gradients is None else tree_map(_add, gradients, part)
                for name, m in {**metrics, "loss": value}.items():
                    sums[name] = sums[name] + m if name in sums else m
                mx.async_eval(sums, gradients)  # the next micro-batch is prepared meanwhile
        finally:
            net.update(parameters)  # tracing leaves placeholders in the module
        flat = tree_flatten(gradients)
        logged = self._logged([g for _, g in flat], list(sums.values()))
        # The step waits here only: the logged numbers also decide whether the weights may take the gradient.
        # The update is not waited for.
        result = dict(zip((*sums, "grad_norm"), np.array(logged).tolist(), strict=True))
        if not np.isfinite(result["loss"]) or not np.isfinite(result["grad_norm"]):
            raise FloatingPointError(f"loss {result['loss']}, gradient norm {result['grad_norm']}")
        factor = (
            mx.array(1.0)
            if self.settings.clip is None
            else mx.minimum(self.settings.clip / (logged[-1] + 1e-6), 1.0)
        )
        del gradients, part, parameters
        self._apply(flat, lr, factor)
        return result

    def save(self, path: Path) -> None:
        mx.save_safetensors(str(path), self._state)

    def load(self, path: Path) -> None:
        state: dict[str, mx.array] = dict(mx.load(str(path)))
        known = self._state
        unknown = sorted(set(state) ^ set(known)) or sorted(
            n for n, v in state.items() if v.shape != known[n].shape
        )
        if unknown:
            raise UserError(
                f"{path}: its moments are of other parameters, for example {unknown[0]}: it "
                "belongs to another run"
            )
        self._state = state


def _add(a: mx.array, b: mx.array) -> mx.array:
    """The sum of two micro-batches' gradients, in float32 whatever format the blocks compute in."""
    return a.astype(mx.float32) + b.astype(mx.float32)


def _logged(gradients: list[mx.array], metrics: list[mx.array]) -> mx.array:
    """[M + 1] float32: the metrics of a step, and the global norm of its gradient."""
    squares = mx.stack([mx.sum(mx.square(g.astype(mx.float32))) for g in gradients])
    return mx.stack([*(m.astype(mx.float32) for m in metrics), mx.sqrt(mx.sum(squares))])


def _compile(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return mx.compile(function, **kwargs) if _compile_works() else function


@cache
def _compile_works() -> bool:
    # On a CPU, mx.compile calls the system's C++ compiler; a machine without one must be able to train too.
    from mlx_posttrain.engines.mlx.cpu.compile_check import compile_works

    return compile_works()
