"""Writing rows into caches. Shapes: slots rows of s channels, u updates."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, poison, require, require_dtype, require_shape


def write_rows(table: Tensor, slots: Tensor, rows: Tensor) -> None:
    """table[slots] = rows; a slot that is named twice with different rows is left undefined, as the order of writes is."""
    table[slots] = rows
    _, group, counts = torch.unique(slots, return_inverse=True, return_counts=True)
    for g in (counts > 1).nonzero().flatten().tolist():
        same = rows[group == g].reshape(int(counts[g]), -1).contiguous().view(torch.uint8)
        if not torch.equal(same, same[:1].expand_as(same)):
            poison(table[int(slots[group == g][0])])


@model("custom::scatter_nd_update_asc", socs=OLDER)
def scatter_nd_update_asc(var: Tensor, indices: Tensor, update: Tensor) -> None:
    """var [slots, s] at indices [u, 1] = update [u, s]; negative indices are skipped, too large ones are written anyway (refused here)."""
    op = "scatter_nd_update_asc"
    require(var.dim() == 2, op, f"var {list(var.shape)}", "var of 2 dimensions [slots, s]: view the paged cache flat")
    require(var.is_contiguous(), op, f"strides {var.stride()}", "contiguous var (a copy would be written instead of the cache)")
    require_dtype(op, "var", var, torch.bfloat16, torch.float16, torch.int8)
    require_dtype(op, "update", update, var.dtype)
    require_dtype(op, "indices", indices, torch.int32, torch.int64)
    require(var.shape[1] in (1, 128, 512), op, f"s = {var.shape[1]}", "s in 1, 128, 512")
    require_shape(op, "indices", indices, None, 1)
    require_shape(op, "update", update, indices.shape[0], var.shape[1])
    require(indices.shape[0] <= var.shape[0], op, f"u = {indices.shape[0]} for {var.shape[0]} slots", "u at most slots")
    where = indices[:, 0].long()
    require(
        not bool((where >= var.shape[0]).any()),
        op,
        f"index {int(where.max()) if where.numel() else 0}",
        f"below {var.shape[0]}: nothing checks it",
    )
    keep = where >= 0
    write_rows(var, where[keep], update[keep])


@model("npu::npu_scatter_nd_update_")
def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """input at indices [..., M] = updates, in place. A negative index is not skipped: it addresses memory in front (refused here)."""
    op = "npu_scatter_nd_update_"
    require_dtype(op, "indices", indices, torch.int32, torch.int64)
    require_dtype(op, "updates", updates, input.dtype)
    depth = indices.shape[-1]
    require(
        1 <= depth <= input.dim(), op, f"indices {list(indices.shape)}", "indices [..., M] with M at most the dimensions of input"
    )
    require_shape(op, "updates", updates, *indices.shape[:-1], *input.shape[depth:])
    require(input.is_contiguous(), op, f"strides {input.stride()}", "contiguous input")
    if not indices.numel():
        return input
    limits = torch.tensor(input.shape[:depth])
    legal = bool(((indices >= 0) & (indices < limits)).all())
    require(
        legal,
        op,
        f"indices {int(indices.min())}..{int(indices.max())}",
        "0 <= index < size; -1 is not skipped, give padding a row of its own",
    )
    flat = torch.zeros(indices.shape[:-1], dtype=torch.long)
    for axis in range(depth):
        flat = flat * input.shape[axis] + indices[..., axis].long()
    rows = input.view(-1, *input.shape[depth:])
    write_rows(rows, flat.flatten(), updates.reshape(-1, *input.shape[depth:]))
    return input
