"""Legal and illegal inputs of the core attention: every layer kind, ragged batches, window edges, packed caches.

Shapes as in ops/attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops import paged
from ops.contract import Sample, WrongInput

Call = tuple[tuple[Any, ...], dict[str, Any]]


def make(
    dtype: torch.dtype,
    g: torch.Generator,
    lengths: list[tuple[int, int]],
    *,
    heads: int = 3,
    channels: int = 20,
    window: int = 8,
    ratio: int = 0,
    topk: int = 0,
    block_rows: int = 5,
    packed: bool = False,
    rope_dim: int = 64,
    ordered: bool = False,
    sink: float = 1.0,
    q_scale: float = 1.0,
    sparse_index: bool = False,
) -> Call:
    """One call. lengths: per sequence (tokens cached before, tokens of the call); topk 0 with a ratio: all entries (HCA).

    cmp_index holds random visible entries, as many as there are up to topk; with `sparse_index` -1 is scattered between them.
    """
    tokens = sum(n for _, n in lengths)
    layout = {"layout": "fp8" if packed else "plain", "rope_dim": rope_dim, "ordered": ordered}
    q_THC = (torch.randn(tokens, heads, channels, generator=g) * q_scale).to(dtype)
    rows = [torch.randn(s + n, channels, generator=g).to(dtype) for s, n in lengths]
    cache, table = paged.paged(rows, block_rows, g, **layout)  # type: ignore[arg-type]
    cu = torch.tensor([0, *(n for _, n in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    start = torch.tensor([s for s, _ in lengths], dtype=torch.int32)
    kwargs: dict[str, Any] = {"scale": channels**-0.5, "window": window}
    if ratio:
        entries = [torch.randn((s + n) // ratio, channels, generator=g).to(dtype) for s, n in lengths]
        kwargs["cmp_cache"], kwargs["cmp_table"] = paged.paged(entries, block_rows + 1, g, **layout)  # type: ignore[arg-type]
        kwargs["ratio"] = ratio
    if topk:
        index = torch.full((tokens, topk), -1, dtype=torch.int32)
        for _, t, p in paged.tokens(cu, start):
            chosen = torch.randperm((p + 1) // ratio, generator=g)[:topk].int()
            index[t, : chosen.shape[0]] = chosen
            if sparse_index:
                index[t, torch.rand(topk, generator=g) < 0.4] = -1
        kwargs["cmp_index"] = index
    return (q_THC, cache, table, sink * torch.randn(heads, generator=g), cu, start), kwargs


def samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    """The legal inputs of the contract."""
    g = torch.Generator().manual_seed(seed)
    edges = [(s, 1) for s in (0, 6, 7, 8, 9, 40)]
    ragged = [(0, 3), (9, 0), (61, 1), (17, 20), (0, 0), (5, 6)]
    real = {"heads": 64, "channels": 512, "window": 128, "block_rows": 32}
    cases: list[tuple[str, list[tuple[int, int]], dict[str, Any]]] = [
        ("zero", [(0, 0)], {}),
        ("zero-csa", [(9, 0), (0, 0)], {"ratio": 4, "topk": 3}),
        ("one", [(0, 1)], {}),
        ("odd", [(0, 37)], {}),
        ("window-edges", edges, {}),
        ("window-of-one", [(0, 3), (11, 2)], {"window": 1}),
        ("ordered-blocks", [(0, 70), (33, 3)], {"ordered": True}),
        ("ragged-swa", ragged, {}),
        ("ragged-csa", ragged, {"ratio": 4, "topk": 4}),
        ("ragged-hca", ragged, {"ratio": 8}),
        ("csa-edges", [(p, 1) for p in (2, 3, 6, 7, 8)], {"ratio": 4, "topk": 2}),
        ("csa-from-zero", [(0, 50)], {"ratio": 4, "topk": 6}),
        ("csa-sentinels", [(0, 21), (30, 9), (47, 1)], {"ratio": 4, "topk": 6, "sparse_index": True}),
        ("csa-long", [(1100, 9), (900, 1)], {"ratio": 4, "topk": 6, "channels": 16}),
        ("csa-long-sentinels", [(1100, 9), (900, 1)], {"ratio": 4, "topk": 6, "channels": 16, "sparse_index": True}),
        ("csa-decode-ordered", [(403, 1)], {"ratio": 4, "topk": 128, "ordered": True}),
        ("hca-128", [(120, 20), (127, 1), (126, 1)], {"ratio": 128, "window": 16}),
        ("hca-verify", [(250, 4)], {"ratio": 16, "ordered": True}),
        ("large-sinks", [(12, 5)], {"sink": 30.0, "ratio": 4, "topk": 3}),
        ("sharp", [(12, 5)], {"q_scale": 30.0, "ratio": 8}),
        ("equal-scores", [(12, 5)], {"q_scale": 0.0, "ratio": 4, "topk": 3}),
        ("flash-csa", [(300, 2)], {**real, "ratio": 4, "topk": 64}),
        ("packed-swa", [(0, 9), (21, 1)], {"packed": True, "channels": 80, "rope_dim": 16}),
        ("packed-csa", [(700, 3), (30, 1)], {"packed": True, "channels": 80, "rope_dim": 16, "ratio": 4, "topk": 5}),
        ("packed-hca", [(30, 8)], {"packed": True, "channels": 80, "rope_dim": 16, "ratio": 8}),
        ("packed-flash", [(130, 2)], {**real, "packed": True, "ratio": 4, "topk": 16}),
    ]
    for name, lengths, options in cases:
        args, kwargs = make(dtype, g, lengths, **options)
        yield Sample(name, args, kwargs, (name,))


def errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    """The illegal inputs of the contract."""
    args, kwargs = make(dtype, torch.Generator().manual_seed(0), [(20, 2), (9, 1)], heads=2, channels=16, ratio=4, topk=3)

    def at(name: str, position: int, value: Any, match: str) -> WrongInput:
        return WrongInput(name, (*args[:position], value, *args[position + 1 :]), kwargs, match)

    def option(name: str, match: str, **changes: Any) -> WrongInput:
        return WrongInput(name, args, {**kwargs, **changes}, match)

    def half(cache: Tensor) -> Tensor:
        return cache.to(torch.float16)

    yield at("q-shape", 0, args[0][0], r"q is .* \(2, 16\), expected \[T, H, C\]")
    yield at("window-width", 1, args[1][..., :8], r"window cache is .* with 8 channels, expected .* with 16")
    yield at("window-type", 1, half(args[1]), r"window cache is torch.float16")
    yield at("packed-width", 1, torch.zeros(9, 5, 99, dtype=torch.uint8), r"packed rows are 99 bytes, but no split of 16")
    yield at("table-type", 2, args[2].long(), r"window table is torch.int64")
    yield at("table-short", 2, args[2][:, :1], r"window table has 1 blocks per sequence, sequence 0 needs 5 for row 21")
    yield at("not-stored", 2, args[2] * 0, r"window table of sequence 0 names blocks 0\.\.0 for rows 13\.\.21, expected 1\.\.")
    yield at("sink-shape", 3, args[3][:1], r"sink is torch.float32 \(1,\), expected torch.float32 \(2,\)")
    yield at("sink-type", 3, args[3].double(), r"sink is torch.float64")
    yield at("cu-type", 4, args[4].long(), r"cu_seqlens is torch.int64")
    yield at("cu-falls", 4, torch.tensor([0, 4, 3], dtype=torch.int32), r"rising from 0 to 3")
    yield at("start-shape", 5, args[5][:1], r"start_pos is torch.int32 \(1,\), expected torch.int32 \(2,\)")
    yield option("window-zero", r"window is 0, expected at least 1", window=0)
    yield option("no-cmp-table", r"go together", cmp_table=None)
    yield option("index-without-cache", r"go together", cmp_cache=None, cmp_table=None)
    yield option("no-ratio", r"ratio is 0, expected the tokens per compressed entry", ratio=0)
    yield option("cmp-type", r"cmp cache is torch.float16", cmp_cache=half(kwargs["cmp_cache"]))
    table, index = kwargs["cmp_table"], kwargs["cmp_index"]
    yield option("cmp-not-stored", r"cmp table of sequence 0 names blocks 0\.\.0 for rows 0\.\.4", cmp_table=table * 0)
    yield option("index-type", r"cmp_index is torch.int64", cmp_index=index.long())
    yield option("index-rows", r"cmp_index is torch.int32 \(2, 3\), expected torch.int32 \(3, k\)", cmp_index=index[:2])
