"""transformers' DeepseekV4 under the same measurements: prefill in chunks, single steps, and caches filled at will.

Cache shapes follow transformers' own layer classes: window [1, 1, W-1, C], entries [1, N/m, C], index keys [1, N/m, d].
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tests.oracle import hf_model


class Peer:
    """One transformers model and its current cache. `experts`: transformers' name of the expert code (None: its default)."""

    name = "transformers"

    def __init__(self, directory: Path, experts: str | None = None) -> None:
        self.model = hf_model(directory, experts=experts)
        self.config = self.model.config
        self.cache: DynamicCache | None = None
        self.token = 5

    def reset(self) -> None:
        """Drop the cache."""
        self.cache = None

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], chunk: int | None) -> float:
        """Seconds for a prompt in calls of `chunk` tokens (None: one call); logits of the last token only. Keeps the cache."""
        ids_1T = torch.tensor(ids)[None]
        self.cache = DynamicCache(config=self.config)
        size = chunk or len(ids)
        began = time.perf_counter()
        for start in range(0, len(ids), size):
            part = ids_1T[:, start : start + size]
            out = self.model(input_ids=part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = int(out.logits[0, -1].argmax())
        return time.perf_counter() - began

    @torch.inference_mode()
    def step(self) -> float:
        """Seconds for one greedy token on the current cache."""
        began = time.perf_counter()
        out = self.model(input_ids=torch.tensor([[self.token]]), past_key_values=self.cache, use_cache=True)
        self.token = int(out.logits[0, -1].argmax())
        return time.perf_counter() - began

    def synthetic(self, tokens: int, seed: int = 0) -> None:
        """A cache that looks as if `tokens` tokens were stored, with random values."""
        c = self.config
        g = torch.Generator().manual_seed(seed)
        cache = DynamicCache(config=c)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        for layer in cache.layers:
            window = random(1, 1, min(tokens, c.sliding_window - 1), c.head_dim)
            layer.lazy_initialization(window, window)
            layer.keys = layer.values = window
            layer.cumulative_length = tokens
            rate = getattr(layer, "compress_rate", 0)
            if not rate:
                continue
            for name in layer.compressed_kv:
                width = c.head_dim if name == "compressor" else c.index_head_dim
                projected = width * (2 if rate == 4 else 1)
                layer.compressed_kv[name] = random(1, tokens // rate, width)
                layer.entry_count[name] = tokens // rate
                layer.buffer_kv[name] = random(1, tokens % rate, projected)
                layer.buffer_gate[name] = random(1, tokens % rate, projected)
                if rate == 4:
                    layer.overlap_kv[name], layer.overlap_gate[name] = random(1, rate, width), random(1, rate, width)
        self.cache = cache
