"""Attention over packed FP8 rows, 950 only, and what writes such rows.

Row of 640 bytes: 448 e4m3, 64 bf16 (128 bytes), 7 scales of 64 channels each, padding. The attention op documents bf16 scales
(14 bytes); the epilog that writes rows documents e8m0 scales (7 bytes) in its default mode 2. They do not fit together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import model, require, require_dtype, require_shape
from tools.npu_standin.models.attention import QUANT_OP, _facts, _optional, _sharedkv, check_common
from tools.npu_standin.models.blocks import cast, scale_exponents
from tools.npu_standin.models.metadata import written

NOPE, ROPE, TILE, ROW = 448, 64, 64, 640
_SCALES = NOPE + 2 * ROPE


def unpacked(rows: Tensor) -> Tensor:
    """fp32 [n, 512] of packed rows uint8 or e4m3 [n, 640] with bf16 scales."""
    raw = rows.contiguous().view(torch.uint8)
    scales = raw[:, _SCALES : _SCALES + 14].contiguous().view(torch.bfloat16).float()
    nope = raw[:, :NOPE].contiguous().view(torch.float8_e4m3fn).float() * scales.repeat_interleave(TILE, 1)
    return torch.cat((nope, raw[:, NOPE:_SCALES].contiguous().view(torch.bfloat16).float()), 1)


@model("custom::npu_kv_quant_sparse_attn_sharedkv", socs=("950",))
def npu_kv_quant_sparse_attn_sharedkv(
    q: Tensor,
    kv_quant_mode: int,
    *,
    ori_kv: Tensor | None = None,
    cmp_kv: Tensor | None = None,
    ori_sparse_indices: Tensor | None = None,
    cmp_sparse_indices: Tensor | None = None,
    ori_block_table: Tensor | None = None,
    cmp_block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_ori_kv: Tensor | None = None,
    cu_seqlens_cmp_kv: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_kv: Tensor | None = None,
    sinks: Tensor | None = None,
    metadata: Tensor | None = None,
    tile_size: int = 0,
    rope_head_dim: int = 0,
    softmax_scale: float = 0.0,
    cmp_ratio: int = 0,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 127,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "PA_ND",
    return_softmax_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As npu_sparse_attn_sharedkv, caches [blocks, bs, 1, 640] of packed rows; kv_quant_mode 1, tile_size 64, rope_head_dim 64."""
    layouts, optional = (layout_q, layout_kv), _optional(ori_sparse_indices, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q)
    check_common(QUANT_OP, q, optional, layouts, "PA_ND", return_softmax_lse)
    found = (kv_quant_mode, tile_size, rope_head_dim)
    require(found == (1, TILE, ROPE), QUANT_OP, f"kv_quant_mode, tile_size, rope_head_dim {found}", f"1, {TILE}, {ROPE}")
    masks = (ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
    return _sharedkv(
        QUANT_OP, q, ori_kv, cmp_kv, cmp_sparse_indices, ori_block_table, cmp_block_table, cu_seqlens_q, seqused_kv, sinks, metadata,
        softmax_scale, cmp_ratio, masks, layouts, ROW, (torch.uint8, torch.float8_e4m3fn), unpacked, found,
    )  # fmt: skip


@model("custom::npu_kv_quant_sparse_attn_sharedkv_metadata", socs=("950",))
def npu_kv_quant_sparse_attn_sharedkv_metadata(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    kv_quant_mode: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_ori_kv: Tensor | None = None,
    cu_seqlens_cmp_kv: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_kv: Tensor | None = None,
    batch_size: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_kv: int = 0,
    ori_topk: int = 0,
    cmp_topk: int = 0,
    tile_size: int = 0,
    rope_head_dim: int = 0,
    cmp_ratio: int = -1,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 127,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "PA_ND",
    has_ori_kv: bool = True,
    has_cmp_kv: bool = True,
    device: str = "npu:0",
) -> Tensor:
    """int32 [1024]; head_dim is the row width, 640."""
    masks, found = (ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right), (kv_quant_mode, tile_size, rope_head_dim)
    heads, topk, has = (num_heads_q, num_heads_kv, head_dim), (ori_topk, cmp_topk), (has_ori_kv, has_cmp_kv)
    return written(_facts(heads, cu_seqlens_q, seqused_kv, topk, cmp_ratio, masks, (layout_q, layout_kv), has, found))


@model("custom::kv_compress_epilog", socs=("950",))
def kv_compress_epilog(
    kv_compress_cache: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    *,
    quant_group_size: int = 64,
    quant_mode: int = 2,
    round_scale_flag: bool = True,
    scale: float = 1.0,
) -> None:
    """Pack x bf16 [T, 512] into rows slot_mapping [T] of a flat cache [slots, 640]: e4m3, rope, e8m0 scales; -1 is skipped."""
    op = "kv_compress_epilog"
    require_dtype(op, "x", x, torch.bfloat16)
    require_shape(op, "x", x, None, 512)
    require(quant_group_size == TILE and quant_mode == 2 and round_scale_flag and scale == 1.0, op,
            f"quant_group_size {quant_group_size}, quant_mode {quant_mode}, round_scale_flag {round_scale_flag}, scale {scale}",
            "64, 2, True, 1.0 (other modes are not described)")  # fmt: skip
    require_dtype(op, "kv_compress_cache", kv_compress_cache, torch.uint8, torch.float8_e4m3fn)
    legal = kv_compress_cache.is_contiguous() and kv_compress_cache.shape[-1] == ROW
    require(legal, op, f"cache {list(kv_compress_cache.shape)}", f"[.., {ROW}], contiguous")
    require_dtype(op, "slot_mapping", slot_mapping, torch.int32, torch.int64)
    require_shape(op, "slot_mapping", slot_mapping, x.shape[0])
    groups = x[:, :NOPE].float().unflatten(1, (NOPE // TILE, TILE))
    exponent = scale_exponents(groups.abs().amax(-1), torch.float8_e4m3fn, round_up=True)
    codes = cast((groups * torch.exp2(-exponent.float())[..., None]).flatten(1), torch.float8_e4m3fn)
    parts = (codes.view(torch.uint8), x[:, NOPE:].contiguous().view(torch.uint8), (exponent + 127).to(torch.uint8))
    flat, keep = kv_compress_cache.view(torch.uint8).view(-1, ROW), slot_mapping >= 0
    flat[slot_mapping[keep].long(), : _SCALES + 7] = torch.cat(parts, 1)[keep]


@model("custom::indexer_compress_epilog", socs=("950",))
def indexer_compress_epilog(
    indexer_compress_cache: Tensor,
    indexer_compress_scale: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    *,
    quant_mode: int = 1,
    round_scale: bool = True,
    scale: float = 1.0,
) -> None:
    """Rows x [T, 128] to e4m3 with one scale per row: mode 1 fp32 (a power of two with round_scale), mode 0 e8m0. Slots int32, -1 skipped."""
    op = "indexer_compress_epilog"
    require_dtype(op, "x", x, torch.bfloat16, torch.float16)
    require_shape(op, "x", x, None, 128)
    require(quant_mode in (0, 1) and scale == 1.0, op, f"quant_mode {quant_mode}, scale {scale}", "mode 0 or 1, scale 1")
    require_dtype(op, "slot_mapping", slot_mapping, torch.int32)
    require_shape(op, "slot_mapping", slot_mapping, x.shape[0])
    wide = x.float()
    amax = wide.abs().amax(-1)
    factor = (
        torch.exp2(scale_exponents(amax, torch.float8_e4m3fn, round_up=True).float())
        if round_scale or quant_mode == 0
        else amax / 448
    )
    codes = cast(torch.where(factor[:, None] > 0, wide / factor[:, None], torch.zeros_like(wide)), torch.float8_e4m3fn)
    keep = slot_mapping >= 0
    where = slot_mapping[keep].long()
    indexer_compress_cache.view(torch.uint8).view(-1, 128)[where] = codes.view(torch.uint8)[keep]
    flat = indexer_compress_scale.view(-1)
    if quant_mode == 1:
        require_dtype(op, "indexer_compress_scale", indexer_compress_scale, torch.float32)
        flat[where] = factor[keep]
    else:
        flat.view(torch.uint8)[where] = (factor.log2() + 127).to(torch.uint8)[keep]
