"""cann_ops_transformer's attention with a shared key-value row, for 1 to 128 heads. Its lengths are per cache: original and compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.npu_standin.models import model, needed, require, require_dtype, require_shape, soc
from tools.npu_standin.models.attention import BAND, CAUSAL, WIDTH, Call, check_common, check_indices, check_masks, check_tensors
from tools.npu_standin.models.metadata import compare, written
from tools.npu_standin.models.paging import check_cache, check_table

OP = "sparse_flash_mla"
CHOSEN = (512, 1024)


def _facts(
    heads: tuple[int | None, ...], tensors: tuple[Tensor | None, ...], topk: tuple[int | None, int | None], ratio: int | None,
    masks: tuple[int | None, ...], layouts: tuple[str | None, str | None], has: tuple[bool | None, bool | None],
) -> dict[str, Any]:  # fmt: skip
    names = ("cu_seqlens_q", "seqused_ori_kv", "seqused_cmp_kv", "cmp_residual_kv")
    return {
        "num_heads_q, num_heads_kv, head_dim": heads, **dict(zip(names, tensors, strict=True)), "ori_topk and cmp_topk": topk,
        "cmp_ratio": ratio, "mask modes and window": masks, "layout_q and layout_kv": layouts, "has_ori_kv and has_cmp_kv": has,
    }  # fmt: skip


def _check_compressed(lengths: Tensor, ratio: int, seqused_cmp_kv: Tensor | None, cmp_residual_kv: Tensor | None) -> None:
    """Compressed lengths and residuals must say the same as the original lengths."""
    for name, found, expected in (
        ("seqused_cmp_kv", needed(OP, "seqused_cmp_kv", seqused_cmp_kv), lengths // ratio),
        ("cmp_residual_kv", needed(OP, "cmp_residual_kv", cmp_residual_kv), lengths % ratio),
    ):
        require_dtype(OP, name, found, torch.int32)
        require_shape(OP, name, found, lengths.numel())
        require(
            torch.equal(found, expected.to(torch.int32)),
            OP,
            f"{name} {found.tolist()} for lengths {lengths.tolist()}",
            f"{expected.tolist()}",
        )


@model("cann_ops_transformer::sparse_flash_mla")
def sparse_flash_mla(
    q: Tensor,
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
    seqused_ori_kv: Tensor | None = None,
    seqused_cmp_kv: Tensor | None = None,
    cmp_residual_kv: Tensor | None = None,
    ori_topk_length: Tensor | None = None,
    cmp_topk_length: Tensor | None = None,
    sinks: Tensor | None = None,
    metadata: Tensor | None = None,
    softmax_scale: float = 1.0,
    cmp_ratio: int = 1,
    ori_mask_mode: int = 4,
    cmp_mask_mode: int = 3,
    ori_win_left: int = 127,
    ori_win_right: int = 0,
    layout_q: str = "BSND",
    layout_kv: str = "BSND",
    topk_value_mode: int = 1,
    return_softmax_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output like q [T, N1, 512] and an empty tensor. Heads: a power of two up to 128 (950: not 1); chosen entries 512 or 1024.

    Without cmp_kv: cmp_ratio 1 and cmp_mask_mode 0. With it: seqused_cmp_kv and cmp_residual_kv (original length mod ratio).
    """
    optional = {
        "ori_sparse_indices": ori_sparse_indices, "cu_seqlens_ori_kv": cu_seqlens_ori_kv, "cu_seqlens_cmp_kv": cu_seqlens_cmp_kv,
        "seqused_q": seqused_q, "ori_topk_length": ori_topk_length, "cmp_topk_length": cmp_topk_length,
    }  # fmt: skip
    layouts = (layout_q, layout_kv)
    check_common(OP, q, optional, layouts, "PA_BBND", return_softmax_lse)
    heads = q.shape[1]
    least = 2 if soc() == "950" else 1
    require(
        least <= heads <= 128 and heads & (heads - 1) == 0, OP, f"{heads} heads on {soc()}", f"a power of two in {least}..128"
    )
    require(topk_value_mode == 1, OP, f"topk_value_mode {topk_value_mode}", "1")
    window, (cu, used, sink) = needed(OP, "ori_kv", ori_kv), check_tensors(OP, q, cu_seqlens_q, seqused_ori_kv, sinks)
    check_cache(OP, "ori_kv", window, WIDTH, q.dtype)
    table = check_table(OP, "ori_block_table", ori_block_table, used.numel())
    compressed = cmp_kv is not None
    given = {"ori_mask_mode": ori_mask_mode, "cmp_mask_mode": cmp_mask_mode, "ori_win_right": ori_win_right}
    check_masks(OP, given, {"ori_mask_mode": BAND, "cmp_mask_mode": CAUSAL if compressed else 0, "ori_win_right": 0})
    require(ori_win_left >= 0, OP, f"ori_win_left {ori_win_left}", "at least 0 (127 is 128 tokens)")
    if cmp_kv is None:
        require(
            cmp_sparse_indices is None and cmp_ratio == 1,
            OP,
            f"cmp_ratio {cmp_ratio} without cmp_kv",
            "cmp_ratio 1 and no indices",
        )
    else:
        require(cmp_ratio in (4, 128), OP, f"cmp_ratio {cmp_ratio}", "4 or 128")
        check_cache(OP, "cmp_kv", cmp_kv, WIDTH, q.dtype)
        cmp_block_table = check_table(OP, "cmp_block_table", cmp_block_table, used.numel())
        check_indices(OP, cmp_sparse_indices, q.shape[0], CHOSEN)
        _check_compressed(used, cmp_ratio, seqused_cmp_kv, cmp_residual_kv)
    topk = 0 if cmp_sparse_indices is None else cmp_sparse_indices.shape[2]
    masks = (ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
    tensors = (cu, used, seqused_cmp_kv, cmp_residual_kv)
    compare(OP, metadata, _facts((heads, 1, WIDTH), tensors, (0, topk), cmp_ratio, masks, layouts, (True, compressed)))
    call = Call(
        OP, q, window, table, cmp_kv, cmp_block_table, cmp_sparse_indices, cu, used.tolist(), sink, softmax_scale, cmp_ratio,
        ori_win_left, ori_win_right, torch.Tensor.float,
    )  # fmt: skip
    return call(), torch.empty(0, dtype=torch.float32)


@model("cann_ops_transformer::sparse_flash_mla_metadata")
def sparse_flash_mla_metadata(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_ori_kv: Tensor | None = None,
    cu_seqlens_cmp_kv: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_ori_kv: Tensor | None = None,
    seqused_cmp_kv: Tensor | None = None,
    cmp_residual_kv: Tensor | None = None,
    ori_topk_length: Tensor | None = None,
    cmp_topk_length: Tensor | None = None,
    batch_size: int | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_ori_kv: int | None = None,
    max_seqlen_cmp_kv: int | None = None,
    ori_topk: int | None = None,
    cmp_topk: int | None = None,
    cmp_ratio: int | None = None,
    ori_mask_mode: int | None = None,
    cmp_mask_mode: int | None = None,
    ori_win_left: int | None = None,
    ori_win_right: int | None = None,
    layout_q: str | None = None,
    layout_kv: str | None = None,
    has_ori_kv: bool | None = None,
    has_cmp_kv: bool | None = None,
) -> Tensor:
    """int32 [1024] whose arguments must equal those of the attention call; nothing is filled in for None."""
    tensors = (cu_seqlens_q, seqused_ori_kv, seqused_cmp_kv, cmp_residual_kv)
    masks = (ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
    heads = (num_heads_q, num_heads_kv, head_dim)
    return written(
        _facts(heads, tensors, (ori_topk, cmp_topk), cmp_ratio, masks, (layout_q, layout_kv), (has_ori_kv, has_cmp_kv))
    )
