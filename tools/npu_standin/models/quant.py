"""Dynamic quantisation of activations. Shapes: T rows, D channels, E groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, require, require_dtype, require_shape, soc
from tools.npu_standin.models.blocks import LARGEST, cast, mx_quantised, mx_values
from tools.npu_standin.models.codes import FP4_E2M1, type_of
from tools.npu_standin.models.rounding import int8_per_row

FLOATS = (torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _target(op: str, dst_type: int, *allowed: torch.dtype | str) -> torch.dtype | str:
    kind = type_of(dst_type)
    legal = (torch.int8,) if soc() in OLDER else allowed
    require(kind in legal, op, f"dst_type {dst_type} ({kind}) on {soc()}", f"{' or '.join(map(str, legal))}")
    return kind


def scaled(wide: Tensor, amax: Tensor, kind: torch.dtype | str, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes of wide / scale and scale = amax / largest of the type (at least `least`); amax broadcasts against wide."""
    scale = (amax / (127 if kind == torch.int8 else LARGEST[kind])).clamp_min(least)
    values = torch.where(scale > 0, wide / scale, torch.zeros_like(wide))
    codes = values.round().clamp(-128, 127).to(torch.int8) if kind == torch.int8 else cast(values, kind)
    return codes, scale


@model("npu::npu_dynamic_quant")
def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """int8 (950: also fp8) like input and scale fp32 without the last dimension, max / 127 (fp8: max / largest): multiply to dequantise."""
    op = "npu_dynamic_quant"
    require_dtype(op, "input", input, *FLOATS)
    require(input.dim() >= 2, op, f"input {list(input.shape)}", "at least 2 dimensions")
    require(
        quant_mode == "pertoken" and dst_type_max == 0, op, f"quant_mode {quant_mode!r}", "'pertoken' (others are not modelled)"
    )
    require(group_index is None, op, "group_index", "None (not modelled)")
    kind = _target(op, 1 if dst_type is None else dst_type, torch.int8, *FP8)
    wide = input.float()
    if smooth_scales is not None:
        require_shape(op, "smooth_scales", smooth_scales, input.shape[-1])
        require_dtype(op, "smooth_scales", smooth_scales, input.dtype)
        wide = wide * smooth_scales.float()
    if kind == torch.int8:
        return int8_per_row(wide)
    codes, scale = scaled(wide, wide.abs().amax(-1, keepdim=True), kind)
    return codes, scale[..., 0]


@model("npu::npu_dynamic_block_quant")
def npu_dynamic_block_quant(
    x: Tensor,
    *,
    min_scale: float = 0.0,
    round_mode: str = "rint",
    dst_type: int = 1,
    row_block_size: int = 1,
    col_block_size: int = 128,
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codes like x [.., M, K] and scales fp32 [.., ceil(M/rows), ceil(K/columns)] of blocks. The default type is int8, also on 950."""
    op = "npu_dynamic_block_quant"
    require_dtype(op, "x", x, *FLOATS)
    require(x.dim() in (2, 3), op, f"x {list(x.shape)}", "[M, K] or [B, M, K]")
    require(
        round_mode == "rint" and dst_type_max == 0, op, f"round_mode {round_mode!r}, dst_type_max {dst_type_max}", "'rint', 0"
    )
    kind = _target(op, dst_type, *FP8)
    size = (row_block_size, col_block_size)
    legal = ((1, 128),) if soc() in OLDER else ((1, 128), (128, 128))
    require(size in legal, op, f"blocks {size}", f"{legal}")
    m, k = x.shape[-2:]
    rows, columns = -(-m // size[0]), -(-k // size[1])
    wide = torch.nn.functional.pad(x.float(), (0, columns * size[1] - k, 0, rows * size[0] - m))
    blocks = wide.unflatten(-1, (columns, size[1])).unflatten(-3, (rows, size[0]))
    codes, scale = scaled(blocks, blocks.abs().amax((-3, -1), keepdim=True), kind, min_scale)
    return codes.flatten(-4, -3).flatten(-2)[..., :m, :k].contiguous(), scale[..., 0, :, 0].contiguous()


@model("npu::npu_dynamic_mx_quant", socs=("950",))
def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = 296,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """MX codes and scales uint8 [.., ceil(K/64), 2]. The default type is fp4, uint8 [.., K/2]; scale_alg 0 floors the exponent, 1 rounds up."""
    op = "npu_dynamic_mx_quant"
    require_dtype(op, "input", input, *FLOATS)
    require(axis in (-1, input.dim() - 1) and block_size == 32, op, f"axis {axis}, block_size {block_size}", "the last axis, 32")
    require(
        round_mode == "rint" and dst_type_max == 0 and max_low_bound == 0,
        op,
        f"round_mode {round_mode!r}, or bounds",
        "'rint', 0",
    )
    require(scale_alg in (0, 1), op, f"scale_alg {scale_alg}", "0 or 1")
    kind = type_of(dst_type)
    require(kind in (*FP8, FP4_E2M1), op, f"dst_type {dst_type} ({kind})", "fp8 or fp4")
    codes, scales = mx_quantised(input, kind, round_up=scale_alg == 1)
    return codes, scales.view(torch.uint8)


@model("npu::npu_anti_mx_quant", socs=("950",))
def npu_anti_mx_quant(
    x: Tensor, mxscale: Tensor, *, axis: int | None = -1, dst_type: int | None = 15, src_type: int | None = 292
) -> Tensor:
    """Values of MX codes in dst_type, bf16 unless told otherwise; src_type names what the bytes are, e4m3 unless told otherwise."""
    op = "npu_anti_mx_quant"
    require(axis in (-1, x.dim() - 1), op, f"axis {axis}", "the last axis")
    kind, target = type_of(292 if src_type is None else src_type), type_of(15 if dst_type is None else dst_type)
    require(kind in (*FP8, FP4_E2M1), op, f"src_type {src_type}", "fp8 or fp4")
    require(target in (*FLOATS, torch.float32), op, f"dst_type {dst_type}", "a floating type")
    assert isinstance(target, torch.dtype)
    stored = torch.uint8 if isinstance(kind, str) else kind
    require_dtype(op, "x", x, stored, torch.uint8)
    require_dtype(op, "mxscale", mxscale, torch.uint8, torch.float8_e8m0fnu)
    return mx_values(x.view(stored) if x.dtype != stored else x, mxscale, kind).to(target)


@model("npu::npu_format_cast")
def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The same values in another storage format (29: FRACTAL_NZ); what it looks like in memory is not modelled."""
    require(acl_format in (2, 29), "npu_format_cast", f"acl_format {acl_format}", "2 (ND) or 29 (FRACTAL_NZ)")
    return input.clone()
