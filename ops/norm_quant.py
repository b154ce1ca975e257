"""An RMS norm whose result is quantised for the product behind it: codes and scales, the normed row itself is not kept.

Shapes: x [T, K], weight [K].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.norm import rms_norm
from ops.quant import FP8_MAX, MXFP8_FLOOR, e8m0_values, grouped, power_of_two_exponent, quant_int8, quant_mxfp8

_GROUP = 32
_KINDS = {"int8": quant_int8, "mx": quant_mxfp8}


def _rms_norm_quant(
    x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """rms_norm, then quant_int8 ("int8") or quant_mxfp8 ("mx") of its rows; the normed row may be rounded to x's type in between.

    x [T, K] any float type; weight [K] of that type or fp32; "mx": K a multiple of 32. Returns what the quantiser returns: int8 [T, K] and
    fp32 [T], or e4m3 [T, K] and e8m0 [T, K/32]. Source: specification sections 2.1 and 10.3. ValueError as for both, and for another kind.
    """
    y = rms_norm.reference(x_TK, weight_K, eps=eps, compute=compute)
    codes, scale = _KINDS[kind].reference(y.float())
    return codes, scale.to(compute) if scale.dtype == torch.float32 else scale


def _meta(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    if kind not in _KINDS:
        raise ValueError(f"rms_norm_quant: kind is {kind!r}, expected {' or '.join(map(repr, _KINDS))}")
    found: tuple[Tensor, Tensor] = _KINDS[kind].meta(rms_norm.meta(x_TK, weight_K, eps=eps))
    return found


_SHAPES = {"zero": (0, 64), "one": (1, 64), "odd": (3, 96), "many": (70, 128), "flash": (2, 1024), "pro": (1, 1536)}


def _samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for kind in _KINDS:
        for name, shape in _SHAPES.items():
            for tag, size in (("unit", 1.0), ("tiny", 2e-3), ("huge", 1e4)):
                x = (torch.randn(shape, generator=g) * size).to(dtype)
                w = (1 + 0.3 * torch.randn(shape[1], generator=g)).to(dtype)
                yield Sample(f"{name}-{tag}-{kind}", (x, w), {"eps": 1e-6, "kind": kind}, (name, tag))
        x = torch.randn(4, 128, generator=g)
        x[1] = 0
        x[2, :32], x[2, 40] = 0, 500
        yield Sample(f"zeros-{kind}", (x.to(dtype), w.new_ones(128)), {"eps": 1e-6, "kind": kind}, ("outliers",))


def _errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w = torch.zeros(2, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    yield WrongInput("kind", (x, w), {"eps": 1e-6, "kind": "fp4"}, r"kind is 'fp4', expected 'int8' or 'mx'")
    yield WrongInput("weight", (x, w[:4]), {"eps": 1e-6, "kind": "int8"}, r"weight has shape \(4,\), expected \(64,\)")
    yield WrongInput("width", (x[:, :40], w[:40]), {"eps": 1e-6, "kind": "mx"}, r"the last dimension is 40, expected a multiple of 32")


def _complaint(wrong: Tensor, what: str) -> str | None:
    if not bool(wrong.any()):
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    return f"{what} at {at}, and {int(wrong.sum()) - 1} more, are of no value that the norm may have"


def _int8_bound(y: Tensor, error: Tensor, scale: Tensor) -> tuple[Callable[[Tensor], str | None], Callable[[Tensor], str | None]]:
    u = 4 * bounds.roundoff(torch.float32)

    def codes_fit(codes: Tensor) -> str | None:
        step = scale.double()[:, None]
        return _complaint((codes.double() * step - y).abs() > step / 2 * (1 + 128 * u) + error, "codes")

    def scale_fits(found: Tensor) -> str | None:
        amax, reach = (y.abs().amax(-1), error.amax(-1)) if y.shape[1] else (y.new_zeros(len(y)), y.new_zeros(len(y)))
        return _complaint((found.double() - amax / 127).abs() > reach / 127 + u * amax / 127, "scales")

    return codes_fit, scale_fits


def _mx_bound(y: Tensor, error: Tensor, scale: Tensor) -> tuple[Callable[[Tensor], str | None], Callable[[Tensor], str | None]]:
    groups, reach = grouped(y, _GROUP), grouped(error, _GROUP)

    def exponent(amax: Tensor) -> Tensor:
        return power_of_two_exponent(amax.clamp_min(MXFP8_FLOOR), FP8_MAX)

    def codes_fit(codes: Tensor) -> str | None:
        step = e8m0_values(scale, torch.float64)[..., None]
        found = grouped(codes.double(), _GROUP) * step
        size = ((groups.abs() + reach) / step).clamp(2.0**-6, FP8_MAX)
        half = torch.exp2(torch.frexp(size)[1].double() - 1 - 4) * step
        return _complaint((found - groups).abs() > half + reach, "codes")

    def scale_fits(found: Tensor) -> str | None:
        e, amax, off = found.view(torch.uint8).int() - 127, groups.abs().amax(-1), reach.amax(-1)
        return _complaint((e < exponent(amax - off)) | (e > exponent(amax + off)), "scales")

    return codes_fit, scale_fits


def _bound(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str, golden: Any, found: tuple[Tensor, ...]) -> tuple[Any, Any]:
    y = rms_norm.reference(x_TK, weight_K, eps=eps, compute=torch.float64)
    error = y.abs() * (bounds.SPREAD * 4 * bounds.roundoff(torch.float32) + bounds.roundoff(x_TK.dtype)) + torch.finfo(torch.float32).tiny
    return _int8_bound(y, error, found[1]) if kind == "int8" else _mx_bound(y, error, found[1])


def _composed(ops: SimpleNamespace) -> Any:
    def rms_norm_quant(x_TK: Tensor, weight_K: Tensor, *, eps: float, kind: str) -> tuple[Tensor, Tensor]:
        y = ops.rms_norm(x_TK, weight_K, eps=eps)
        found: tuple[Tensor, Tensor] = ops.quant_int8(y) if kind == "int8" else ops.quant_mxfp8(y)
        return found

    return rms_norm_quant


rms_norm_quant = Contract(
    name="rms_norm_quant",
    reference=_rms_norm_quant,
    meta=_meta,
    samples=_samples,
    errors=_errors,
    bound=_bound,
    cost=lambda x_TK, weight_K, *, eps, kind: Cost(0, 7 * x_TK.numel(), tensors_bytes(x_TK, weight_K), x_TK.numel() * 33 // 32, "fp32"),
    compose=_composed,
    parts=("rms_norm", "quant_int8", "quant_mxfp8"),
)
