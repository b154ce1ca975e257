"""Core attention over paged rows: a sliding window plus compressed entries (all or a chosen few), one softmax, a sink per head.

Shapes: T tokens over B sequences, H heads, C head width (a row is key and value of every head), P cache rows per block, k choices
per query, n rows of one query. SWA: window only; HCA: all completed entries; CSA: the entries in cmp_index.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops import bounds, paged
from ops.attention_samples import errors, samples
from ops.cache import unpack_fp8_rows
from ops.contract import Contract, Cost, tensors_bytes

_OP = "sparse_attention"
Task = tuple[int, Tensor, Tensor]


def read_rows(cache: Tensor, slots: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Rows [..., channels] in `dtype` at flat slots [...] of a float cache or of packed FP8 rows."""
    if cache.dtype == torch.uint8:
        rope_dim = paged.packed_rope_dim(_OP, cache.shape[2], channels)
        return unpack_fp8_rows(cache, slots, nope=channels - rope_dim, rope_dim=rope_dim, dtype=dtype)
    return cache[slots // cache.shape[1], slots % cache.shape[1]].to(dtype)


def queries(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    cmp_cache: Tensor | None,
    cmp_table: Tensor | None,
    cmp_index: Tensor | None,
    ratio: int,
    compute: torch.dtype,
) -> Iterator[Task]:
    """(t, q [H, C], rows [n, C]) of every query, in `compute`."""
    channels = q_THC.shape[2]
    for b, t, p in paged.tokens(cu_seqlens, start_pos):
        positions = torch.arange(max(p - window + 1, 0), p + 1)
        rows = read_rows(window_cache, paged.row_slots(window_table[b], positions, window_cache.shape[1]), channels, compute)
        if cmp_cache is not None and cmp_table is not None:
            entries = torch.arange((p + 1) // ratio) if cmp_index is None else cmp_index[t][cmp_index[t] >= 0].cpu()
            chosen = read_rows(cmp_cache, paged.row_slots(cmp_table[b], entries, cmp_cache.shape[1]), channels, compute)
            rows = torch.cat((chosen, rows))
        yield t, q_THC[t].to(compute), rows


def _sparse_attention(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    sink_H: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    scale: float,
    window: int,
    cmp_cache: Tensor | None = None,
    cmp_table: Tensor | None = None,
    cmp_index: Tensor | None = None,
    ratio: int = 0,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """o[h] = sum over rows of e_s * row_s / (sum of e_s + exp(sink[h])), e_s = exp(scale * <q[h], row_s>); fp32 inside.

    The rows of the query at position p are the window rows of positions max(0, p - window + 1)..p and, with cmp_cache, the
    entries cmp_index[t] (int32 [T, k], distinct, visible ones; -1 contributes nothing) or, without cmp_index, all entries
    i < (p + 1) // ratio. The sink is in the denominator only and is not scaled.

    q [T, H, C] float; caches [blocks, P, C] in q's type or uint8 packed FP8 rows (584 bytes for C = 512); tables int32
    [B, blocks] (window: row = position; cmp: row = entry); sink fp32 [H]; cu_seqlens int32 [B+1]; start_pos int32 [B]. The rows
    of this call must be stored before. Returns [T, H, C] in q's type. ValueError for contradicting shapes or tables.
    Source: specification sections 4.2, 5 and 8.
    """
    out = torch.empty(q_THC.shape, dtype=compute, device=q_THC.device)
    sink_H1 = sink_H.to(compute)[:, None]
    for t, q_HC, rows_nC in queries(
        q_THC, window_cache, window_table, cu_seqlens, start_pos, window, cmp_cache, cmp_table, cmp_index, ratio, compute
    ):
        logits_Hn = torch.cat((q_HC @ rows_nC.T * scale, sink_H1), dim=1)
        out[t] = torch.softmax(logits_Hn, dim=1)[:, :-1] @ rows_nC
    return out


def _check_cache(name: str, q_THC: Tensor, cache: Tensor) -> None:
    if cache.dtype == torch.uint8:
        paged.packed_rope_dim(_OP, cache.shape[2], q_THC.shape[2])
    elif cache.dtype != q_THC.dtype or cache.shape[2] != q_THC.shape[2]:
        raise ValueError(
            f"{_OP}: {name} cache is {cache.dtype} with {cache.shape[2]} channels, expected {q_THC.dtype} (that of q) with "
            f"{q_THC.shape[2]}, or torch.uint8"
        )


def _meta(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    sink_H: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    scale: float,
    window: int,
    cmp_cache: Tensor | None = None,
    cmp_table: Tensor | None = None,
    cmp_index: Tensor | None = None,
    ratio: int = 0,
) -> Tensor:
    if q_THC.dim() != 3 or not q_THC.is_floating_point():
        raise ValueError(f"{_OP}: q is {q_THC.dtype} {tuple(q_THC.shape)}, expected [T, H, C] of a floating type")
    tokens, heads, _ = q_THC.shape
    if sink_H.dtype != torch.float32 or sink_H.shape != (heads,):
        raise ValueError(f"{_OP}: sink is {sink_H.dtype} {tuple(sink_H.shape)}, expected torch.float32 ({heads},), one per head")
    if window < 1:
        raise ValueError(f"{_OP}: window is {window}, expected at least 1, the query itself")
    paged.check_batch(_OP, tokens, cu_seqlens, start_pos)
    counts = cu_seqlens.diff().tolist()
    places = list(zip(start_pos.tolist(), counts, strict=True))
    recent = [(max(s - window + 1, 0), s + n) if n else (0, 0) for s, n in places]
    paged.check_rows(_OP, "window", window_cache, window_table, recent)
    _check_cache("window", q_THC, window_cache)
    if (cmp_cache is None) != (cmp_table is None) or (cmp_index is not None and cmp_cache is None):
        raise ValueError(f"{_OP}: cmp_cache and cmp_table (and cmp_index) go together; pass cache and table, or none")
    if cmp_cache is not None and cmp_table is not None:
        if ratio < 1:
            raise ValueError(f"{_OP}: ratio is {ratio}, expected the tokens per compressed entry (4 or 128) with cmp_cache")
        paged.check_rows(_OP, "cmp", cmp_cache, cmp_table, [(0, (s + n) // ratio if n else 0) for s, n in places])
        _check_cache("cmp", q_THC, cmp_cache)
    if cmp_index is not None and (cmp_index.dtype != torch.int32 or cmp_index.dim() != 2 or cmp_index.shape[0] != tokens):
        raise ValueError(f"{_OP}: cmp_index is {cmp_index.dtype} {tuple(cmp_index.shape)}, expected torch.int32 ({tokens}, k)")
    return torch.empty(q_THC.shape, dtype=q_THC.dtype, device="meta")


def _bound(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    sink_H: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    scale: float,
    window: int,
    cmp_cache: Tensor | None = None,
    cmp_table: Tensor | None = None,
    cmp_index: Tensor | None = None,
    ratio: int = 0,
    golden: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
) -> tuple[Tensor]:
    u, unit = bounds.SPREAD * bounds.roundoff(torch.float32), bounds.roundoff(q_THC.dtype)
    allowed = torch.zeros(q_THC.shape, dtype=torch.float64)
    sink_H1 = sink_H.double()[:, None]
    for t, q_HC, rows_nC in queries(
        q_THC, window_cache, window_table, cu_seqlens, start_pos, window, cmp_cache, cmp_table, cmp_index, ratio, torch.float64
    ):
        logits_Hn = q_HC @ rows_nC.T * scale
        error_Hn = bounds.accumulate(q_HC.shape[1], q_HC.abs() @ rows_nC.abs().T) * scale + u * logits_Hn.abs()
        logits_Hn, error_Hn = torch.cat((logits_Hn, sink_H1), dim=1), torch.cat((error_Hn, torch.zeros_like(sink_H1)), dim=1)
        p_Hn = torch.softmax(logits_Hn, dim=1)
        # the subtraction of the stabiliser rounds by u of its result; exp and the normalisation by a few u each
        spread_Hn = logits_Hn.amax(1, keepdim=True) - logits_Hn
        relative_Hn = torch.expm1(error_Hn + u * (spread_Hn + 2))
        shift_H1 = (p_Hn * relative_Hn).sum(1, keepdim=True)
        n, p_Hn, relative_Hn = rows_nC.shape[0], p_Hn[:, :-1], relative_Hn[:, :-1]
        mass_HC = p_Hn @ rows_nC.abs()
        # weights may be stored in the type of q, before or after the normalisation, hence rounded once more
        rounded_HC = (unit if q_THC.dtype != torch.float32 else 0.0) * mass_HC
        allowed[t] = (p_Hn * relative_Hn) @ rows_nC.abs() + shift_H1 * mass_HC + bounds.accumulate(n, mass_HC) + rounded_HC
    return (allowed,)


def _cost(
    q_THC: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    sink_H: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    scale: float,
    window: int,
    cmp_cache: Tensor | None = None,
    cmp_table: Tensor | None = None,
    cmp_index: Tensor | None = None,
    ratio: int = 0,
) -> Cost:
    _, heads, channels = q_THC.shape
    spans = paged.spans(cu_seqlens, start_pos)
    pairs = sum(paged.visible_pairs(first, end, 1, window) for first, end in spans)
    row = window_cache.shape[2] * window_cache.element_size()
    read = sum(end - max(first - window + 1, 0) for first, end in spans) * row
    if cmp_cache is not None:
        limit = None if cmp_index is None else cmp_index.shape[1]
        chosen = [paged.visible_pairs(first, end, ratio, limit) for first, end in spans]
        pairs += sum(chosen)
        # queries of one sequence share entries: at most all visible ones are read
        distinct = sum(min(c, end // ratio) for c, (_, end) in zip(chosen, spans, strict=True))
        read += distinct * cmp_cache.shape[2] * cmp_cache.element_size()
    read += tensors_bytes(q_THC, sink_H, cmp_index)
    return Cost(4 * heads * channels * pairs, 5 * heads * pairs, read, tensors_bytes(q_THC), "bf16")


sparse_attention = Contract(
    name=_OP, reference=_sparse_attention, meta=_meta, samples=samples, errors=errors, bound=_bound, cost=_cost
)
