"""Products with quantised or transposed operands. Shapes: m rows, k inputs, n outputs, b batches."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, needed, require, require_dtype, require_shape, soc
from tools.npu_standin.models.blocks import MX_BLOCK, mx_values
from tools.npu_standin.models.codes import FP4_E2M1, type_of

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OP = "npu_quant_matmul"


def _int8(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    kind: torch.dtype,
) -> Tensor:
    """int8 x int8 with scale [n] or [1] per column and pertoken_scale fp32 [m] per row."""
    require_dtype(OP, "x2", x2, torch.int8)
    n, m = x2.shape[-1], x1.shape[-2]
    require(scale.dim() == 1 and scale.shape[0] in (1, n), OP, f"scale {list(scale.shape)}", f"[{n}] or [1]")
    require(offset is None, OP, "offset", "None (not modelled)")
    require(kind in (torch.bfloat16, torch.float16), OP, f"output_dtype {kind}",
            "bf16 or fp16, passed explicitly (the default int8 needs a packed scale and is not modelled)")  # fmt: skip
    sums = x1.double() @ x2.double()
    if kind == torch.bfloat16:
        require_dtype(OP, "scale", scale, torch.bfloat16, torch.float32)
    else:
        require(pertoken_scale is not None and scale.dtype == torch.float32, OP, f"fp16 output with a scale of {scale.dtype}",
                "fp32 scale with pertoken_scale; without one a scale packed by npu_trans_quant_param, which is not modelled")  # fmt: skip
    if bias is not None:
        require_dtype(OP, "bias", bias, torch.int32, torch.bfloat16, torch.float32)
        require_shape(OP, "bias", bias, n)
        sums = sums + bias if bias.dtype == torch.int32 else sums
    y = sums.float() * scale.float()
    if pertoken_scale is not None:
        require_dtype(OP, "pertoken_scale", pertoken_scale, torch.float32)
        require_shape(OP, "pertoken_scale", pertoken_scale, m)
        y = y * pertoken_scale[:, None]
    return (y if bias is None or bias.dtype == torch.int32 else y + bias.float()).to(kind)


def _mx(x1: Tensor, x2: Tensor, scale: Tensor, row_scale: Tensor, first: torch.dtype | str, second: torch.dtype | str) -> Tensor:
    """x1 [m, k] (fp4: [m, k/2]) and x2 [k, n] (fp4: a transposed view of [n, k/2]); scale [k/64, n, 2], row_scale [m, k/64, 2]."""
    n = x2.shape[1]
    require_shape(OP, "scale", scale, None, n, 2)
    alike = scale.shape[0] == 1 or x2.is_contiguous() == scale.is_contiguous()
    require(alike, OP, f"x2 {x2.stride()} and scale {scale.stride()}", "both transposed views, or neither: torch_npu's host code checks it")
    alike = x1.is_contiguous() == row_scale.is_contiguous()
    require(alike, OP, f"x1 {x1.stride()} and pertoken_scale {row_scale.stride()}", "both transposed views, or neither: the host code checks it")
    return mx_values(x1, row_scale, first) @ mx_values(x2.T, scale.transpose(0, 1), second).T


def _blocked(x1: Tensor, x2: Tensor, scale: Tensor, row_scale: Tensor) -> Tensor:
    """fp8 with scale fp32 [k/128, n/128] and row_scale fp32 [m, k/128]."""
    (m, k), n = x1.shape, x2.shape[1]
    require_dtype(OP, "scale", scale, torch.float32)
    require_dtype(OP, "pertoken_scale", row_scale, torch.float32)
    require_shape(OP, "scale", scale, -(-k // 128), -(-n // 128))
    require_shape(OP, "pertoken_scale", row_scale, m, -(-k // 128))
    wide = scale.repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    return (x1.float() * row_scale.repeat_interleave(128, 1)[:, :k]) @ (x2.float() * wide)


@model("npu::npu_quant_matmul")
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """x1 [m, k] times x2 [k, n]. output_dtype defaults to int8. int8 x int8 everywhere; on 950 fp8 and fp4 with group_sizes.

    group_sizes [1, 1, 32]: MX, both scales e8m0 (scale_dtype = pertoken_scale_dtype = 293); [1, 128, 128]: fp8 blocks with fp32 scales.
    """
    first = type_of(x1_dtype) if x1_dtype is not None else x1.dtype
    second = type_of(x2_dtype) if x2_dtype is not None else x2.dtype
    require(x1.dim() == 2 and x2.dim() == 2, OP, f"x1 {list(x1.shape)}, x2 {list(x2.shape)}", "[m, k] and [k, n]")
    require(
        max(x1.shape[1], x2.shape[0], x2.shape[1]) <= 65535,
        OP,
        f"x1 {list(x1.shape)}, x2 {list(x2.shape)}",
        "last dimensions up to 65535",
    )
    require(x1.shape[1] == x2.shape[0], OP, f"k = {x1.shape[1]} in x1 and {x2.shape[0]} in x2", "equal k")
    require(y_scale is None, OP, "y_scale", "None (not modelled)")
    kind = type_of(1 if output_dtype is None else output_dtype)
    require(isinstance(kind, torch.dtype), OP, f"output_dtype {kind}", "a torch type")
    assert isinstance(kind, torch.dtype)
    if first == torch.int8:
        require(not group_sizes, OP, f"group_sizes {group_sizes}", "none with int8")
        return _int8(x1, x2, scale, pertoken_scale, bias, offset, kind)
    require(soc() not in OLDER, OP, f"{first} x {second} on {soc()}", "int8 x int8 on A2 and A3")
    require(
        first in (*FP8, FP4_E2M1) and second in (*FP8, FP4_E2M1),
        OP,
        f"{first} x {second}",
        "fp8 or fp4 (uint8 with x1_dtype, x2_dtype)",
    )
    require(offset is None and bias is None, OP, "offset or bias", "neither (not modelled)")
    require(
        kind in (torch.bfloat16, torch.float16, torch.float32),
        OP,
        f"output_dtype {kind}",
        "bf16, fp16 or fp32, passed explicitly",
    )
    rows = needed(OP, "pertoken_scale", pertoken_scale)
    if list(group_sizes or ()) == [1, 1, MX_BLOCK]:
        codes = (scale_dtype, pertoken_scale_dtype)
        require(
            None not in codes and all(type_of(c or 0) == torch.float8_e8m0fnu for c in codes),
            OP,
            f"scale types {codes}",
            "293, 293",
        )
        return _mx(x1, x2, scale, rows, first, second).to(kind)
    legal = list(group_sizes or ()) == [1, 128, 128] and first in FP8
    require(legal, OP, f"group_sizes {group_sizes} for {first}", "[1, 1, 32], or [1, 128, 128] for fp8")
    return _blocked(x1, x2, scale, rows).to(kind)


@model("npu::npu_transpose_batchmatmul")
def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: list[int] | None = None,
    perm_x2: list[int] | None = None,
    perm_y: list[int] | None = None,
    batch_split_factor: int | None = 1,
) -> Tensor:
    """permute(input, perm_x1) [b, m, k] times permute(weight, perm_x2) [b, k, n], as [m, b, n]: perm_y is always [1, 0, 2].

    k and n are multiples of 16, k*b is below 65536.
    """
    op = "npu_transpose_batchmatmul"
    require(input.dim() == 3 and weight.dim() == 3, op, f"{list(input.shape)} and {list(weight.shape)}", "3 dimensions")
    require_dtype(op, "input", input, torch.bfloat16, torch.float16, torch.float32)
    require_dtype(op, "weight", weight, input.dtype)
    require(
        bias is None and scale is None and batch_split_factor in (None, 1),
        op,
        "bias, scale or batch_split_factor",
        "none (not modelled)",
    )
    left = input.permute(perm_x1 or (0, 1, 2))
    right = weight.permute(perm_x2 or (0, 1, 2))
    (b, _, k), n = left.shape, right.shape[2]
    require(right.shape[:2] == (b, k), op, f"{list(left.shape)} times {list(right.shape)}", "[b, m, k] times [b, k, n]")
    require(k % 16 == 0 and n % 16 == 0, op, f"k = {k}, n = {n}", "multiples of 16")
    require(k * b < 65536, op, f"k*b = {k * b}", "below 65536 (V4-Flash: 32768; V4-Pro's 65536 does not fit)")
    require(perm_y is None or list(perm_y) == [1, 0, 2], op, f"perm_y {perm_y}", "[1, 0, 2]")
    return (left.float() @ right.float()).to(input.dtype).transpose(0, 1).contiguous()
