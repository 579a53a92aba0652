"""Decoding on MLX: mlx-lm's models and key/value caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_posttrain.engines import decoding
from mlx_posttrain.engines.mlx.device import on_gpu
from mlx_posttrain.errors import UserError


class _Cache(BatchKVCache):
    """mlx-lm's cache of keys and values of a batch, whose rows are dropped without waiting for the device."""

    def keep(self, rows: mx.array, spare: int) -> None:
        """Keep ``rows``, of which all have ``spare`` positions of padding or more."""
        self.keys, self.values = (a[rows][..., spare:, :] for a in (self.keys, self.values))
        self.offset, self.left_padding = self.offset[rows], self.left_padding[rows] - spare
        self._idx -= spare


class MLXDecoder:
    """An mlx-lm model as a :class:`~mlx_posttrain.engines.decoding.Decoder`.

    head: gives the float32 logits of hidden states; None where the model's logits are more than its output.

    Prompts are padded on the left where every layer has a KV cache. Other caches hold a single row: prefill
    raises UserError for several.
    """

    def __init__(self, net: nn.Module, head: Callable[[mx.array], mx.array] | None):
        # To drop rows a GPU copies the cache between two passes; a CPU's passes take as long as their rows.
        self.ahead, self.leave_at = (True, 0.5) if on_gpu() else (False, 0.0)
        self.net = net
        self.head = head

    def prefill(self, prompts: Sequence[Sequence[int]], samples: int) -> mx.array:
        longest = max(map(len, prompts))
        self._padding = np.array([longest - len(p) for p in prompts])
        caches = make_prompt_cache(self.net)
        # A rotating cache forgets what its layer's window masks anyway.
        if all(type(c) in (KVCache, RotatingKVCache) for c in caches):
            caches = [_Cache(self._padding.tolist()) for _ in caches]
        elif len(prompts) > 1 or samples > 1:
            raise UserError(
                "this architecture's cache cannot hold several rows: generate one prompt at a time"
            )
        self.caches = caches
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, self._padding[row] :] = prompt
        logits = self._forward(mx.array(tokens))
        return self.keep(np.repeat(np.arange(len(prompts)), samples), logits) if samples > 1 else logits

    def _forward(self, tokens: mx.array) -> mx.array:
        if self.head is None:
            logits = self.net(tokens, cache=self.caches)[:, -1].astype(mx.float32)
        else:  # at the last position only
            logits = self.head(self.net.model(tokens, cache=self.caches)[:, -1])
        mx.async_eval(logits, [c.state for c in self.caches])
        return logits

    def advance(self, tokens: mx.array) -> mx.array:
        return self._forward(tokens[:, None])

    def keep(self, rows: np.ndarray, array: mx.array) -> mx.array:
        index, padding = mx.array(rows), self._padding[rows]
        spare = int(padding.min())
        for c in self.caches:
            c.keep(index, spare)
        self._padding = padding - spare
        return array[index]

    def pick(
        self, logits: mx.array, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[mx.array, mx.array]:
        tokens, log_p = decoding.pick(logits, mx.array(uniforms)[:, None], temperature, top_p)
        # One array to read, and handed over by itself: what is handed over together is ready together.
        both = mx.stack([tokens.view(mx.int32), log_p.view(mx.int32)])
        mx.async_eval(tokens, both)
        return tokens, both

    def read(self, picked: mx.array) -> tuple[np.ndarray, np.ndarray]:
        tokens, log_p = np.array(picked)
        return tokens, log_p.view(np.float32)
