"""SwiGLU with clamp, plain and quantised. Shapes: M rows, H outputs per row (inputs 2H), E groups of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, needed, poison, require, require_dtype, require_shape, soc, undefined
from tools.npu_standin.models.blocks import LARGEST, cast, mx_quantised
from tools.npu_standin.models.codes import type_of
from tools.npu_standin.models.rounding import int8_per_row

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PLAIN, CLAMPED, CLAMPED_HALVES = 0, 1, 2


@dataclass(frozen=True)
class Activation:
    """How a row of 2H becomes H: which half is the gate, whether values are clamped, and the constants of the clamped form.

    `alternating`: in mode 1 gate and up are the even and the odd channels, and mode 2 is the clamped form of halves (aclnnDequantSwigluQuantV2 and
    aclnnSwigluMxQuant of ops-nn); else mode 1 takes halves (cann-recipes' own copy).
    """

    left: bool
    mode: int
    limit: float
    alpha: float
    bias: float
    alternating: bool = False

    def __call__(self, op: str, wide: Tensor) -> Tensor:
        """fp32 [..., H]. Plain: silu(gate) * up. Clamped: gate from above, up on both sides; gate * sigmoid(alpha * gate) * (up + bias)."""
        require(wide.shape[-1] % 2 == 0, op, f"rows of {wide.shape[-1]}", "an even last dimension")
        first, second = (wide[..., 0::2], wide[..., 1::2]) if self.alternating and self.mode == CLAMPED else wide.chunk(2, -1)
        gate, up = (first, second) if self.left else (second, first)
        if self.mode == PLAIN:
            return torch.nn.functional.silu(gate) * up
        modes = (CLAMPED, CLAMPED_HALVES) if self.alternating else (CLAMPED,)
        require(self.mode in modes, op, f"swiglu_mode {self.mode}", f"0 or {modes}")
        require(math.isfinite(self.limit) and self.limit > 0, op, f"clamp_limit {self.limit}", "a finite limit above 0")
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.bias)


def group_of_rows(op: str, group_index: Tensor, rows: int) -> Tensor:
    """The group of each of the first sum(group_index) rows; group_index int64 [E] holds counts."""
    require_dtype(op, "group_index", group_index, torch.int64)
    require_shape(op, "group_index", group_index, None)
    legal = bool((group_index >= 0).all()) and int(group_index.sum()) <= rows
    require(legal, op, f"group_index {group_index.tolist()}", f"counts of at most {rows} rows")
    return torch.repeat_interleave(torch.arange(group_index.numel()), group_index)


def _dequantised(
    op: str, x: Tensor, weight_scale: Tensor | None, activation_scale: Tensor | None, group: Tensor | None
) -> Tensor:
    if x.dtype != torch.int32:
        require_dtype(op, "x", x, torch.bfloat16, torch.float16)
        require(
            weight_scale is None and activation_scale is None,
            op,
            "scales with a floating x",
            "x int32 with scales, or bf16 without",
        )
        return x.float()
    weight_scale = needed(op, "weight_scale (x is int32)", weight_scale)
    activation_scale = needed(op, "activation_scale (x is int32)", activation_scale)
    require_dtype(op, "weight_scale", weight_scale, torch.float32)
    require_dtype(op, "activation_scale", activation_scale, torch.float32)
    require(activation_scale.numel() == x.shape[0] and activation_scale.dim() in (1, 2), op,
            f"activation_scale {list(activation_scale.shape)}", f"[{x.shape[0]}] or [{x.shape[0]}, 1]")  # fmt: skip
    if group is None:
        require(
            weight_scale.numel() == x.shape[1],
            op,
            f"weight_scale {list(weight_scale.shape)}",
            f"[1, {x.shape[1]}] without group_index",
        )
        per_row = weight_scale.reshape(1, -1)
    else:
        require_shape(op, "weight_scale", weight_scale, None, x.shape[1])
        per_row = weight_scale[group]
    rows = x.shape[0] if group is None else group.numel()
    return x[:rows].float() * per_row * activation_scale.reshape(-1, 1)[:rows]


def _dequant_swiglu_quant(
    op: str, x: Tensor, weight_scale: Tensor | None, activation_scale: Tensor | None, bias: Tensor | None, quant_scale: Tensor | None,
    quant_offset: Tensor | None, group_index: Tensor | None, quant_mode: int, dst_type: int | None, act: Activation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    require_shape(op, "x", x, None, None)
    rows, width = x.shape[0], x.shape[1] // 2
    require(bias is None and quant_offset is None, op, "bias or quant_offset", "neither (not modelled)")
    require(width <= 5120, op, f"H = {width}", "H at most 5120")
    group = None
    if group_index is not None:
        require(width % 64 == 0, op, f"H = {width}", "H a multiple of 64 with group_index")
        group = group_of_rows(op, group_index, rows)
        if weight_scale is not None:
            require(
                weight_scale.shape[0] == group_index.numel(),
                op,
                f"weight_scale {list(weight_scale.shape)}",
                f"{group_index.numel()} groups",
            )
    wide = _dequantised(op, x, weight_scale, activation_scale, group)
    used = rows if group is None else group.numel()
    y = act(op, wide[:used])
    if quant_scale is not None:
        require(quant_scale.numel() % width == 0, op, f"quant_scale {list(quant_scale.shape)}", f"[E, {width}]")
        smooth = quant_scale.float().reshape(-1, width)
        y = y * (smooth[:1] if group is None or smooth.shape[0] == 1 else smooth[group])
    kind = type_of(1 if dst_type is None else dst_type)
    require(kind == torch.int8 or soc() not in OLDER, op, f"dst_type {kind} on {soc()}", "int8 on A2 and A3")
    require(quant_mode == 1, op, f"quant_mode {quant_mode}", "1 (dynamic; static needs quant_scale and is not modelled)")
    if kind == torch.int8:
        codes, scale = int8_per_row(y)
    else:
        require(kind in (torch.float8_e4m3fn, torch.float8_e5m2), op, f"dst_type {kind}", "int8 or fp8")
        scale = y.abs().amax(-1) / LARGEST[kind]
        codes = cast(torch.where(scale[:, None] > 0, y / scale[:, None], torch.zeros_like(y)), kind)
    result, scales = undefined((rows, width), codes.dtype), undefined((rows,), torch.float32)
    result[:used], scales[:used] = codes, scale
    return result, scales


@model("npu::npu_dequant_swiglu_quant")
def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """int8 [M, H] and scale fp32 [M]; rows behind sum(group_index) are undefined. The defaults are those of another model.

    On 950, without dst_type, round_mode and activate_dim, the host code takes a first version of the kernel which knows neither
    swiglu_mode nor the clamp: both are dropped in silence.
    """
    first_version = soc() == "950" and dst_type is None and round_mode is None and activate_dim is None
    require(activate_dim in (None, -1, x.dim() - 1), "npu_dequant_swiglu_quant", f"activate_dim {activate_dim}", "-1")
    require(round_mode in (None, 0), "npu_dequant_swiglu_quant", f"round_mode {round_mode}", "0 (to nearest)")
    act = Activation(activate_left, PLAIN if first_version else swiglu_mode, clamp_limit, glu_alpha, glu_bias, alternating=True)
    return _dequant_swiglu_quant(
        "npu_dequant_swiglu_quant",
        x,
        weight_scale,
        activation_scale,
        bias,
        quant_scale,
        quant_offset,
        group_index,
        quant_mode,
        dst_type,
        act,
    )


@model("custom::npu_dequant_swiglu_clamp_quant", socs=OLDER)
def npu_dequant_swiglu_clamp_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same arguments in another package, A2 and A3 only. Mode 1 takes halves here."""
    act = Activation(activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
    return _dequant_swiglu_quant(
        "npu_dequant_swiglu_clamp_quant",
        x,
        weight_scale,
        activation_scale,
        bias,
        quant_scale,
        quant_offset,
        group_index,
        quant_mode,
        dst_type,
        act,
    )


@model("npu::npu_clipped_swiglu", socs=OLDER)
def npu_clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + bias) with the clamps, [.., H] in the type of x. Default: gate and up alternate."""
    op = "npu_clipped_swiglu"
    require_dtype(op, "x", x, *FLOATS)
    require(dim in (-1, x.dim() - 1), op, f"dim {dim}", "the last dimension")
    wide = x.float()
    if interleaved:
        wide = torch.cat((wide[..., 0::2], wide[..., 1::2]), -1)
    y = Activation(True, CLAMPED, limit, alpha, bias)(op, wide).to(x.dtype)
    if group_index is not None:
        require_shape(op, "x", x, None, None)
        poison(y[group_of_rows(op, group_index, x.shape[0]).numel() :])
    return y


@model("npu::npu_swiglu")
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half, in the type of input. There is no clamp."""
    require_dtype("npu_swiglu", "input", input, *FLOATS)
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


@model("npu::npu_swiglu_mx_quant", socs=("950",))
def npu_swiglu_mx_quant(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    activate_dim: int = -1,
    activate_left: bool = False,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
    group_mode: int = 0,
    axis: int = -1,
    dst_type: int = 296,
    round_mode: str = "rint",
    scale_alg: int = 0,
    max_dtype_value: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """MX codes [.., H] (fp4: uint8 [.., H/2]) and scales uint8 [.., ceil(H/64), 2] of the activation; fp4 unless dst_type says otherwise."""
    op = "npu_swiglu_mx_quant"
    require_dtype(op, "x", x, torch.bfloat16, torch.float16)
    last = (-1, x.dim() - 1)
    require(activate_dim in last and axis in last, op, f"activate_dim {activate_dim}, axis {axis}", "the last dimension")
    require(group_mode == 0 and max_dtype_value == 0, op, f"group_mode {group_mode}, max_dtype_value {max_dtype_value}", "0")
    require(round_mode == "rint", op, f"round_mode {round_mode!r}", "'rint'")
    require(scale_alg in (0, 1), op, f"scale_alg {scale_alg}", "0 (OCP) or 1 (round up)")
    y = Activation(activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias, alternating=True)(op, x.float())
    codes, scales = mx_quantised(y, type_of(dst_type), round_up=scale_alg == 1)
    if group_index is not None:
        require_shape(op, "x", x, None, None)
        used = group_of_rows(op, group_index, x.shape[0]).numel()
        poison(codes[used:])
        poison(scales[used:])
    return codes, scales.view(torch.uint8)
