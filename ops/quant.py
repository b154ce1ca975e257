"""Quantisers of activations and their inverses: FP8 with power-of-two scales, MXFP8, INT8 per token, round trips, Hadamard.

Shapes: x [T, K]; a scale covers `group` consecutive channels of one token. E8M0 scales hold the exponent byte b of 2^(b-127).
FP4 codes are in ops/quant_fp4.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.quant_samples import roundtrip_samples, value_errors, value_samples, values

FP8_MAX = 448.0
MXFP8_FLOOR = 448.0 * 2.0**-127
"""The smallest scale that E8M0 holds, byte 0: that of a block of zeros."""

_E8M0 = torch.tensor([*(2.0 ** (b - 127) for b in range(255)), float("nan")], dtype=torch.float64)


def power_of_two_exponent(value: Tensor, largest: float) -> Tensor:
    """ceil(log2(value / largest)) as int32, exact: compares mantissas instead of taking a logarithm. value > 0."""
    m, e = torch.frexp(value.double())
    largest_mantissa, largest_exponent = math.frexp(largest)
    return e - largest_exponent + (m > largest_mantissa).to(torch.int32)


def e8m0_bytes(exponent: Tensor) -> Tensor:
    """E8M0 scales [..] of 2^exponent, exponents clamped to the storable -127..127."""
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def e8m0_values(scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^(b-127) of E8M0 bytes, exact in fp32 and fp64; byte 255 is NaN."""
    return _E8M0.to(scale.device, dtype)[scale.view(torch.uint8).long()]


def grouped(x: Tensor, group: int) -> Tensor:
    """[T, K] -> [T, ceil(K/group), group], a short last group padded with zeros."""
    pad = -x.shape[-1] % group
    return torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, group))


def _quant_fp8(
    x_TK: Tensor, *, group: int = 128, floor: float = 1e-4, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 codes and E8M0 scales per token and `group` channels: s = 2^ceil(log2(max(amax, floor)/448)), q = e4m3(x/s).

    x [T, K] any float type. Returns q float8_e4m3fn [T, K] (nearest even, clamped to +-448) and scale float8_e8m0fnu
    [T, ceil(K/group)]; a short last group counts as zero-padded. Exact: `compute` changes nothing. Source: specification
    section 10.3. ValueError for integer input.
    """
    g = grouped(x_TK.float(), group)
    exponent = power_of_two_exponent(g.abs().amax(-1).clamp(min=floor), FP8_MAX)
    codes = torch.ldexp(g, -exponent[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).flatten(-2)[..., : x_TK.shape[-1]].contiguous().view(torch.float8_e4m3fn), e8m0_bytes(exponent)


def _check_float(op: str, x: Tensor, dims: int | None = 2) -> None:
    if not x.is_floating_point() or x.element_size() < 2:
        raise ValueError(f"{op}: x is {x.dtype}, expected float32, bfloat16 or float16")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected {dims} dimensions [T, K]")


def _fp8_meta(x_TK: Tensor, *, group: int = 128, floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    _check_float("quant_fp8", x_TK)
    if group < 1 or floor <= 0:
        raise ValueError(f"quant_fp8: group {group} and floor {floor} must be positive")
    t, k = x_TK.shape
    return (
        torch.empty(t, k, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(t, -(-k // group), dtype=torch.float8_e8m0fnu, device="meta"),
    )


quant_fp8 = Contract(
    name="quant_fp8",
    reference=_quant_fp8,
    meta=_fp8_meta,
    samples=value_samples(group=128),
    errors=value_errors("quant_fp8"),
    bound=lambda x_TK, *, group=128, floor=1e-4, golden, found: (None, None),
    cost=lambda x_TK, *, group=128, floor=1e-4: Cost(
        0, 3 * x_TK.numel(), tensors_bytes(x_TK), x_TK.numel() + x_TK.shape[0] * -(-x_TK.shape[1] // group), "fp32"
    ),
)


def _dequant_fp8(
    q: Tensor, scale: Tensor, *, group: int = 128, dtype: torch.dtype, compute: torch.dtype = torch.float32
) -> Tensor:
    """q * 2^(scale byte - 127) per group of channels, one rounding to `dtype`.

    q float8_e4m3fn [T, K]; scale float8_e8m0fnu [T, ceil(K/group)]. Returns [T, K] in `dtype`. Source: specification
    section 10.3. ValueError for other types or a scale of another shape.
    """
    s = e8m0_values(scale, compute).repeat_interleave(group, dim=-1)[..., : q.shape[-1]]
    return q.to(compute) * s


def _dequant_meta(q: Tensor, scale: Tensor, *, group: int = 128, dtype: torch.dtype) -> Tensor:
    if q.dtype != torch.float8_e4m3fn or scale.dtype != torch.float8_e8m0fnu:
        raise ValueError(f"dequant_fp8: q is {q.dtype}, scale {scale.dtype}; expected float8_e4m3fn and float8_e8m0fnu")
    expected = (*q.shape[:-1], -(-q.shape[-1] // group))
    if tuple(scale.shape) != expected:
        raise ValueError(f"dequant_fp8: scale has shape {tuple(scale.shape)}, expected {expected} for groups of {group}")
    return torch.empty(q.shape, dtype=dtype, device="meta")


def _dequant_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for group in (128, 32):
        for name, x, tags in values(dtype, seed):
            yield Sample(f"{name}-{group}", _quant_fp8(x, group=group, floor=MXFP8_FLOOR), {"group": group, "dtype": dtype}, tags)


def _dequant_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    q, s = _quant_fp8(torch.ones(2, 256))
    yield WrongInput("scale-shape", (q, s[:, :1]), {"dtype": dtype}, r"scale has shape \(2, 1\), expected \(2, 2\)")
    yield WrongInput("scale-type", (q, s.view(torch.uint8)), {"dtype": dtype}, r"scale torch.uint8; expected")


dequant_fp8 = Contract(
    name="dequant_fp8",
    reference=_dequant_fp8,
    meta=_dequant_meta,
    samples=_dequant_samples,
    errors=_dequant_errors,
    bound=lambda q, scale, *, group=128, dtype, golden, found: (0.0,),
    cost=lambda q, scale, *, group=128, dtype: Cost(0, q.numel(), tensors_bytes(q, scale), q.numel() * dtype.itemsize, "fp32"),
)


def _dequant_block(w_NK: Tensor, scale: Tensor, *, dtype: torch.dtype, compute: torch.dtype = torch.float32) -> Tensor:
    """Checkpoint weight: e4m3(w[n, k]) * scale[n // 128, k // 128], one rounding to `dtype`.

    w float8_e4m3fn [N, K]; scale float8_e8m0fnu [ceil(N/128), ceil(K/128)]. Returns [N, K]. Source: specification section 10.3.
    ValueError for other types or a scale of another shape.
    """
    n, k = w_NK.shape
    s = e8m0_values(scale, compute).repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return w_NK.to(compute) * s


def _block_meta(w_NK: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    if w_NK.dtype != torch.float8_e4m3fn or scale.dtype != torch.float8_e8m0fnu:
        raise ValueError(f"dequant_fp8_block: w is {w_NK.dtype}, scale {scale.dtype}; expected float8_e4m3fn and float8_e8m0fnu")
    expected = tuple(-(-n // 128) for n in w_NK.shape)
    if w_NK.dim() != 2 or tuple(scale.shape) != expected:
        found = f"w is {tuple(w_NK.shape)}, scale {tuple(scale.shape)}"
        raise ValueError(f"dequant_fp8_block: {found}; expected a scale of {expected}")
    return torch.empty(w_NK.shape, dtype=dtype, device="meta")


def block_weight(n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random FP8 weight [n, k] with E8M0 scales of its 128 x 128 blocks."""
    w = (torch.randn(n, k, generator=generator) * 100).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    exponent = torch.randint(-10, -3, (-(-n // 128), -(-k // 128)), generator=generator)
    return w, e8m0_bytes(exponent)


def _block_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, n, k in (("zero", 0, 128), ("one", 128, 128), ("odd", 200, 72), ("flash", 512, 1024)):
        yield Sample(name, block_weight(n, k, g), {"dtype": dtype}, (name,))
    w, _ = block_weight(384, 640, g)
    exponent = torch.tensor([-110, -60, -30, -24, -20, -15, -1, 0, 1, 7, 15, 30, 60, 90, 110])
    exponent = torch.where(FP8_MAX * 2.0**exponent > torch.finfo(dtype).max, -exponent, exponent)
    yield Sample(
        "wide-scales", (w, e8m0_bytes(exponent[torch.randperm(15, generator=g)].view(3, 5))), {"dtype": dtype}, ("scales",)
    )
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[(every & 127) != 127].view(2, 127).view(torch.float8_e4m3fn)
    yield Sample("every-code", (finite, e8m0_bytes(torch.tensor([[-3]]))), {"dtype": dtype}, ("codes",))


def _block_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    w, s = block_weight(256, 128, torch.Generator().manual_seed(0))
    yield WrongInput("scale", (w, s[:1]), {"dtype": dtype}, r"expected a scale of \(2, 1\)")
    yield WrongInput("type", (w.float(), s), {"dtype": dtype}, r"w is torch.float32")


dequant_fp8_block = Contract(
    name="dequant_fp8_block",
    reference=_dequant_block,
    meta=_block_meta,
    samples=_block_samples,
    errors=_block_errors,
    bound=lambda w_NK, scale, *, dtype, golden, found: (0.0,),
    cost=lambda w_NK, scale, *, dtype: Cost(0, w_NK.numel(), tensors_bytes(w_NK, scale), w_NK.numel() * dtype.itemsize, "fp32"),
)


def _quant_mxfp8(x_TK: Tensor, *, compute: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """MXFP8: e4m3 codes with one E8M0 scale per 32 channels, the scale rule of quant_fp8 with floor 448 * 2^-127.

    x [T, K] float, K a multiple of 32. Returns float8_e4m3fn [T, K] and float8_e8m0fnu [T, K/32]; dequant_fp8(group=32) inverts. A block of
    zeros has the scale byte 0. Source: specification section 10.3 with groups of 32; blocks of zeros and of subnormal scale as the kernel of
    aclnnDynamicMxQuant has them (ops-nn, dynamic_mx_quant_tail_axis_fp8.h, ComputeScaleCublas). ValueError for other widths.
    """
    return _quant_fp8(x_TK, group=32, floor=MXFP8_FLOOR)


def check_groups(op: str, x: Tensor, group: int) -> None:
    """ValueError unless the last dimension is a multiple of `group`."""
    if x.shape[-1] % group:
        raise ValueError(f"{op}: the last dimension is {x.shape[-1]}, expected a multiple of {group}")


def _mxfp8_meta(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    _check_float("quant_mxfp8", x_TK)
    check_groups("quant_mxfp8", x_TK, 32)
    return _fp8_meta(x_TK, group=32)


quant_mxfp8 = Contract(
    name="quant_mxfp8",
    reference=_quant_mxfp8,
    meta=_mxfp8_meta,
    samples=value_samples(),
    errors=value_errors("quant_mxfp8"),
    bound=lambda x_TK, *, golden, found: (None, None),
    version=2,  # 1 had the floor 448 * 2^-126
    cost=lambda x_TK: Cost(0, 3 * x_TK.numel(), tensors_bytes(x_TK), x_TK.numel() * 33 // 32, "fp32"),
)


def _roundtrip_fp8(x: Tensor, *, group: int = 64, channels: int, compute: torch.dtype = torch.float32) -> Tensor:
    """Quantise and dequantise the first `channels` channels per `group` (rule of quant_fp8); the others are copied.

    x [..., C] float; returns x's type, bitwise defined. Source: specification section 10.4. ValueError when channels exceed C or
    are no multiple of the group.
    """
    head = x[..., :channels].reshape(-1, channels)
    back = _dequant_fp8(*_quant_fp8(head, group=group), group=group, dtype=x.dtype).to(x.dtype)
    return torch.cat((back.view(*x.shape[:-1], channels), x[..., channels:]), dim=-1)


def _roundtrip_meta(x: Tensor, *, group: int = 64, channels: int) -> Tensor:
    _check_float("roundtrip_fp8", x, None)
    if not 0 < channels <= x.shape[-1] or channels % group:
        raise ValueError(f"roundtrip_fp8: channels {channels} must be a multiple of {group}, at most the {x.shape[-1]} of x")
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _roundtrip_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    yield WrongInput("channels", (torch.zeros(2, 64, dtype=dtype),), {"channels": 128}, r"channels 128 must be a multiple of 64")


roundtrip_fp8 = Contract(
    name="roundtrip_fp8",
    reference=_roundtrip_fp8,
    meta=_roundtrip_meta,
    samples=roundtrip_samples,
    errors=_roundtrip_errors,
    bound=lambda x, *, group=64, channels, golden, found: (None,),
    cost=lambda x, *, group=64, channels: Cost(0, 4 * x.numel(), tensors_bytes(x), tensors_bytes(x), "fp32"),
)


from ops.quant_fp4 import (  # noqa: E402  - the FP4 half builds on this file
    dequant_int8,
    dequant_mxfp4,
    hadamard,
    quant_int8,
    quant_mxfp4,
    roundtrip_fp4,
)

__all__ = ["dequant_fp8", "dequant_fp8_block", "dequant_int8", "dequant_mxfp4", "hadamard", "quant_fp8", "quant_int8"]
__all__ += ["quant_mxfp4", "quant_mxfp8", "roundtrip_fp4", "roundtrip_fp8"]
