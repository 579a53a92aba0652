"""Decoding on torch: transformers' models, with a key/value cache that is not copied for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from mlx_posttrain.data.batches import round_up
from mlx_posttrain.engines import decoding


class _PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, tokens, head]: views of buffers with room for more tokens.

    transformers' own layer concatenates the cache and each new token, which took half the time of a rollout
    of 32 rows on a CPU.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            buffers = [
                new.new_empty((*new.shape[:2], round_up(end, decoding.TORCH_CACHE_BLOCK), new.shape[3]))
                for new in (key_states, value_states)
            ]
            for buffer, old in zip(buffers, self._buffers, strict=False):
                buffer[:, :, :begin] = old[:, :, :begin]
            self._buffers = buffers
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        return self._set_views(end)

    def _set_views(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._buffers:  # else no token has come through this layer yet
            end = self.get_seq_length()
            self._buffers = [change(buffer) for buffer in self._buffers]
            self._set_views(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change_rows(lambda buffer: buffer[indices])


class TorchDecoder:
    """A transformers model as a :class:`~mlx_posttrain.engines.decoding.Decoder`.

    head: gives the float32 logits of hidden states; None where the model's logits are more than its output.
    precision: makes the context in which the model runs.
    """

    ahead, leave_at = False, 0.0

    def __init__(
        self,
        net: Any,
        head: Callable[[torch.Tensor], torch.Tensor] | None,
        precision: Callable[[], AbstractContextManager[Any]],
    ):
        self.net = net
        self.head = head
        self.precision = precision

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inputs = {
            "input_ids": tokens,
            "attention_mask": self.mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        backbone = getattr(self.net, self.net.base_model_prefix)
        with self.precision():
            if self.head is None:
                logits = self.net(**inputs, logits_to_keep=1).logits[:, -1].float()
            else:
                hidden = backbone(**inputs).last_hidden_state[:, -1]
        if self.head is not None:
            logits = self.head(hidden)
        if self.cache.get_seq_length() != self.mask.shape[1]:
            raise RuntimeError(
                f"the key/value cache holds {self.cache.get_seq_length()} tokens, not {self.mask.shape[1]}"
            )
        return logits

    def prefill(self, prompts: Sequence[Sequence[int]], samples: int) -> torch.Tensor:
        longest = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            self.mask[row, longest - len(prompt) :] = 1
        self.cache = Cache(layer_class_to_replicate=_PreallocatedLayer)
        logits = self._forward(tokens, (self.mask.cumsum(1) - 1).clamp(min=0))
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
            self.mask = self.mask.repeat_interleave(samples, 0)
            logits = logits.repeat_interleave(samples, 0)
        return logits

    def advance(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.mask.sum(1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return self._forward(tokens[:, None], positions)

    def keep(self, rows: np.ndarray, array: torch.Tensor) -> torch.Tensor:
        index = torch.from_numpy(rows)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]
        return array[index]

    def pick(
        self, logits: torch.Tensor, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        picked = decoding.pick(logits, torch.from_numpy(uniforms)[:, None], temperature, top_p)
        return picked[0], picked

    def read(self, picked: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        tokens, log_p = picked
        return tokens.numpy(), log_p.numpy()
