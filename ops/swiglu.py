"""The clamped SwiGLU of routed and shared experts.

Shapes: gate_up [T, 2I] with the gate first, row_weight [T].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes

_SILU_LIPSCHITZ = 1.1


def check_limit(op: str, limit: float) -> None:
    """ValueError unless the clamp limit is finite and positive."""
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"{op}: limit is {limit}, expected a finite number above 0 (swiglu_limit of the configuration)")


def subnormal(dtype: torch.dtype) -> float:
    """Error of rounding to `dtype` below its smallest normal number, where the unit roundoff does not hold (fp16: 3e-8)."""
    return torch.finfo(dtype).smallest_normal * bounds.roundoff(dtype)


def activation(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) in the type of gate_up [.., 2I]; returns [.., I]."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _clamped_swiglu(
    gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None, compute: torch.dtype = torch.float32
) -> Tensor:
    """h = silu(min(gate, limit)) * clamp(up, -limit, limit) * row_weight; fp32 inside, one rounding at the end.

    gate_up_T2I [T, 2I] any float type, gate in the first half; row_weight fp32 [T] or None for 1. The gate has no lower
    clamp. Returns [T, I] in gate_up's type. Source: DeepSeek-V4 specification section 9.
    ValueError for an odd width, a row_weight of another shape or type, a limit that is not finite and positive.
    """
    h_TI = activation(gate_up_T2I.to(compute), limit)
    return h_TI if row_weight is None else h_TI * row_weight.to(compute)[:, None]


def _clamped_swiglu_meta(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
    check_limit("clamped_swiglu", limit)
    if not gate_up_T2I.is_floating_point():
        raise ValueError(f"clamped_swiglu: gate_up is {gate_up_T2I.dtype}, expected a floating type")
    if gate_up_T2I.dim() != 2 or gate_up_T2I.shape[1] % 2:
        raise ValueError(f"clamped_swiglu: gate_up has shape {tuple(gate_up_T2I.shape)}, expected [T, 2I]")
    rows, width = gate_up_T2I.shape
    if row_weight is not None and (row_weight.shape != (rows,) or row_weight.dtype != torch.float32):
        found = f"{row_weight.dtype} {tuple(row_weight.shape)}"
        raise ValueError(f"clamped_swiglu: row_weight is {found}, expected torch.float32 ({rows},), one per row")
    return torch.empty((rows, width // 2), dtype=gate_up_T2I.dtype, device="meta")


def swiglu_error(gate_up: Tensor, error: Tensor | float, row_weight: Tensor | None, limit: float) -> tuple[Tensor, Tensor]:
    """h [.., I] in float64 and its error in fp32, given the error of gate_up [.., 2I]."""
    gate, up = gate_up.double().chunk(2, -1)
    e_gate, e_up = torch.as_tensor(error, dtype=torch.float64).expand(gate_up.shape).chunk(2, -1)
    up = up.clamp(-limit, limit)
    silu = torch.nn.functional.silu(gate.clamp(max=limit))
    weight = torch.ones(()) if row_weight is None else row_weight.double()[:, None]
    h = silu * up * weight
    # clamps do not enlarge an error; exp of a rounded argument errs by u|gate| of its value, and underflows to 0 near -88
    carried = _SILU_LIPSCHITZ * e_gate * (up.abs() + e_up) + silu.abs() * e_up
    rounded = bounds.SPREAD * bounds.roundoff(torch.float32) * (gate.abs() + 4) * h.abs()
    underflow = 128 * limit * torch.finfo(torch.float32).tiny
    return h, (carried + underflow) * weight.abs() + rounded


def _clamped_swiglu_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in {"zero": (0, 16), "one": (1, 16), "odd": (5, 7), "flash": (2, 2048), "pro": (1, 3072)}.items():
        x = (6 * torch.randn(shape[0], 2 * shape[1], generator=g)).to(dtype)
        yield Sample(name, (x,), {"limit": 10.0}, (name, "clamp"))
        weight = torch.rand(shape[0], generator=g)
        yield Sample(f"{name}-weighted", (x,), {"limit": 10.0, "row_weight": weight}, (name, "clamp"))
    edge = torch.tensor([-200.0, -95.0, -88.9, -87.0, -10.5, -10.0, 0.0, 9.5, 10.0, 10.5, 300.0])
    x = torch.cartesian_prod(edge, edge).to(dtype)
    yield Sample("edges", (x,), {"limit": 10.0}, ("clamp", "edges"))
    yield Sample("narrow", (x / 16,), {"limit": 0.6}, ("clamp",))


def _clampedswiglu_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x = torch.zeros(3, 8, dtype=dtype)
    yield WrongInput("odd-width", (x[:, :7],), {"limit": 10.0}, r"gate_up has shape \(3, 7\), expected \[T, 2I\]")
    yield WrongInput("limit", (x,), {"limit": 0.0}, r"limit is 0.0, expected a finite number above 0")
    yield WrongInput("limit-nan", (x,), {"limit": math.nan}, r"limit is nan")
    yield WrongInput("weight-length", (x,), {"limit": 1.0, "row_weight": torch.ones(2)}, r"row_weight is torch.float32 \(2,\)")
    yield WrongInput("weight-type", (x,), {"limit": 1.0, "row_weight": torch.ones(3).double()}, r"row_weight is torch.float64")
    yield WrongInput("integer", (x.int(),), {"limit": 1.0}, r"gate_up is torch.int32")


def _clamped_swiglu_cost(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Cost:
    read = tensors_bytes(gate_up_T2I, row_weight)
    return Cost(0, 4 * gate_up_T2I.numel(), read, tensors_bytes(gate_up_T2I) // 2, "fp32")


def _clamped_swiglu_bound(
    gate_up_T2I: Tensor,
    *,
    limit: float,
    row_weight: Tensor | None = None,
    golden: tuple[Tensor, ...],
    found: tuple[Tensor, ...],
) -> tuple[Tensor]:
    return (swiglu_error(gate_up_T2I, 0.0, row_weight, limit)[1] + subnormal(gate_up_T2I.dtype),)


clamped_swiglu = Contract(
    name="clamped_swiglu",
    reference=_clamped_swiglu,
    meta=_clamped_swiglu_meta,
    samples=_clamped_swiglu_samples,
    errors=_clampedswiglu_errors,
    bound=_clamped_swiglu_bound,
    cost=_clamped_swiglu_cost,
)
