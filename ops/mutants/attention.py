"""Faults and legal variants of sparse_attention.

Shapes: T tokens, H heads, C head width, n rows of one query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops import paged
from ops.attention import queries, read_rows
from ops.mutants.core import arguments, legal, mutant

_OP = "sparse_attention"
_LOW = (torch.bfloat16,)
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _tasks(a: dict[str, Any], compute: torch.dtype = torch.float32) -> Iterator[tuple[int, Tensor, Tensor]]:
    return queries(
        a["q_THC"], a["window_cache"], a["window_table"], a["cu_seqlens"], a["start_pos"], a["window"], a["cmp_cache"], a["cmp_table"],
        a["cmp_index"], a["ratio"], compute,
    )  # fmt: skip


def _with(attend: Attend) -> Callable[..., Tensor]:
    """The op with `attend(q [H, C], rows [n, C], sink [H], scale) -> [H, C]` for each query, in fp32."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(_OP, args, kwargs)
        out = torch.empty(a["q_THC"].shape)
        for t, q_HC, rows_nC in _tasks(a):
            out[t] = attend(q_HC, rows_nC, a["sink_H"].float(), a["scale"])
        return out.to(a["q_THC"].dtype)

    return body


def _changed(**changes: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """The correct op on changed arguments."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        a = arguments(_OP, args, kwargs)
        return call(**{**a, **{name: change(a) for name, change in changes.items()}})

    return body


def _softmax(logits_Hn: Tensor, sink_H: Tensor, rows_nC: Tensor) -> Tensor:
    return torch.softmax(torch.cat((logits_Hn, sink_H[:, None]), 1), 1)[:, :-1] @ rows_nC


def _flash(q: Tensor, rows: Tensor, sink: Tensor, scale: float, block: int, *, rescale: bool, p_type: torch.dtype) -> Tensor:
    most, total = sink.clone(), torch.ones_like(sink)
    acc = torch.zeros_like(q)
    for part in rows.split(block):
        logits = q @ part.T * scale
        new = torch.maximum(most, logits.amax(1))
        p = torch.exp(logits - new[:, None])
        shrink = torch.exp(most - new)
        acc = (acc * shrink[:, None] if rescale else acc) + p.to(p_type).float() @ part
        total, most = total * shrink + p.sum(1), new
    return acc / total[:, None]


# ---- the sink -------------------------------------------------------------------------------------------------------

mutant(_OP, "sink_scaled", "the sink is multiplied by the softmax scale")(_changed(sink_H=lambda a: a["sink_H"] * a["scale"]))
mutant(_OP, "sink_lost", "the sink is not in the denominator")(_changed(sink_H=lambda a: a["sink_H"] * 0 - 1e30))
mutant(_OP, "sink_of_next_head", "each head takes the sink of the next one")(_changed(sink_H=lambda a: a["sink_H"].roll(-1)))
mutant(_OP, "sink_twice", "each of two splits adds the sink")(_changed(sink_H=lambda a: a["sink_H"] + 0.6931472))

# ---- which rows -----------------------------------------------------------------------------------------------------

mutant(_OP, "window_short", "the oldest row of the window is missing")(_changed(window=lambda a: max(a["window"] - 1, 1)))
mutant(_OP, "scale_twice", "the scale is applied to the queries and to the logits")(_changed(scale=lambda a: a["scale"] ** 2))


@mutant(_OP, "first_table", "every sequence reads the pages of sequence 0")
def _first_table(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    a["window_table"] = a["window_table"][:1].expand_as(a["window_table"]).contiguous()
    out = torch.empty(a["q_THC"].shape)
    for t, q_HC, rows_nC in _tasks(a):
        out[t] = _softmax(q_HC @ rows_nC.T * a["scale"], a["sink_H"], rows_nC)
    return out.to(a["q_THC"].dtype)


@mutant(_OP, "high_blocks", "page numbers are kept in too few bits, so that high pages wrap round")
def _high_blocks(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    wrapped = 1 << max(a["window_cache"].shape[0].bit_length() - 2, 0)
    a["window_table"] = a["window_table"] % wrapped
    out = torch.empty(a["q_THC"].shape)
    for t, q_HC, rows_nC in _tasks(a):
        out[t] = _softmax(q_HC @ rows_nC.T * a["scale"], a["sink_H"], rows_nC)
    return out.to(a["q_THC"].dtype)


def _entries(change: Callable[[int, int, int], int]) -> Callable[..., Tensor]:
    """Without an index: entries 0..change(position, last position of the call, ratio) - 1 instead of the visible ones."""

    def body(call: Any, *args: Any, **kwargs: Any) -> Tensor:
        a = arguments(_OP, args, kwargs)
        if a["cmp_cache"] is None or a["cmp_index"] is not None:
            return call(**a)
        q, cache, cmp = a["q_THC"], a["window_cache"], a["cmp_cache"]
        out, ends = torch.empty(q.shape), (a["start_pos"] + a["cu_seqlens"].diff()).tolist()
        for b, t, p in paged.tokens(a["cu_seqlens"], a["start_pos"]):
            positions = torch.arange(max(p - a["window"] + 1, 0), p + 1)
            near = read_rows(cache, paged.row_slots(a["window_table"][b], positions, cache.shape[1]), q.shape[2], torch.float32)
            entries = torch.arange(max(change(p, ends[b] - 1, a["ratio"]), 0))
            far = read_rows(cmp, paged.row_slots(a["cmp_table"][b], entries, cmp.shape[1]), q.shape[2], torch.float32)
            rows = torch.cat((far, near))
            out[t] = _softmax(q[t].float() @ rows.T * a["scale"], a["sink_H"], rows)
        return out.to(q.dtype)

    return body


mutant(_OP, "entry_late", "the entry that the query itself completes is hidden")(_entries(lambda p, last, m: p // m))
mutant(_OP, "shared_mask", "all queries of a call see the entries of the last one")(_entries(lambda p, last, m: (last + 1) // m))
mutant(_OP, "first_entry_lost", "the loop over entries stops one early")(_entries(lambda p, last, m: (p + 1) // m - 1))


@mutant(_OP, "sentinel_read", "-1 in the index list is read as entry 0")
def _sentinel(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    if a["cmp_index"] is None:
        return call(**a)
    a["cmp_index"] = torch.where(a["cmp_index"] < 0, 0, a["cmp_index"])
    out = torch.empty(a["q_THC"].shape)
    for t, q_HC, rows_nC in _tasks(a):
        out[t] = _softmax(q_HC @ rows_nC.T * a["scale"], a["sink_H"], rows_nC)
    return out.to(a["q_THC"].dtype)


@mutant(_OP, "index_of_token_before", "each query uses the choice of the one before it")
def _index_before(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    if a["cmp_index"] is not None:
        a["cmp_index"] = a["cmp_index"][[max(t - 1, 0) for t in range(len(a["cmp_index"]))]]
    return call(**a)


@mutant(_OP, "choice_cut", "only the first half of the chosen entries is used, as in a kernel built for a smaller k")
def _choice_cut(call: Any, *args: Any, **kwargs: Any) -> Tensor:
    a = arguments(_OP, args, kwargs)
    if a["cmp_index"] is not None:
        a["cmp_index"] = a["cmp_index"][:, : (a["cmp_index"].shape[1] + 1) // 2].contiguous()
    return call(**a)


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@mutant(_OP, "tail_rows_lost", "the last, partly filled tile of 16 rows is not read")
@_with
def _tail_rows(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    rows = rows[: len(rows) // 16 * 16] if len(rows) > 16 else rows
    return _softmax(q @ rows.T * scale, sink, rows)


@mutant(_OP, "no_rescaling", "the accumulator is not rescaled when a later tile has a larger logit")
@_with
def _no_rescaling(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    return _flash(q, rows, sink, scale, 4, rescale=False, p_type=torch.float32)


@mutant(_OP, "logits_bf16", "logits are stored in bf16 before the softmax")
@_with
def _logits_bf16(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    return _softmax((q @ rows.T * scale).bfloat16().float(), sink, rows)


@mutant(_OP, "p_fp8", "softmax weights are stored in FP8")
@_with
def _p_fp8(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    p = torch.softmax(torch.cat((q @ rows.T * scale, sink[:, None]), 1), 1)[:, :-1]
    return p.to(torch.float8_e4m3fn).float() @ rows


@mutant(_OP, "accumulator_bf16", "the sum over rows is kept in bf16 from tile to tile")
@_with
def _accumulator(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    p = torch.softmax(torch.cat((q @ rows.T * scale, sink[:, None]), 1), 1)[:, :-1]
    acc = torch.zeros_like(q)
    for i in range(0, len(rows), 4):
        acc = (acc + p[:, i : i + 4] @ rows[i : i + 4]).bfloat16().float()
    return acc


@mutant(_OP, "p_truncated", "softmax weights are cut off instead of rounded to bf16")
@_with
def _p_truncated(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    p = torch.softmax(torch.cat((q @ rows.T * scale, sink[:, None]), 1), 1)[:, :-1]
    return (p.view(torch.int32) & -65536).view(torch.float32) @ rows


@legal(_OP, "flash", "one pass over tiles of 5 rows with rescaling")
@_with
def _legal_flash(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    return _flash(q, rows, sink, scale, 5, rescale=True, p_type=torch.float32)


@legal(_OP, "flash_p_bf16", "one pass over tiles of 16 rows, weights rounded to bf16 before the second product", dtypes=_LOW)
@_with
def _legal_flash_bf16(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    return _flash(q, rows, sink, scale, 16, rescale=True, p_type=torch.bfloat16)


@legal(_OP, "rows_reversed", "rows summed from the newest to the oldest")
@_with
def _legal_reversed(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    return _softmax(q @ rows.flip(0).T * scale, sink, rows.flip(0))


@legal(_OP, "split", "two halves of the rows by themselves, combined by their log-sum-exp, the sink last")
@_with
def _legal_split(q: Tensor, rows: Tensor, sink: Tensor, scale: float) -> Tensor:
    parts = [part for part in rows.tensor_split(2) if len(part)]
    logits = [q @ part.T * scale for part in parts]
    lse = torch.stack([x.logsumexp(1) for x in logits])
    total = torch.logsumexp(torch.cat((lse, sink[None])), 0)
    outs = torch.stack([torch.softmax(x, 1) @ part for x, part in zip(logits, parts, strict=True)])
    return (outs * torch.exp(lse - total)[:, :, None]).sum(0)
