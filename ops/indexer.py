"""The lightning indexer's choice: which compressed entries each query of a CSA layer attends to.

Shapes: T tokens over B sequences, H index heads, d index width, N entries of a sequence, P cache rows per block, k = topk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops import bounds, paged
from ops.cache import unpack_index_rows
from ops.choice import topk_complaint
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes

_EXACT = 2**24  # integers below are exact in fp32, whatever the order of a sum


def visible_entries(cu_seqlens: Tensor, start_pos: Tensor, ratio: int) -> list[int]:
    """Per token the number of entries it may use: (position + 1) // ratio, counting the entry it completes itself."""
    return [(p + 1) // ratio for _, _, p in paged.tokens(cu_seqlens, start_pos)]


def index_scores_reference(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scores [T, N] in `compute` (-inf where not visible) and the sums of absolute values [T, N] that bound their error.

    N is the largest number of entries any token sees. The second tensor is the allowance of an fp32 evaluation: the heads' inner
    products are sums of d products, weighted and summed over H heads.
    """
    tokens, heads, d = q_THd.shape
    seen = visible_entries(cu_seqlens, start_pos, ratio)
    score_TN = torch.full((tokens, max(seen, default=0)), float("-inf"), dtype=compute, device=q_THd.device)
    error_TN = torch.zeros_like(score_TN)
    for b, t, _ in paged.tokens(cu_seqlens, start_pos):
        slots = paged.row_slots(block_table[b], torch.arange(seen[t]), key_cache.shape[1])
        keys_Nd = unpack_index_rows(key_cache, slots, dtype=compute, channels=d)
        q_Hd, w_H = q_THd[t].to(compute), w_TH[t].to(compute)
        relu_HN = (q_Hd @ keys_Nd.T).clamp_min(0)
        dots_HN = bounds.accumulate(d, q_Hd.abs() @ keys_Nd.abs().T)
        score_TN[t, : seen[t]] = w_H @ relu_HN
        error_TN[t, : seen[t]] = w_H.abs() @ dots_HN + bounds.accumulate(heads, w_H.abs() @ (relu_HN + dots_HN))
    return score_TN, error_TN


def _index_topk(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    topk: int,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """The min(k, visible) entries with the largest score[t, i] = sum over h of w[t, h] * max(0, <q[t, h], K_i>), fp32.

    q [T, H, d] float; w fp32 [T, H], carrying every scale; key_cache [blocks, P, d] in q's type, or uint8 packed FP8
    [blocks, P, d + 4] or FP4 [blocks, P, d/2 + d/32]; block_table int32 [B, blocks]; cu_seqlens int32 [B+1]; start_pos int32 [B].
    Entry i is visible to position p when i < (p + 1) // ratio. Returns int32 [T, k] in any order, -1 behind the last one; equal
    scores go to the lowest index. The keys of this call must be stored before. ValueError for contradicting shapes or tables.
    Source: specification section 7.
    """
    score_TN, _ = index_scores_reference(q_THd, w_TH, key_cache, block_table, cu_seqlens, start_pos, ratio=ratio, compute=compute)
    index = torch.full((q_THd.shape[0], topk), -1, dtype=torch.int32, device=q_THd.device)
    for t, seen in enumerate(visible_entries(cu_seqlens, start_pos, ratio)):
        best = score_TN[t, :seen].sort(descending=True, stable=True).indices[:topk]
        index[t, : best.shape[0]] = best.sort().values.to(torch.int32)
    return index


def _needed(cu_seqlens: Tensor, start_pos: Tensor, ratio: int) -> list[tuple[int, int]]:
    counts = cu_seqlens.diff().tolist()
    return [(0, (s + n) // ratio if n else 0) for s, n in zip(start_pos.tolist(), counts, strict=True)]


def _meta(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    topk: int,
) -> Tensor:
    op = "index_topk"
    if q_THd.dim() != 3 or not q_THd.is_floating_point():
        raise ValueError(f"{op}: q is {q_THd.dtype} {tuple(q_THd.shape)}, expected [T, H, d] of a floating type")
    if w_TH.dtype != torch.float32 or w_TH.shape != q_THd.shape[:2]:
        raise ValueError(f"{op}: w is {w_TH.dtype} {tuple(w_TH.shape)}, expected torch.float32 {tuple(q_THd.shape[:2])}")
    if ratio < 1 or topk < 1:
        raise ValueError(f"{op}: found ratio {ratio}, topk {topk}; expected both to be positive")
    paged.check_batch(op, q_THd.shape[0], cu_seqlens, start_pos)
    paged.check_rows(op, "key", key_cache, block_table, _needed(cu_seqlens, start_pos, ratio))
    d, width = q_THd.shape[2], key_cache.shape[2]
    if key_cache.dtype == torch.uint8:
        if not paged.is_packed_index(width, d):
            raise ValueError(f"{op}: packed keys are {width} bytes, expected {d + 4} (FP8) or {d // 2 + d // 32} (FP4) for d={d}")
    elif key_cache.dtype != q_THd.dtype or width != d:
        raise ValueError(
            f"{op}: key_cache is {key_cache.dtype} with {width} channels, expected {q_THd.dtype} (that of q) with {d}, "
            "or torch.uint8"
        )
    return torch.empty((q_THd.shape[0], topk), dtype=torch.int32, device="meta")


def _sample(
    dtype: torch.dtype,
    g: torch.Generator,
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    d: int = 32,
    ratio: int = 4,
    topk: int = 6,
    block_rows: int = 4,
    layout: str = "plain",
    ordered: bool = False,
    values: str = "normal",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """lengths: per sequence (tokens cached before, tokens of the call)."""

    def draw(*shape: int) -> Tensor:
        if values == "integer":
            return torch.randint(-1, 2, shape, generator=g).float()
        return torch.zeros(shape) if values == "zero" else torch.randn(shape, generator=g)

    tokens = sum(n for _, n in lengths)
    keys = [draw((s + n) // ratio, d).to(dtype) for s, n in lengths]
    if values == "zero":  # every score is 0, whatever the keys
        keys = [torch.randn(k.shape, generator=g).to(dtype) for k in keys]
    cache, table = paged.paged(keys, block_rows, g, layout=layout, ordered=ordered)
    cu = torch.tensor([0, *(n for _, n in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    start = torch.tensor([s for s, _ in lengths], dtype=torch.int32)
    w = draw(tokens, heads) if values != "zero" else torch.randn(tokens, heads, generator=g)
    return (draw(tokens, heads, d).to(dtype), w, cache, table, cu, start), {"ratio": ratio, "topk": topk}


def _samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    cases: list[tuple[str, list[tuple[int, int]], dict[str, Any]]] = [
        ("zero", [(0, 0)], {}),
        ("one", [(0, 1)], {}),
        ("odd", [(0, 37)], {"heads": 3}),
        ("completes-an-entry", [(30, 1), (31, 1), (32, 1)], {"topk": 3}),
        ("around-topk", [(22, 12)], {}),
        ("ragged", [(0, 3), (9, 0), (61, 1), (17, 20), (0, 0)], {}),
        ("verify", [(100, 3)], {"ordered": True, "block_rows": 16}),
        ("decode", [(403, 1)], {"topk": 16, "ordered": True, "block_rows": 16}),
        ("chunk", [(150, 45)], {"topk": 16, "ordered": True, "block_rows": 8}),
        ("crowded", [(4373, 24)], {"topk": 64, "ordered": True, "block_rows": 64}),
        ("coarse-ratio", [(250, 11)], {"ratio": 7, "topk": 5}),
        ("flash", [(60, 2)], {"heads": 64, "d": 128, "topk": 8}),
        ("ties", [(150, 9), (90, 1)], {"heads": 2, "d": 4, "values": "integer"}),
        ("ties-equal", [(90, 10), (63, 1)], {"values": "zero"}),
        ("fp8-keys", [(70, 12), (44, 1)], {"layout": "index8"}),
        ("fp4-keys", [(70, 12), (44, 1)], {"layout": "index4", "d": 128}),
        ("ties-fp4", [(70, 12)], {"layout": "index4", "values": "integer"}),
    ]
    for name, lengths, options in cases:
        args, kwargs = _sample(dtype, g, lengths, **options)
        tags = (name, "ties") if name.startswith("ties") else (name,)
        yield Sample(name, args, kwargs, tags)


def _errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    args, kwargs = _sample(dtype, torch.Generator().manual_seed(0), [(20, 2), (9, 1)], heads=2, d=32)

    def change(name: str, position: int, value: Any, match: str, **options: Any) -> WrongInput:
        return WrongInput(name, (*args[:position], value, *args[position + 1 :]), {**kwargs, **options}, match)

    yield change("q-shape", 0, args[0][0], r"q is .* \(2, 32\), expected \[T, H, d\]")
    yield change("w-shape", 1, args[1][:, :1], r"w is torch.float32 \(3, 1\), expected torch.float32 \(3, 2\)")
    yield change("w-type", 1, args[1].double(), r"w is torch.float64")
    yield change("key-width", 2, args[2][..., :16], r"with 16 channels, expected .* with 32")
    yield change("key-type", 2, args[2].to(torch.float16), r"key_cache is torch.float16")
    wrong = torch.zeros(9, 4, 40, dtype=torch.uint8)
    yield change("packed-width", 2, wrong, r"packed keys are 40 bytes, expected 36 \(FP8\) or 17 \(FP4\)")
    yield change("table-type", 3, args[3].long(), r"key table is torch.int64")
    yield change("table-short", 3, args[3][:, :1], r"key table has 1 blocks per sequence, sequence 0 needs 2 for row 4")
    yield change("not-stored", 3, torch.zeros_like(args[3]), r"names blocks 0\.\.0 for rows 0\.\.4, expected 1\.\.")
    yield change("cu-end", 4, args[4] + torch.tensor([0, 0, 1], dtype=torch.int32), r"rising from 0 to 3")
    yield change("start-shape", 5, args[5][:1], r"start_pos is torch.int32 \(1,\), expected torch.int32 \(2,\)")
    yield change("start-negative", 5, args[5] - 21, r"start_pos has -12, expected positions from 0")
    yield change("topk", 5, args[5], r"ratio 4, topk 0; expected both to be positive", topk=0)


def _is_exact(q_THd: Tensor, w_TH: Tensor, score_TN: Tensor, error_TN: Tensor) -> bool:
    """Whether fp32 gets these scores exactly in any order: all products are 0, or integers whose sums stay below 24 bits."""
    if not error_TN.any():
        return True
    whole = all(torch.equal(x.double(), x.double().round()) for x in (q_THd, w_TH))
    seen = score_TN[torch.isfinite(score_TN)]
    largest = float(error_TN.max()) / (bounds.SPREAD * bounds.roundoff(torch.float32)) if error_TN.numel() else 0.0
    return whole and torch.equal(seen, seen.round()) and largest < _EXACT


def _bound(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    topk: int,
    golden: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
) -> tuple[Callable[[Tensor], str | None]]:
    score_TN, error_TN = index_scores_reference(
        q_THd, w_TH, key_cache, block_table, cu_seqlens, start_pos, ratio=ratio, compute=torch.float64
    )
    seen = visible_entries(cu_seqlens, start_pos, ratio)
    exact = _is_exact(q_THd, w_TH, score_TN, error_TN)
    return (lambda index_Tk: topk_complaint(index_Tk.cpu(), score_TN.cpu(), error_TN.cpu(), seen, exact),)


def _cost(
    q_THd: Tensor,
    w_TH: Tensor,
    key_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    topk: int,
) -> Cost:
    tokens, heads, d = q_THd.shape
    spans = paged.spans(cu_seqlens, start_pos)
    pairs = sum(paged.visible_pairs(first, end, ratio) for first, end in spans)
    keys = sum(end // ratio for _, end in spans) * key_cache.shape[2] * key_cache.element_size()
    rate = "bf16" if key_cache.dtype != torch.uint8 else "fp8" if key_cache.shape[2] == d + 4 else "fp4"
    return Cost(2 * heads * d * pairs, 3 * heads * pairs, tensors_bytes(q_THd, w_TH) + keys, tokens * topk * 4, rate)


index_topk = Contract(
    name="index_topk",
    reference=_index_topk,
    meta=_meta,
    samples=_samples,
    errors=_errors,
    bound=_bound,
    cost=_cost,
    choices=(0,),
)
