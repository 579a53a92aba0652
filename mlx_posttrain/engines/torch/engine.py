"""The PyTorch-CPU engine: transformers' models, peft's adapters, torch's AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_posttrain.convert import checks, hub
from mlx_posttrain.engines import files
from mlx_posttrain.engines.base import AdamW
from mlx_posttrain.engines.process import forget_process_peak, process_peak
from mlx_posttrain.engines.torch import packed as torch_packed
from mlx_posttrain.engines.torch import token_rows
from mlx_posttrain.engines.torch.model import TorchModel, load_weights
from mlx_posttrain.engines.torch.trainer import TorchTrainer
from mlx_posttrain.errors import UserError


class TorchEngine:
    """PyTorch on the CPU as an :class:`~mlx_posttrain.engines.base.Engine`."""

    name = "torch"
    gpu = False

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
    ) -> TorchModel:
        if quantize:
            raise UserError(
                "adapter.quantize needs engine=mlx: torch on a CPU has no quantised training here; use "
                "engine=mlx, or leave quantize out for LoRA"
            )
        from transformers.utils import logging

        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        config = hub.check_config(folder)
        if config.get("quantization"):
            raise UserError(f"{folder}: an MLX-quantised model runs on engine=mlx only")
        try:
            net = self._net(folder, config, dtype)
        except UserError as error:
            raise UserError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
        # A config that contradicts its weights can fail anywhere in a library that trusts it.
        except Exception as error:
            raise UserError(
                f"{folder}: cannot be loaded: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from None
        checks.check_finite(net.named_parameters(), folder)
        if vocabulary > (config.get("vocab_size") or 0):
            token_rows.enlarge(net, vocabulary)
            config = {**config, "vocab_size": vocabulary}
        if gradient_checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        return TorchModel(net.eval(), folder, config, mixed)

    def context(self, folder: Path) -> int | None:
        config = hub.check_config(folder)
        found: int | None = config.get("n_positions") or config.get("max_position_embeddings")
        return found

    def _net(self, folder: Path, config: dict[str, Any], dtype: str) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        hf = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if files.is_classifier(config):
            hf.tie_word_embeddings = True  # its folder has no language-model head
        for name in list(vars(hf)):  # dropout comes from the recipe only, so that the engines' losses agree
            if name.endswith(("_pdrop", "_dropout")) and isinstance(getattr(hf, name), float):
                setattr(hf, name, 0.0)
        if config.get("model_type") == "gpt2":
            if hf.activation_function == "gelu_new":
                # The same function as one operation; transformers' own keeps five arrays for its gradient.
                hf.activation_function = "gelu_pytorch_tanh"
            net = AutoModelForCausalLM.from_config(
                hf, attn_implementation=torch_packed.ATTENTION, dtype=getattr(torch, dtype)
            )
            load_weights(net, folder, config)
        else:
            net = AutoModelForCausalLM.from_pretrained(
                folder, config=hf, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
            )
        return net

    def trainer(self, model: TorchModel, settings: AdamW) -> TorchTrainer:
        if model.spec is None:
            files.check_names(model.folder, model.config, [name for name, _ in model.trained_parameters()])
        return TorchTrainer(model, settings)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def random_state(self) -> dict[str, np.ndarray]:
        return {"torch": torch.get_rng_state().numpy()}

    def set_random_state(self, state: Mapping[str, np.ndarray]) -> None:
        if "torch" in state:
            torch.set_rng_state(torch.from_numpy(np.ascontiguousarray(state["torch"])))

    def memory(self) -> dict[str, float]:
        return {"peak_gb": process_peak() / 2**30}  # on a CPU, of the whole process

    def reset_memory(self) -> None:
        forget_process_peak()

    def resident(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def synchronize(self) -> None:
        pass  # a CPU's operations are done when they return

    def device(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"
