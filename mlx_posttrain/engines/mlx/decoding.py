"""Decoding on MLX: mlx-lm's models and key/value caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_posttrain.engines import decoding
from mlx_posttrain.errors import UserError


class MLXDecoder:
    """An mlx-lm model as a :class:`~mlx_posttrain.engines.decoding.Decoder`.

    head: gives the logits of hidden states; None where the model's logits are more than its head's output.

    Prompts are padded on the left where every layer has a KV cache. Other caches hold a single row: prefill
    raises UserError for several.
    """

    def __init__(self, net: nn.Module, head: Callable[[mx.array], mx.array] | None):
        self.net = net
        self.head = head

    def prefill(self, prompts: Sequence[Sequence[int]], samples: int) -> mx.array:
        from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache

        longest = max(map(len, prompts))
        padding = [longest - len(p) for p in prompts]
        caches = make_prompt_cache(self.net)
        # A rotating cache forgets what its layer's window masks anyway.
        if all(type(c) in (KVCache, RotatingKVCache) for c in caches):
            caches = [BatchKVCache(padding) for _ in caches]
        elif len(prompts) > 1 or samples > 1:
            raise UserError(
                "this architecture's cache cannot hold several rows: generate one prompt at a time"
            )
        self.caches = caches
        tokens = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, padding[row] :] = prompt
        logits = self._forward(mx.array(tokens))
        if samples > 1:
            rows = np.repeat(np.arange(len(prompts)), samples)
            self.keep(rows)
            logits = logits[mx.array(rows)]
        return logits

    def _forward(self, tokens: mx.array) -> mx.array:
        if self.head is None:
            logits = self.net(tokens, cache=self.caches)[:, -1].astype(mx.float32)
        else:  # at the last position only
            logits = self.head(self.net.model(tokens, cache=self.caches)[:, -1]).astype(mx.float32)
        mx.eval(logits, [c.state for c in self.caches])
        return logits

    def advance(self, tokens: np.ndarray) -> mx.array:
        return self._forward(mx.array(tokens.astype(np.int32))[:, None])

    def keep(self, rows: np.ndarray) -> None:
        index = mx.array(rows)
        for c in self.caches:
            c.filter(index)

    def pick(
        self, logits: mx.array, uniforms: np.ndarray, temperature: float, top_p: float
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens, log_p = decoding.pick(logits, mx.array(uniforms)[:, None], temperature, top_p)
        return np.array(tokens), np.array(log_p)
