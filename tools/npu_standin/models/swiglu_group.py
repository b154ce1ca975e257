"""Fused activations of 950 with a clamp and grouped rows, and of the wheel without one. Shapes: M rows, H outputs per row (inputs 2H)."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, poison, require, require_dtype, require_shape, undefined
from tools.npu_standin.models.blocks import LARGEST, cast, mx_quantised
from tools.npu_standin.models.grouped import group_slices
from tools.npu_standin.models.rounding import int8_per_row
from tools.npu_standin.models.swiglu import PLAIN, Activation, group_of_rows

FP32_PER_128, MX = 0, 1


@model("custom::npu_swiglu_group_quant", socs=("950",))
def npu_swiglu_group_quant(
    x: Tensor,
    *,
    weight: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: torch.dtype,
    quant_mode: int = 0,
    block_size: int = 0,
    round_scale: bool = False,
    clamp_limit: float | None = None,
    output_origin: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [M, H], scales and the activation in bf16 (undefined without output_origin); the gate is the first half.

    quant_mode 0: fp32 scales [M, H/128], round_scale False; 1: e8m0 scales [M, H/64, 2], round_scale True. Without clamp_limit nothing is
    clamped. Rows behind sum(group_index) are undefined.
    """
    op = "npu_swiglu_group_quant"
    require_shape(op, "x", x, None, None)
    require_dtype(op, "x", x, torch.bfloat16, torch.float16)
    width = x.shape[1] // 2
    require(x.shape[1] % 256 == 0, op, f"{x.shape[1]} inputs per row", "a multiple of 256")
    require(dst_type in (torch.float8_e4m3fn, torch.float8_e5m2), op, f"dst_type {dst_type}", "fp8")
    require(weight is None and block_size == 0, op, "weight or block_size", "neither (not modelled)")
    require((quant_mode, round_scale) in ((FP32_PER_128, False), (MX, True)), op, f"quant_mode {quant_mode}, round_scale {round_scale}",
            "0 without round_scale, or 1 with it")  # fmt: skip
    limit = torch.finfo(torch.float32).max if clamp_limit is None else clamp_limit
    y = Activation(True, PLAIN if clamp_limit is None else 1, limit, 1.0, 0.0)(op, x.float())
    if quant_mode == MX:
        codes, scales = mx_quantised(y, dst_type, round_up=True)
    else:
        blocks = y.unflatten(1, (width // 128, 128))
        scales = blocks.abs().amax(-1) / LARGEST[dst_type]
        codes = cast(torch.where(scales[..., None] > 0, blocks / scales[..., None], torch.zeros_like(blocks)), dst_type).flatten(
            1
        )
    origin = y.to(torch.bfloat16) if output_origin else undefined(y.shape, torch.bfloat16)
    if group_index is not None:
        used = group_of_rows(op, group_index, x.shape[0]).numel()
        for tensor in (codes, scales, origin):
            poison(tensor[used:])
    return codes, scales, origin


@model("npu::npu_grouped_matmul_swiglu_quant_v2", socs=OLDER)
def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: list[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 [M, N/2] and scale fp32 [M] of silu(first half) * second half of the W8A8 product. There is no clamp: not V4's activation.

    int8 on A2 and A3; 950 has MX modes, which nothing here calls. The weight must be in FRACTAL_NZ there, which values do not show.
    """
    op = "npu_grouped_matmul_swiglu_quant_v2"
    extras = (smooth_scale, weight_assist_matrix, bias, x_dtype, weight_dtype, weight_scale_dtype, x_scale_dtype)
    require(
        not any(e is not None for e in extras) and len(weight) == len(weight_scale) == 1,
        op,
        "optional arguments",
        "none (not modelled)",
    )
    require(
        (dequant_mode, quant_mode, quant_dtype) == (0, 0, 1), op, f"modes {dequant_mode}, {quant_mode}, {quant_dtype}", "0, 0, 1"
    )
    require_dtype(op, "x", x, torch.int8)
    require_dtype(op, "weight", weight[0], torch.int8)
    require_shape(op, "weight", weight[0], None, x.shape[1], None)
    experts, _, columns = weight[0].shape
    require_shape(op, "weight_scale", weight_scale[0], experts, columns)
    require_dtype(op, "x_scale", x_scale, torch.float32)
    require_shape(op, "x_scale", x_scale, x.shape[0])
    codes, scales = undefined((x.shape[0], columns // 2), torch.int8), undefined((x.shape[0],), torch.float32)
    for e, first, end in group_slices(group_list, int(group_list_type or 0), x.shape[0], experts):
        product = (x[first:end].double() @ weight[0][e].double()).float() * weight_scale[0][e].float() * x_scale[first:end, None]
        gate, up = product.chunk(2, 1)
        codes[first:end], scales[first:end] = int8_per_row(torch.nn.functional.silu(gate) * up)
    return codes, scales
