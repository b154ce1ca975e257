"""Calls at the widths of V4-Flash, on meta tensors, for which kernels are compiled ahead of time.

Shapes as in the contracts: T tokens, B sequences, H heads, C head width, D hidden, n streams, P rows per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_FP32, _INT, _BYTES = torch.float32, torch.int32, torch.uint8
_P = 64


@dataclass(frozen=True)
class MetaCall:
    """A call of an op whose tensors have no data."""

    op: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def _t(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _rows(tokens: int) -> Iterator[MetaCall]:
    name, eps = f"T={tokens}", {"eps": 1e-6}
    x, weight, streams = _t(tokens, 4096), _t(4096), _t(tokens, 4, 4096)
    fn, scale, base = _t(24, 16384, dtype=_FP32), _t(3, dtype=_FP32), _t(24, dtype=_FP32)
    hc = {"norm_eps": 1e-6, "hc_eps": 1e-6, "iters": 20}
    angles = (_t(tokens, 32, dtype=_FP32), _t(tokens, 32, dtype=_FP32))
    yield MetaCall("rms_norm", name, (x, weight), eps)
    yield MetaCall("add_rms_norm", name, (x, x, weight), eps)
    yield MetaCall("q_norm_rope", name, (_t(tokens, 64, 512), *angles), eps)
    yield MetaCall("rope", f"{name} inverse", (_t(tokens, 64, 512), *angles), {"inverse": True})
    yield MetaCall("cache_insert", name, (_t(99, _P, 512), _t(tokens, 512), _t(tokens, dtype=torch.int64)))
    slots = _t(tokens, dtype=torch.int64)
    yield MetaCall("cache_insert_fp8", name, (_t(99, _P, 584, dtype=_BYTES), _t(tokens, 512), slots))
    yield MetaCall("index_insert_fp8", name, (_t(99, _P, 132, dtype=_BYTES), _t(tokens, 128), slots))
    yield MetaCall("index_insert_fp4", name, (_t(99, _P, 68, dtype=_BYTES), _t(tokens, 128), slots))
    yield MetaCall("hc_pre", name, (streams, fn, scale, base), hc)
    mixes = (_t(tokens, 4, dtype=_FP32), _t(tokens, 4, 4, dtype=_FP32))
    yield MetaCall("hc_post", name, (x, streams, *mixes))


def _attention(name: str, batch: int, new: int, kind: int, packed: bool = False, heads: int = 64, chosen: int = 512) -> MetaCall:
    """kind 0: window only, 1: all entries, 2: chosen entries."""
    width, dtype = (584, _BYTES) if packed else (512, torch.bfloat16)
    tokens = batch * new
    kwargs: dict[str, Any] = {"scale": 512**-0.5, "window": 128}
    if kind:
        kwargs |= {"cmp_cache": _t(999, _P, width, dtype=dtype), "cmp_table": _t(batch, 512, dtype=_INT), "ratio": 4}
    if kind == 2:
        kwargs["cmp_index"] = _t(tokens, chosen, dtype=_INT)
    args = (_t(tokens, heads, 512), _t(999, _P, width, dtype=dtype), _t(batch, 64, dtype=_INT), _t(heads, dtype=_FP32))
    return MetaCall("sparse_attention", name, (*args, _t(batch + 1, dtype=_INT), _t(batch, dtype=_INT)), kwargs)


def _index(name: str, batch: int, new: int, packed: bool, blocks: int = 512, topk: int = 512) -> MetaCall:
    width, dtype = (132, _BYTES) if packed else (128, torch.bfloat16)
    tokens = batch * new
    args = (_t(tokens, 64, 128), _t(tokens, 64, dtype=_FP32), _t(999, _P, width, dtype=dtype), _t(batch, blocks, dtype=_INT))
    return MetaCall("index_topk", name, (*args, _t(batch + 1, dtype=_INT), _t(batch, dtype=_INT)), {"ratio": 4, "topk": topk})


def _experts(tokens: int, fp4: bool) -> MetaCall:
    rows = 6 * tokens
    given = (_t(rows, 4096), _t(rows, dtype=_FP32), _t(256, dtype=torch.int64))
    if not fp4:
        return MetaCall("grouped_experts", f"T={tokens}", (*given, _t(256, 4096, 4096), _t(256, 4096, 2048)), {"limit": 10.0})
    scale = torch.float8_e8m0fnu
    w13 = (_t(256, 4096, 2048, dtype=_BYTES), _t(256, 4096, 128, dtype=scale))
    w2 = (_t(256, 4096, 1024, dtype=_BYTES), _t(256, 4096, 64, dtype=scale))
    return MetaCall("grouped_experts_fp4", f"T={tokens}", (*given, *w13, *w2), {"limit": 10.0})


def _compress(name: str, batch: int, new: int, ratio: int, channels: int) -> MetaCall:
    w, tokens = (2 if ratio == 4 else 1) * channels, batch * new
    entries = max(tokens // ratio, 1)
    weights = (_t(w, 4096), _t(w, 4096), _t(ratio, w, dtype=_FP32), _t(channels))
    angles = (_t(entries, 32, dtype=_FP32), _t(entries, 32, dtype=_FP32))
    state = (_t(99, _P, 2 * w, dtype=_FP32), _t(batch, 64, dtype=_INT), _t(batch + 1, dtype=_INT), _t(batch, dtype=_INT))
    return MetaCall("compress", f"{name}, ratio {ratio} x {channels}", (_t(tokens, 4096), *weights, *angles, *state), {"ratio": ratio, "eps": 1e-6})


def calls() -> Iterator[MetaCall]:
    """Decode of one and of 128 requests, and prefill, of every op."""
    for tokens in (1, 128, 4096):
        yield from _rows(tokens)
    for name, batch, new in (("decode T=1", 1, 1), ("decode T=32", 32, 1), ("decode T=128", 128, 1), ("prefill T=4096", 1, 4096)):
        for kind, what in enumerate(("window", "all entries", "chosen entries")):
            yield _attention(f"{what}, {name}", batch, new, kind)
    yield _attention("chosen entries packed, decode T=128", 128, 1, 2, packed=True)
    yield _attention("chosen entries, 128 heads, decode T=128", 128, 1, 2, heads=128, chosen=1024)
    for name, batch, new in (("decode T=1", 1, 1), ("decode T=128", 128, 1), ("prefill T=4096", 1, 4096)):
        for packed in (False, True):
            yield _index(f"{'FP8' if packed else 'bf16'} keys, {name}", batch, new, packed)
    yield _index("FP8 keys, decode T=128, 32k tokens", 128, 1, True, blocks=128)
    yield _index("FP8 keys, decode T=128, 1M tokens, 1024 chosen", 128, 1, True, blocks=4096, topk=1024)
    yield _index("FP8 keys, decode T=1, 4M tokens", 1, 1, True, blocks=16384)
    for name, batch, new in (("decode T=1", 1, 1), ("decode T=128", 128, 1), ("prefill T=4096", 1, 4096)):
        for ratio in (4, 128):
            yield _compress(name, batch, new, ratio, 512)
    for fp4 in (False, True):
        for tokens in (1, 128, 4096):
            yield _experts(tokens, fp4)
