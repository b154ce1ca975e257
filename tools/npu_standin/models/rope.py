"""Rotary embedding. Shapes: b, s, n, d as in the documents; L width of the rotated slice, each angle standing twice in cos and sin."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import model, require, require_dtype, soc

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x*cos + rot(x)*sin in fp32, rot(x)[2i] = -x[2i+1] and rot(x)[2i+1] = x[2i]."""
    wide = x.float()
    turned = torch.stack((-wide[..., 1::2], wide[..., 0::2]), -1).flatten(-2)
    return wide * cos.float() + turned * sin.float()


def _inplace(op: str, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, partial_slice: list[int]) -> None:
    require(x.dim() == 4, op, f"x {list(x.shape)}", "x of 4 dimensions [b, s, n, d]")
    require_dtype(op, "x", x, *FLOATS)
    require_dtype(op, "r1", r1, *FLOATS)
    require(
        r2.dtype == r1.dtype and r2.shape == r1.shape,
        op,
        f"r1 {list(r1.shape)} {r1.dtype}, r2 {list(r2.shape)} {r2.dtype}",
        "one type and shape",
    )
    require(rotary_mode == "interleave", op, f"rotary_mode {rotary_mode!r}", "'interleave'")
    require(x.is_contiguous() and r1.is_contiguous() and r2.is_contiguous(), op, "a strided tensor", "contiguous x, r1, r2")
    b, s, n, d = x.shape
    require(d <= 1024 and d % 2 == 0, op, f"d = {d}", "d even and at most 1024")
    start, stop = partial_slice
    require(0 <= start <= stop <= d, op, f"partial_slice {list(partial_slice)}", f"a slice of 0..{d}")
    if start == stop:
        return
    width = stop - start
    shapes = [(b, 1, 1, width), (b, s, 1, width)]
    if soc() == "950":
        shapes += [(b, 1, n, width), (1, 1, 1, width)]
    require(tuple(r1.shape) in shapes, op, f"r1 {list(r1.shape)}", f"one of {shapes}: full width, every angle twice")
    x[..., start:stop] = interleaved(x[..., start:stop], r1, r2).to(x.dtype)


@model("custom::inplace_partial_rotary_mul")
def inplace_partial_rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, *, rotary_mode: str, partial_slice: list[int]) -> None:
    """Rotate channels partial_slice of x [b, s, n, d] in place; r1 cos, r2 sin [b, 1|s, 1, L]. The inverse needs -sin."""
    _inplace("inplace_partial_rotary_mul", x, r1, r2, rotary_mode, partial_slice)


@model("cann_ops_transformer::inplace_partial_rotary_mul")
def cann_inplace_partial_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, *, rotary_mode: str = "interleave", partial_slice: tuple[int, ...] = (0, 0)
) -> None:
    """The same; the default slice [0, 0] rotates nothing."""
    _inplace("inplace_partial_rotary_mul", x, r1, r2, rotary_mode, list(partial_slice))


def _batch_times_heads(x: Tensor, r: Tensor) -> list[int]:
    """B*N under each documented layout (BNSD, BSND, SBND) that the shape of cos fits."""
    sizes, table = x.shape, r.shape
    fits = []
    for batch, heads, sequence in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        if table[heads] == 1 and table[sequence] == sizes[sequence] and table[batch] in (1, sizes[batch]):
            fits.append(sizes[batch] * sizes[heads])
    return fits


@model("npu::npu_rotary_mul")
def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """Rotate the whole last dimension of a 4-D input. The default mode "half" pairs i with i + D/2: wrong for V4."""
    op = "npu_rotary_mul"
    require(input.dim() == 4 and r1.dim() == 4, op, f"input {list(input.shape)}, r1 {list(r1.shape)}", "4 dimensions")
    require_dtype(op, "input", input, *FLOATS)
    require(r1.dtype == r2.dtype and r1.shape == r2.shape, op, f"r1 {list(r1.shape)}, r2 {list(r2.shape)}", "one type and shape")
    require(rotary_mode in ("half", "interleave"), op, f"rotary_mode {rotary_mode!r}", "'half' or 'interleave'")
    require(rotate is None, op, "rotate given", "rotate None")
    width = input.shape[-1]
    require(r1.shape[-1] == width, op, f"r1 {list(r1.shape)}", f"last dimension {width}, every angle twice")
    require(width < 896 and width % 2 == 0, op, f"D = {width}", "D even and below 896")
    products = _batch_times_heads(input, r1)
    require(bool(products), op, f"r1 {list(r1.shape)} for input {list(input.shape)}", "cos that matches BNSD, BSND or SBND")
    require(min(products) < 1000, op, f"B*N = {min(products)}", "B*N below 1000")
    if rotary_mode == "interleave":
        return interleaved(input, r1, r2).to(input.dtype)
    low, high = input.float().chunk(2, -1)
    return (input.float() * r1.float() + torch.cat((-high, low), -1) * r2.float()).to(input.dtype)
