"""Sorting rows by expert and back. Shapes: T tokens, k experts per token, H channels, A rows, E experts, N ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, needed, poison, require, require_dtype, require_shape, soc, undefined
from tools.npu_standin.models.blocks import mx_quantised
from tools.npu_standin.models.codes import FP4_E2M1
from tools.npu_standin.models.rounding import int8_per_row

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CUMULATED, COUNTS, PAIRS = 0, 1, 2
GATHER, SCATTER = 0, 1
PLAIN, INT8_DYNAMIC, MX_E5M2, MX_E4M3, MX_FP4 = -1, 1, 2, 3, 9
_MX: dict[int, torch.dtype | str] = {MX_E5M2: torch.float8_e5m2, MX_E4M3: torch.float8_e4m3fn, MX_FP4: FP4_E2M1}


def _quantised(
    op: str, x: Tensor, quant_mode: int, source: Tensor, experts: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The expanded rows and their scales (None: undefined)."""
    rows = x.view(torch.uint8)[source].view(x.dtype) if x.dtype in FP8 else x[source]
    if quant_mode == PLAIN and x.dtype in FP8:
        if scale is None:
            return rows.clone(), None
        require_dtype(op, "scale", scale, torch.float8_e8m0fnu)
        require_shape(op, "scale", scale, x.shape[0], -(-x.shape[1] // 64), 2)
        return rows, scale.view(torch.uint8)[source].view(torch.float8_e8m0fnu)
    if quant_mode == PLAIN:
        require(scale is None or scale.dim() == 1, op, "scale of another shape", f"scale [{x.shape[0]}] without quantisation")
        return rows, None if scale is None else scale.float()[source]
    if quant_mode == INT8_DYNAMIC:
        if scale is None:
            return int8_per_row(rows)
        require_shape(op, "scale", scale, None, x.shape[1])
        return int8_per_row(rows.float() * scale[experts if scale.shape[0] > 1 else torch.zeros_like(experts)])
    require(
        soc() not in OLDER and quant_mode in _MX,
        op,
        f"quant_mode {quant_mode} on {soc()}",
        "-1, 1; on 950 also 2, 3, 9 (others are not modelled)",
    )
    codes, scales = mx_quantised(rows, _MX[quant_mode], round_up=False)
    # the wheel gives pairs of scales for fp4, and one row of them for fp8
    return codes, scales if quant_mode == MX_FP4 else scales.flatten(-2)


@model("npu::npu_moe_init_routing_v2")
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: tuple[int, ...] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x [T, H] sorted by expert, stable by t*k+j, [T*k, H]; row index int32 [T*k]; tokens per expert int64; scales fp32 [T*k].

    row_idx_type 0: idx[t*k+j] = row, -1 outside active_expert_range; 1: idx[row] = t*k+j, undefined behind the active rows.
    Rows of x and scales behind the active ones are undefined, as are the counts without their flag and scales that nothing computes. Codes without
    quantisation take their scales along: fp32 [T] of int8, e8m0 [T, H/64, 2] of fp8 (950; aclnnMoeInitRoutingV3.md of ops-transformer).
    """
    op = "npu_moe_init_routing_v2"
    require_shape(op, "x", x, None, None)
    codes = (torch.int8, *(() if soc() in OLDER else FP8)) if quant_mode == PLAIN else ()
    require_dtype(op, "x", x, *FLOATS, *codes)
    require_dtype(op, "expert_idx", expert_idx, torch.int32)
    require_shape(op, "expert_idx", expert_idx, x.shape[0], None)
    require(offset is None and drop_pad_mode == 0, op, "offset or drop_pad_mode", "offset None, drop_pad_mode 0")
    total = expert_idx.numel()
    require(active_num == total, op, f"active_num {active_num}", f"active_num T*k = {total}, passed explicitly")
    require(expert_num > 0, op, f"expert_num {expert_num}", "the number of experts, passed explicitly")
    window = list(active_expert_range)
    legal = len(window) == 2 and 0 <= window[0] < window[1] <= expert_num
    require(legal, op, f"active_expert_range {window}", f"[lo, hi] inside 0..{expert_num}, passed explicitly")
    low, high = window
    flat = expert_idx.flatten().long()
    require(bool(((flat >= 0) & (flat < expert_num)).all()), op, "an expert id out of range", f"0 <= id < {expert_num}")
    active = ((flat >= low) & (flat < high)).nonzero().flatten()
    order = active[torch.sort(flat[active], stable=True).indices]
    rows, row_scale = _quantised(op, x, quant_mode, order // expert_idx.shape[1], flat[order] - low, scale)
    used = order.numel()
    expanded = undefined((total, *rows.shape[1:]), rows.dtype)
    expanded[:used] = rows
    scales = (
        undefined((total,), torch.float32) if row_scale is None else undefined((total, *row_scale.shape[1:]), row_scale.dtype)
    )
    if row_scale is not None:
        scales[:used] = row_scale
    tokens = _tokens(op, flat[order], low, high, expert_tokens_num_type, expert_tokens_num_flag)
    return expanded, _row_index(op, order, total, row_idx_type), tokens, scales


def _row_index(op: str, order: Tensor, total: int, kind: int) -> Tensor:
    require(kind in (GATHER, SCATTER), op, f"row_idx_type {kind}", "0 or 1")
    used = order.numel()
    if kind == SCATTER:
        index = undefined((total,), torch.int32)
        index[:used] = order.to(torch.int32)
        return index
    index = torch.full((total,), -1, dtype=torch.int32)
    index[order] = torch.arange(used, dtype=torch.int32)
    return index


def _tokens(op: str, experts: Tensor, low: int, high: int, kind: int, wanted: bool) -> Tensor:
    require(kind in (CUMULATED, COUNTS, PAIRS), op, f"expert_tokens_num_type {kind}", "0 cumulative, 1 counts, 2 pairs")
    counts = torch.bincount(experts - low, minlength=high - low)
    if kind == PAIRS:
        found = torch.stack((torch.arange(low, high), counts), 1)
    else:
        found = counts.cumsum(0) if kind == CUMULATED else counts
    return found if wanted else poison(found)


@model("npu::npu_moe_finalize_routing")
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """[T, H] = skip1 + skip2 + sum over k of scales * (row + bias of its expert), in the type of the rows.

    drop_pad_mode 0 reads row indices column-major (j*T + t), 2 row-major (t*k + j). scales [T, k] have the type of the rows, or fp32 beside bf16
    rows; sums in fp32, rounded once (aclnnMoeFinalizeRoutingV2.md and moe_finalize_routing_v2_bf16.h of ops-transformer).
    """
    op = "npu_moe_finalize_routing"
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    require_shape(op, "expanded_permuted_rows", rows, None, None)
    require_dtype(op, "expanded_permuted_rows", rows, *FLOATS)
    require_dtype(op, "expanded_src_to_dst_row", index, torch.int32)
    require_shape(op, "expanded_src_to_dst_row", index, None)
    require(drop_pad_mode in (0, 2), op, f"drop_pad_mode {drop_pad_mode}", "0 or 2 (padded modes 1 and 3 are not modelled)")
    require(skip2 is None or skip1 is not None, op, "skip2 without skip1", "skip2 only with skip1")
    if scales is not None:
        mixed = rows.dtype == torch.bfloat16 or soc() not in OLDER
        require_dtype(op, "scales", scales, rows.dtype, *((torch.float32,) if mixed else ()))
        require(scales.dim() == 2, op, f"scales {list(scales.shape)}", "scales [T, k]")
    per_token = scales.shape[1] if scales is not None else int(k or 1)
    require(index.numel() % per_token == 0, op, f"{index.numel()} row indices", f"a multiple of k = {per_token}")
    tokens = index.numel() // per_token
    require(
        bool(((index >= 0) & (index < rows.shape[0])).all()), op, "a row index outside the rows", f"0 <= index < {rows.shape[0]}"
    )
    table = index.long().view(per_token, tokens).T if drop_pad_mode == 0 else index.long().view(tokens, per_token)
    found = rows.float()[table]
    if bias is not None:
        experts = needed(op, "export_for_source_row (bias is given)", export_for_source_row)
        require_shape(op, "export_for_source_row", experts, tokens, per_token)
        found = found + bias.float()[experts.long()]
    if scales is not None:
        require_shape(op, "scales", scales, tokens, per_token)
        found = found * scales.float()[..., None]
    result = found.sum(1)
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            require_shape(op, name, skip, tokens, rows.shape[1])
            require_dtype(op, name, skip, rows.dtype)
            result = result + skip.float()
    return result.to(rows.dtype)
