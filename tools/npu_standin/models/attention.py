"""Attention over a window and compressed entries, keys and values being one row. Shapes: T queries of B requests, N1 heads, K chosen entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin.models import model, needed, require, require_dtype, require_shape, undefined
from tools.npu_standin.models.metadata import compare, written
from tools.npu_standin.models.paging import check_cache, check_table, requests, rows_of

OP, QUANT_OP = "npu_sparse_attn_sharedkv", "npu_kv_quant_sparse_attn_sharedkv"
WIDTH, HEADS, CHOSEN = 512, 64, 512
BAND, CAUSAL = 4, 3


@dataclass(frozen=True)
class Call:
    """What the attention ops have in common: tensors, geometry, and how a cache row becomes numbers."""

    op: str
    q: Tensor
    ori_kv: Tensor
    ori_table: Tensor
    cmp_kv: Tensor | None
    cmp_table: Tensor | None
    indices: Tensor | None
    cu_seqlens_q: Tensor
    lengths: list[int]
    sinks: Tensor
    scale: float
    ratio: int
    left: int
    right: int
    decode: Callable[[Tensor], Tensor]

    def rows(self, b: int, t: int, position: int, length: int) -> Tensor:
        """The rows of one query, fp32 [n, 512]: its window, then the entries that are complete at its position."""
        window = torch.arange(max(position - self.left, 0), min(position + self.right, length - 1) + 1)
        found = [self.decode(rows_of(self.op, self.ori_kv, self.ori_table, b, window))]
        if self.cmp_kv is not None and self.cmp_table is not None:
            visible = (position + 1) // self.ratio
            if self.indices is None:
                chosen = torch.arange(visible)
            else:
                listed = self.indices[t, 0].long()
                chosen = listed[(listed >= 0) & (listed < visible)]
            found.append(self.decode(rows_of(self.op, self.cmp_kv, self.cmp_table, b, chosen)))
        return torch.cat(found)

    def __call__(self) -> Tensor:
        """[T, N1, 512] in the type of q; rows behind the last request are undefined. The sink stands in the denominator only, unscaled."""
        out = undefined(self.q.shape, self.q.dtype)
        for b, t, position in requests(self.op, self.q.shape[0], self.cu_seqlens_q.tolist(), self.lengths):
            rows = self.rows(b, t, position, self.lengths[b])
            scores = self.q[t].float() @ rows.T * self.scale
            top = torch.maximum(scores.amax(1), self.sinks)[:, None]
            weights = (scores - top).exp()
            total = weights.sum(1, keepdim=True) + (self.sinks[:, None] - top).exp()
            # the matrix unit takes the weights in the type of the rows; their sum is of those before that rounding
            out[t] = (weights.to(out.dtype).float() @ rows / total).to(out.dtype)
        return out


def check_common(op: str, q: Tensor, optional: Mapping[str, Any], layouts: tuple[str, str], paged: str, lse: bool) -> None:
    """Refuse what no model covers: other layouts than TND with a paged cache, empty tensors, arguments that are without effect."""
    require(layouts == ("TND", paged), op, f"layouts {layouts}", f"('TND', '{paged}') (BSND is documented too and not modelled)")
    require(q.dim() == 3 and q.shape[-1] == WIDTH, op, f"q {list(q.shape)}", f"[T, N1, {WIDTH}]")
    require_dtype(op, "q", q, torch.bfloat16, torch.float16)
    require(q.numel() > 0, op, "an empty q", "no empty tensors")
    require(not lse, op, "return_softmax_lse", "False (documented as unsupported)")
    for name, value in optional.items():
        require(value is None, op, f"{name} given", f"{name} None (not modelled)")


def check_tensors(
    op: str, q: Tensor, cu_seqlens_q: Tensor | None, lengths: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens_q int32 [B+1], lengths int32 [B] and sinks fp32 [N1], all of them given."""
    cu, used, sink = (
        needed(op, "cu_seqlens_q", cu_seqlens_q),
        needed(op, "lengths of the keys", lengths),
        needed(op, "sinks", sinks),
    )
    require_dtype(op, "cu_seqlens_q", cu, torch.int32)
    require_dtype(op, "lengths of the keys", used, torch.int32)
    require_shape(op, "lengths of the keys", used, cu.numel() - 1)
    require_dtype(op, "sinks", sink, torch.float32)
    require_shape(op, "sinks", sink, q.shape[1])
    return cu, used, sink


def check_indices(op: str, indices: Tensor | None, tokens: int, widths: tuple[int, ...]) -> None:
    """Chosen entries int32 [T, 1, K], K one of `widths`, distinct, -1 for none."""
    if indices is None:
        return
    require_dtype(op, "cmp_sparse_indices", indices, torch.int32)
    require_shape(op, "cmp_sparse_indices", indices, tokens, 1, None)
    require(indices.shape[2] in widths, op, f"K = {indices.shape[2]}", f"K in {widths}, filled up with -1")


def check_masks(op: str, given: Mapping[str, int], documented: Mapping[str, int]) -> None:
    """Masks and windows that V4 uses; other ones are not modelled."""
    for name, value in documented.items():
        require(given[name] == value, op, f"{name} {given[name]}", f"{name} {value}")


def _facts(
    q: tuple[int, int, int], cu: Tensor | None, used: Tensor | None, topk: tuple[int, int], ratio: int, masks: tuple[int, ...],
    layouts: tuple[str, str], has: tuple[bool, bool], extra: tuple[int, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    return {
        "num_heads_q": q[0], "num_heads_kv": q[1], "head_dim": q[2], "cu_seqlens_q": cu, "seqused_kv": used, "ori_topk": topk[0],
        "cmp_topk": topk[1], "cmp_ratio": ratio, "mask modes and window": masks, "layout_q and layout_kv": layouts, "has_ori_kv": has[0],
        "has_cmp_kv": has[1], "quantisation": extra,
    }  # fmt: skip


def _sharedkv(
    op: str, q: Tensor, ori_kv: Tensor | None, cmp_kv: Tensor | None, cmp_sparse_indices: Tensor | None, ori_block_table: Tensor | None,
    cmp_block_table: Tensor | None, cu_seqlens_q: Tensor | None, seqused_kv: Tensor | None, sinks: Tensor | None, metadata: Tensor | None,
    scale: float, ratio: int, masks: tuple[int, int, int, int], layouts: tuple[str, str], head_dim: int, cache_types: tuple[torch.dtype, ...],
    decode: Callable[[Tensor], Tensor], extra: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    require(q.shape[1] == HEADS, op, f"{q.shape[1]} heads", f"{HEADS}")
    window, (cu, used, sink) = needed(op, "ori_kv", ori_kv), check_tensors(op, q, cu_seqlens_q, seqused_kv, sinks)
    batch = used.numel()
    check_cache(op, "ori_kv", window, head_dim, *cache_types)
    table = check_table(op, "ori_block_table", ori_block_table, batch)
    check_masks(op, {"ori_mask_mode": masks[0], "cmp_mask_mode": masks[1]}, {"ori_mask_mode": BAND, "cmp_mask_mode": CAUSAL})
    require(masks[2] >= 0 and masks[3] == 0, op, f"window {masks[2:]}", "ori_win_left >= 0 (127 is 128 tokens), ori_win_right 0")
    if cmp_kv is None:
        require(
            cmp_sparse_indices is None and ratio == 1,
            op,
            f"cmp_ratio {ratio} without cmp_kv",
            "cmp_ratio 1 and no indices (window only)",
        )
    else:
        require(ratio in (4, 128), op, f"cmp_ratio {ratio}", "4 or 128")
        check_cache(op, "cmp_kv", cmp_kv, head_dim, *cache_types)
        cmp_block_table = check_table(op, "cmp_block_table", cmp_block_table, batch)
        check_indices(op, cmp_sparse_indices, q.shape[0], (CHOSEN,))
    topk = 0 if cmp_sparse_indices is None else cmp_sparse_indices.shape[2]
    has = (True, cmp_kv is not None)
    compare(op, metadata, _facts((q.shape[1], 1, head_dim), cu, used, (0, topk), ratio, masks, layouts, has, extra))
    call = Call(
        op,
        q,
        window,
        table,
        cmp_kv,
        cmp_block_table,
        cmp_sparse_indices,
        cu,
        used.tolist(),
        sink,
        scale,
        ratio,
        masks[2],
        masks[3],
        decode,
    )
    return call(), torch.empty(0, dtype=torch.float32)


def _optional(sparse: Tensor | None, ori: Tensor | None, cmp: Tensor | None, used_q: Tensor | None) -> dict[str, Any]:
    return {"ori_sparse_indices": sparse, "cu_seqlens_ori_kv": ori, "cu_seqlens_cmp_kv": cmp, "seqused_q": used_q}


@model("custom::npu_sparse_attn_sharedkv")
def npu_sparse_attn_sharedkv(
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
    seqused_kv: Tensor | None = None,
    sinks: Tensor | None = None,
    metadata: Tensor | None = None,
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
    """Output like q [T, 64, 512], not inversely rotated, and an empty fp32 tensor. softmax_scale 0, the default, is a scale of zero.

    ori_kv alone: window; with cmp_kv: all complete entries; with cmp_sparse_indices [T, 1, 512]: those. seqused_kv are lengths in
    uncompressed tokens, the new ones included.
    """
    layouts, optional = (layout_q, layout_kv), _optional(ori_sparse_indices, cu_seqlens_ori_kv, cu_seqlens_cmp_kv, seqused_q)
    check_common(OP, q, optional, layouts, "PA_ND", return_softmax_lse)
    masks = (ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
    return _sharedkv(
        OP, q, ori_kv, cmp_kv, cmp_sparse_indices, ori_block_table, cmp_block_table, cu_seqlens_q, seqused_kv, sinks, metadata,
        softmax_scale, cmp_ratio, masks, layouts, WIDTH, (q.dtype,), torch.Tensor.float,
    )  # fmt: skip


@model("custom::npu_sparse_attn_sharedkv_metadata")
def npu_sparse_attn_sharedkv_metadata(
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
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
    """int32 [1024] for one step and layer kind; its arguments must equal those of the attention call (cmp_topk being K or 0)."""
    masks = (ori_mask_mode, cmp_mask_mode, ori_win_left, ori_win_right)
    topk, has = (ori_topk, cmp_topk), (has_ori_kv, has_cmp_kv)
    return written(
        _facts(
            (num_heads_q, num_heads_kv, head_dim), cu_seqlens_q, seqused_kv, topk, cmp_ratio, masks, (layout_q, layout_kv), has
        )
    )
