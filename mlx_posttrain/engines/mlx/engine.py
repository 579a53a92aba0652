"""The MLX engine: mlx-lm's models, LoRA layers and KV cache; mlx's AdamW; compiled gradient and update."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_posttrain.console import log
from mlx_posttrain.convert import hub, mlx_config
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.engines.mlx import device
from mlx_posttrain.engines.mlx import load as mlx_load
from mlx_posttrain.engines.mlx import mixed as mlx_mixed
from mlx_posttrain.engines.mlx.cpu import blas
from mlx_posttrain.engines.mlx.model import MLXModel
from mlx_posttrain.engines.mlx.trainer import MLXTrainer


class MLXEngine:
    """MLX as an :class:`~mlx_posttrain.engines.base.Engine`."""

    name = "mlx"

    def __init__(self) -> None:
        blas.load()  # on Linux MLX would otherwise multiply with the reference BLAS
        device.prepare()

    @property
    def gpu(self) -> bool:
        return device.on_gpu()

    def load(
        self,
        folder: Path,
        *,
        dtype: str = "float32",
        quantize: int | None = None,
        group_size: int = 64,
        gradient_checkpointing: bool = False,
        vocabulary: int = 0,
        mixed: bool = False,
    ) -> MLXModel:
        given = hub.check_config(folder)
        if given["model_type"] != "gpt2":
            _tell_limits(folder, mlx_config.readable(folder, given))

        def read() -> tuple[nn.Module, dict[str, mx.array]]:
            net = mlx_load.load(folder, given, dtype, quantize, group_size, vocabulary, mixed)
            return net, mlx_mixed.use_in(net) if mixed else {}

        net, weights = read()
        if gradient_checkpointing:
            mlx_load.checkpoint_blocks(net)
        config = {**given, "vocab_size": max(given.get("vocab_size") or 0, vocabulary)}
        return MLXModel(net, folder, config, self.context(folder), lambda: read()[0], weights)

    def context(self, folder: Path) -> int | None:
        config = hub.check_config(folder)
        if config["model_type"] == "gpt2":
            return config["n_positions"]
        return mlx_config.readable(folder, config).context

    def trainer(self, model: MLXModel, settings: AdamW) -> MLXTrainer:
        if model.spec is None:
            trained = [name for name, _ in tree_flatten(model.net.trainable_parameters())]
            files.check_names(model.folder, model.config, trained)
        return MLXTrainer(model, settings)

    def seed(self, seed: int) -> None:
        mx.random.seed(seed)

    def random_state(self) -> dict[str, np.ndarray]:
        return {"mlx": np.array(mx.random.state[0])}

    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        if "mlx" in state:
            high, low = (int(v) for v in state["mlx"])
            # mlx's state is its key, the two halves of the seed; it cannot be assigned.
            mx.random.seed((high << 32) | low)
            if not np.array_equal(np.array(mx.random.state[0]), state["mlx"]):
                raise RuntimeError(
                    "this version of mlx keeps its random state differently: a run cannot be resumed exactly"
                )

    def memory(self) -> dict[str, float]:
        found = {
            "peak": mx.get_peak_memory(),
            "active": mx.get_active_memory(),
            "cache": mx.get_cache_memory(),
        }
        return {f"{name}_gb": size / 2**30 for name, size in found.items()}

    def reset_memory(self) -> None:
        mx.reset_peak_memory()

    def resident(self) -> AbstractContextManager[Any]:
        return device.wired()

    def synchronize(self) -> None:
        mx.synchronize()

    def device(self) -> str:
        if device.on_gpu():
            return f"{mx.device_info().get('device_name', 'GPU')} (Metal)"
        return "CPU (MLX)"


def _tell_limits(folder: Path, config: mlx_config.Readable) -> None:
    if config.bound is not None:
        log(
            f"{folder}: {config.bound}, so texts have at most {config.context} tokens here; engine=torch has "
            "no such limit"
        )
    if not config.tested:
        log(
            f"{folder}: its architecture is not among those whose logits are tested on MLX (docs/models.md): "
            f"compare them once with `mlx-posttrain doctor --model {folder}`"
        )
