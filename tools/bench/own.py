"""This project's model under the same measurements, with a timer around every bound op and the bytes a decode step must touch."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import v4
from ops.contract import CONTRACTS
from v4.cache import Cache
from v4.cache import Sequence as Stored

KINDS = {0: "swa", 4: "csa", 128: "hca"}
ROOM = 512
"""Tokens that may be decoded after a prefill or a synthetic context."""


def label(op: str, kwargs: dict[str, Any]) -> str:
    """Op name, with the layer kind for ops that several kinds share."""
    return f"{op}[{KINDS[kwargs['ratio']]}]" if kwargs.get("ratio") in KINDS else op


class Own:
    """One loaded model, its cache and one sequence in it."""

    name = "v4"

    def __init__(self, directory: Path) -> None:
        self.model = v4.load(directory, backend="cpu", dtype=torch.float32, numerics="exact")
        self.runner = self.model.runner
        self.cache: Cache | None = None
        self.sequence: Stored | None = None
        self.token = 5

    def reset(self) -> None:
        """Drop the cache."""
        self.cache = self.sequence = None

    def _open(self, tokens: int, chunk: int) -> tuple[Cache, Stored]:
        self.reset()
        room = min(tokens + ROOM, self.model.config.max_position_embeddings)
        cache = self.runner.session(max_tokens=room, max_chunk=chunk).cache
        self.cache, self.sequence = cache, cache.new_sequence()
        return cache, self.sequence

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        if self.cache is None or self.sequence is None:
            raise ValueError("no cache: call prefill or synthetic first")
        return self.runner.forward(self.cache, [self.sequence], [ids])[-1:]

    def _next(self, streams_1nD: torch.Tensor) -> None:
        self.token = int(self.model.binding.ops.argmax(self.runner.logits(streams_1nD)))

    def prefill(self, ids: Sequence[int], chunk: int | None) -> float:
        """Seconds for a prompt in calls of `chunk` tokens (None: one call); logits of the last token only. Keeps the cache."""
        size = chunk or len(ids)
        self._open(len(ids), size)
        began = time.perf_counter()
        for start in range(0, len(ids), size):
            last = self._forward(ids[start : start + size])
        self._next(last)
        return time.perf_counter() - began

    def step(self) -> float:
        """Seconds for one greedy token on the current cache."""
        began = time.perf_counter()
        self._next(self._forward([self.token]))
        return time.perf_counter() - began

    def synthetic(self, tokens: int, seed: int = 0) -> None:
        """A cache that looks as if `tokens` tokens were stored, with random values."""
        cache, sequence = self._open(tokens, 8)
        cache.fill_synthetic(sequence, tokens, seed)

    @contextmanager
    def watched(self, watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Every bound op replaced by `watch(name, function)` while the context lasts."""
        ops = self.model.binding.ops
        originals = dict(vars(ops))
        for name, fn in originals.items():
            setattr(ops, name, watch(name, fn))
        try:
            yield
        finally:
            for name, fn in originals.items():
                setattr(ops, name, fn)

    def op_seconds(self, rounds: int) -> dict[str, float]:
        """Seconds per step of each op, and of the whole step under "step": the median over rounds of the mean over 4 tokens.

        Four tokens see one CSA entry completed, so that the mean holds its share; the median drops rounds that were disturbed.
        """
        seen: dict[str, list[float]] = defaultdict(lambda: [0.0] * rounds)
        number = 0

        def timed(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                result = fn(*args, **kwargs)
                seen[label(name, kwargs)][number] += time.perf_counter() - began
                return result

            return call

        with self.watched(timed):
            for number in range(rounds):
                for _ in range(4):
                    seen["step"][number] += self.step()
        return {name: statistics.median(values) / 4 for name, values in seen.items()}

    def op_bytes(self) -> int:
        """Bytes of one decode step by the contracts' own cost functions, summed over all op calls of the step."""
        total = 0

        def costed(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal total
                total += CONTRACTS[name].cost(*args, **kwargs).bytes
                return fn(*args, **kwargs)

            return call

        with self.watched(costed):
            self.step()
        return total

    def floor_bytes(self, tokens: int) -> dict[str, int]:
        """Bytes that one decode step at this context can not avoid reading: active weights, head, and live cache rows."""
        c = self.model.config
        size = 4
        weights = 0
        for name, p in self.runner.model.named_parameters():
            if name.startswith("mtp.") or name == "embed.weight" or name.endswith("tid2eid"):
                continue
            share = c.num_experts_per_tok / c.n_routed_experts if ".experts." in name else 1.0
            weights += int(p.numel() * p.element_size() * share)
        rows = 0
        for layer in range(c.num_hidden_layers):
            ratio = c.ratio(layer)
            rows += min(tokens, c.sliding_window) * c.head_dim
            if ratio == 4:
                rows += min(tokens // 4, c.index_topk) * c.head_dim + tokens // 4 * c.index_head_dim
            elif ratio:
                rows += tokens // ratio * c.head_dim
        return {"weights": weights, "cache": rows * size, "total": weights + rows * size}
