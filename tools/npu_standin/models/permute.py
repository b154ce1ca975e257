"""The older pair of routing ops: rows put in the order of experts and back. Shapes: T tokens, k choices, H channels."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import model, require, require_dtype, require_shape

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@model("npu::npu_moe_token_permute")
def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of tokens [T, H] sorted by indices [T, k], stable by t*k + j, [T*k, H]; and int32 [T*k]: the row of t*k + j."""
    op = "npu_moe_token_permute"
    require_shape(op, "tokens", tokens, None, None)
    require_dtype(op, "indices", indices, torch.int32, torch.int64)
    require_shape(op, "indices", indices, tokens.shape[0], None)
    require(
        not padded_mode and num_out_tokens in (None, 0, indices.numel()),
        op,
        "padded_mode or num_out_tokens",
        "neither (not modelled)",
    )
    order = torch.sort(indices.flatten(), stable=True).indices
    row_of = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
    return tokens[order // indices.shape[1]], row_of.to(torch.int32)


@model("npu::npu_moe_token_unpermute")
def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """[T, H] = sum over k of probs [T, k] times the row sorted_indices[t*k + j]; probs have the type of the rows; without them k = 1."""
    op = "npu_moe_token_unpermute"
    require_dtype(op, "permuted_tokens", permuted_tokens, *FLOATS)
    require_shape(op, "permuted_tokens", permuted_tokens, None, None)
    require_dtype(op, "sorted_indices", sorted_indices, torch.int32)
    require(not padded_mode and restore_shape is None, op, "padded_mode or restore_shape", "neither (not modelled)")
    k = 1
    if probs is not None:
        require_dtype(op, "probs", probs, permuted_tokens.dtype)
        require(probs.dim() == 2 and probs.numel() == sorted_indices.numel(), op, f"probs {list(probs.shape)}", "[T, k]")
        k = probs.shape[1]
    inside = bool(((sorted_indices >= 0) & (sorted_indices < permuted_tokens.shape[0])).all())
    require(inside, op, "a row that does not exist", f"0 <= row < {permuted_tokens.shape[0]}")
    rows = permuted_tokens.float()[sorted_indices.long()].unflatten(0, (-1, k))
    return (rows if probs is None else rows * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)
