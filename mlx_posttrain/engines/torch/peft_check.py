"""An exported adapter, opened by PEFT itself and held against the model that it was exported from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mlx_posttrain.engines.base import Model


def peft_difference(model: Model, base: Path, adapter: Path) -> float:
    """Largest absolute difference between a model's logits and those of its adapter in transformers and PEFT.

    base: the folder of the weights without the adapter; adapter: the exported PEFT folder.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with quiet_loading():
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(loaded, adapter).eval()
    tokens = np.random.default_rng(0).integers(0, model.config["vocab_size"], (2, 48))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    return float(np.abs(model.full_logits(tokens) - wanted).max())


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bars and its warning about a deprecated name that PEFT uses.

    A user can act on neither.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
