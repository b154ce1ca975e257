"""FP4 (e2m1) quantiser, INT8 per token, their inverses, and the Hadamard rotation in front of the FP4 index.

Shapes: x [T, K]. FP4 codes are packed two a byte: channel 2c in the low nibble, 2c+1 in the high one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.quant import (
    _check_float,
    check_groups,
    e8m0_bytes,
    e8m0_values,
    grouped,
    power_of_two_exponent,
)
from ops.quant_samples import value_errors, value_samples, values

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_FLOOR = 6.0 * 2.0**-126
# halfway points; the flag says whether a tie goes up, to the even code
_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def fp4_codes(x: Tensor) -> Tensor:
    """Nearest e2m1 code (0..15, bit 3 the sign) of each element, ties to the even code, values beyond 6 saturated."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for point, up in _MIDPOINTS:
        code += (magnitude >= point) if up else (magnitude > point)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def fp4_values(code: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Value of each e2m1 code 0..15."""
    table = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], dtype=dtype, device=code.device)
    return table[code.long()]


def unpack_fp4(packed: Tensor) -> Tensor:
    """Codes [..., 2K] of packed bytes [..., K], low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _quant_mxfp4(x_TK: Tensor, *, compute: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """MXFP4: s = 2^ceil(log2(max(amax, 6*2^-126)/6)) per 32 channels, x/s to e2m1 nearest even, clamped to +-6.

    x [T, K] float, K a multiple of 32. Returns packed codes uint8 [T, K/2] and scale float8_e8m0fnu [T, K/32]. Exact.
    Source: specification section 7. ValueError for other widths or integer input.
    """
    g = grouped(x_TK.float(), 32)
    exponent = power_of_two_exponent(g.abs().amax(-1).clamp(min=FP4_FLOOR), 6.0)
    codes = fp4_codes(torch.ldexp(g, -exponent[..., None])).flatten(-2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), e8m0_bytes(exponent)


def _mxfp4_meta(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    _check_float("quant_mxfp4", x_TK)
    check_groups("quant_mxfp4", x_TK, 32)
    t, k = x_TK.shape
    return (
        torch.empty(t, k // 2, dtype=torch.uint8, device="meta"),
        torch.empty(t, k // 32, dtype=torch.float8_e8m0fnu, device="meta"),
    )


quant_mxfp4 = Contract(
    name="quant_mxfp4",
    reference=_quant_mxfp4,
    meta=_mxfp4_meta,
    samples=value_samples(),
    errors=value_errors("quant_mxfp4"),
    bound=lambda x_TK, *, golden, found: (None, None),
    cost=lambda x_TK: Cost(0, 4 * x_TK.numel(), tensors_bytes(x_TK), x_TK.numel() * 17 // 32, "fp32"),
)


def _dequant_mxfp4(q: Tensor, scale: Tensor, *, dtype: torch.dtype, compute: torch.dtype = torch.float32) -> Tensor:
    """e2m1 value times 2^(scale byte - 127) per 32 channels, one rounding to `dtype`.

    q uint8 [..., K/2] packed low nibble first; scale float8_e8m0fnu [..., K/32]. Returns [..., K]. Source: specification
    section 10.3. ValueError for other types or shapes.
    """
    values_ = fp4_values(unpack_fp4(q), compute).unflatten(-1, (-1, 32)) * e8m0_values(scale, compute)[..., None]
    return values_.flatten(-2)


def _demx_meta(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    if q.dtype != torch.uint8 or scale.dtype != torch.float8_e8m0fnu:
        found = f"q is {q.dtype}, scale {scale.dtype}"
        raise ValueError(f"dequant_mxfp4: {found}; expected uint8 (view int8 codes) and float8_e8m0fnu")
    expected = (*q.shape[:-1], q.shape[-1] // 16)
    if q.shape[-1] % 16 or tuple(scale.shape) != expected:
        raise ValueError(f"dequant_mxfp4: q is {tuple(q.shape)}, scale {tuple(scale.shape)}; expected a scale of {expected}")
    return torch.empty(*q.shape[:-1], 2 * q.shape[-1], dtype=dtype, device="meta")


def _demx_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, tags in values(dtype, seed):
        yield Sample(name, _quant_mxfp4(x), {"dtype": dtype}, tags)
    every = torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(2, 1)
    lowest = -20 if dtype == torch.float16 else -16
    yield Sample("every-byte", (every, e8m0_bytes(torch.arange(32).view(2, 16) + lowest)), {"dtype": dtype}, ("codes",))


def _demx_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    q, s = _quant_mxfp4(torch.ones(2, 64))
    yield WrongInput("scale", (q, s[:, :1]), {"dtype": dtype}, r"expected a scale of \(2, 2\)")
    yield WrongInput("type", (q.view(torch.int8), s), {"dtype": dtype}, r"q is torch.int8.*view int8 codes")


dequant_mxfp4 = Contract(
    name="dequant_mxfp4",
    reference=_dequant_mxfp4,
    meta=_demx_meta,
    samples=_demx_samples,
    errors=_demx_errors,
    bound=lambda q, scale, *, dtype, golden, found: (0.0,),
    cost=lambda q, scale, *, dtype: Cost(0, 2 * q.numel(), tensors_bytes(q, scale), 2 * q.numel() * dtype.itemsize, "fp32"),
)


def _roundtrip_fp4(x: Tensor, *, group: int = 32, compute: torch.dtype = torch.float32) -> Tensor:
    """Quantise to MXFP4 per 32 channels of the last dimension and back, in x's type; bitwise defined.

    x [..., K] float, K a multiple of 32. Source: specification section 7. ValueError for other widths or groups.
    """
    flat = x.reshape(-1, x.shape[-1])
    return _dequant_mxfp4(*_quant_mxfp4(flat), dtype=x.dtype).to(x.dtype).view(x.shape)


def _roundtrip_meta(x: Tensor, *, group: int = 32) -> Tensor:
    _check_float("roundtrip_fp4", x, None)
    if group != 32:
        raise ValueError(f"roundtrip_fp4: group is {group}, expected 32, the MXFP4 group")
    check_groups("roundtrip_fp4", x, group)
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _roundtrip_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    yield WrongInput("width", (torch.zeros(2, 40, dtype=dtype),), {}, r"last dimension is 40, expected a multiple of 32")
    yield WrongInput("group", (torch.zeros(2, 64, dtype=dtype),), {"group": 64}, r"group is 64, expected 32")


roundtrip_fp4 = Contract(
    name="roundtrip_fp4",
    reference=_roundtrip_fp4,
    meta=_roundtrip_meta,
    samples=value_samples(),
    errors=_roundtrip_errors,
    bound=lambda x, *, group=32, golden, found: (None,),
    cost=lambda x, *, group=32: Cost(0, 5 * x.numel(), tensors_bytes(x), tensors_bytes(x), "fp32"),
)


def _quant_int8(x_TK: Tensor, *, compute: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """INT8 per token: scale = amax/127 in fp32, q = x/scale rounded half to even, clamped to +-127; a zero row has scale 0.

    x [T, K] float. Returns q int8 [T, K] and scale fp32 [T]. Exact in fp32. Source: npu_dynamic_quant (Ascend operator
    notes, section 3). ValueError for integer input.
    """
    x = x_TK.float()
    # a division by a number is a multiplication by its rounded inverse on some devices
    scale = x.abs().amax(-1) / x.new_full((), 127) if x.shape[-1] else x.new_zeros(x.shape[0])
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / safe[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _int8_meta(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    _check_float("quant_int8", x_TK)
    return torch.empty(x_TK.shape, dtype=torch.int8, device="meta"), torch.empty(x_TK.shape[0], device="meta")


quant_int8 = Contract(
    name="quant_int8",
    reference=_quant_int8,
    meta=_int8_meta,
    samples=value_samples(),
    errors=value_errors("quant_int8"),
    bound=lambda x_TK, *, golden, found: (None, None),
    cost=lambda x_TK: Cost(0, 3 * x_TK.numel(), tensors_bytes(x_TK), x_TK.numel() + 4 * x_TK.shape[0], "fp32"),
)


def _dequant_int8(q: Tensor, scale: Tensor, *, dtype: torch.dtype, compute: torch.dtype = torch.float32) -> Tensor:
    """q * scale per row, one rounding to `dtype`.

    q int8 [T, K]; scale fp32 [T]. Returns [T, K]. Source: npu_dynamic_quant (Ascend operator notes, section 3). ValueError for
    other types or shapes.
    """
    return q.to(compute) * scale.to(compute)[:, None]


def _deint8_meta(q: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"dequant_int8: q is {q.dtype} {tuple(q.shape)}, expected int8 [T, K]")
    if scale.dtype != torch.float32 or scale.shape != q.shape[:1]:
        raise ValueError(f"dequant_int8: scale is {scale.dtype} {tuple(scale.shape)}, expected float32 ({q.shape[0]},)")
    return torch.empty(q.shape, dtype=dtype, device="meta")


def _deint8_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, tags in values(dtype, seed):
        yield Sample(name, _quant_int8(x), {"dtype": dtype}, tags)


def _deint8_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    q, s = _quant_int8(torch.ones(2, 64))
    yield WrongInput("scale", (q, s[:, None]), {"dtype": dtype}, r"scale is torch.float32 \(2, 1\), expected float32 \(2,\)")
    yield WrongInput("type", (q.float(), s), {"dtype": dtype}, r"q is torch.float32")


dequant_int8 = Contract(
    name="dequant_int8",
    reference=_dequant_int8,
    meta=_deint8_meta,
    samples=_deint8_samples,
    errors=_deint8_errors,
    bound=lambda q, scale, *, dtype, golden, found: (bounds.roundoff(torch.float32) * golden[0].abs(),),
    cost=lambda q, scale, *, dtype: Cost(0, q.numel(), tensors_bytes(q, scale), q.numel() * dtype.itemsize, "fp32"),
)


def _hadamard(x: Tensor, *, compute: torch.dtype = torch.float32) -> Tensor:
    """Walsh-Hadamard transform of the last dimension in natural (Sylvester) order, times n^-0.5.

    x [..., n] float, n a power of two. Returns x's type, fp32 inside. Source: specification section 7. ValueError for other n.
    """
    n = x.shape[-1]
    y = x.to(compute).reshape(-1, n)
    width = 1
    while width < n:
        a, b = y.view(-1, n // (2 * width), 2, width).unbind(2)
        y = torch.stack((a + b, a - b), dim=2).view(-1, n)
        width *= 2
    return (y * n**-0.5).view(x.shape)


def _hadamard_meta(x: Tensor) -> Tensor:
    _check_float("hadamard", x, None)
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last dimension is {n}, expected a power of two")
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _hadamard_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in (("zero", (0, 128)), ("one", (1, 128)), ("odd", (3, 5, 16)), ("heads", (2, 64, 128)), ("unit", (4, 1))):
        for scale in (1.0, 2e-3, 1e4):
            yield Sample(f"{name}-{scale:g}", ((torch.randn(shape, generator=g) * scale).to(dtype),), {}, (name,))


def _hadamard_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    yield WrongInput("width", (torch.zeros(2, 96, dtype=dtype),), {}, r"last dimension is 96, expected a power of two")


hadamard = Contract(
    name="hadamard",
    reference=_hadamard,
    meta=_hadamard_meta,
    samples=_hadamard_samples,
    errors=_hadamard_errors,
    bound=lambda x, *, golden, found: (
        bounds.accumulate(x.shape[-1], x.double().abs().sum(-1, keepdim=True) * x.shape[-1] ** -0.5).expand(x.shape),
    ),
    cost=lambda x: Cost(0, x.numel() * max(x.shape[-1].bit_length() - 1, 1), tensors_bytes(x), tensors_bytes(x), "fp32"),
)
