"""Linear layers over stored weights: FP8 in 128 x 128 blocks, FP4 in groups of 32, INT8 per channel (plain: linear_dense.py).

Shapes: x [T, K], weight [N, K]. y = x @ weight.T; there are no biases in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Sample, WrongInput
from ops.linear_dense import FLOATS, dense_inputs, grouped_linear, linear, out_type, product_cost, sum_bound
from ops.quant import (
    block_weight,
    dequant_fp8,
    dequant_fp8_block,
    dequant_int8,
    dequant_mxfp4,
    e8m0_bytes,
    quant_fp8,
    quant_int8,
)

__all__ = ["fp4_weight", "grouped_linear", "linear", "linear_fp4", "linear_fp8", "linear_int8", "out_type"]


def _check_fp8_input(op: str, x: Tensor, x_scale: Tensor | None, k: int) -> None:
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, expected [T, {k}] for this weight")
    if x_scale is None:
        if x.dtype not in FLOATS:
            raise ValueError(f"{op}: x is {x.dtype} without x_scale; pass the scales, or float activations")
        return
    expected = (x.shape[0], -(-k // 128))
    if x.dtype != torch.float8_e4m3fn or x_scale.dtype != torch.float8_e8m0fnu or tuple(x_scale.shape) != expected:
        found = f"x is {x.dtype} with x_scale {x_scale.dtype} {tuple(x_scale.shape)}"
        raise ValueError(f"{op}: {found}; expected float8_e4m3fn with float8_e8m0fnu {expected}")


def _fp8_input(x: Tensor, x_scale: Tensor | None, compute: torch.dtype) -> Tensor:
    return x.to(compute) if x_scale is None else dequant_fp8.reference(x, x_scale, dtype=compute, compute=compute)


def _linear_fp8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """y = x @ w.T with w an FP8 weight in 128 x 128 blocks: products of codes summed in fp32 per block, times both scales.

    x float8_e4m3fn [T, K] with x_scale float8_e8m0fnu [T, ceil(K/128)] (quantised activations), or float [T, K] without
    x_scale (weight only); weight float8_e4m3fn [N, K]; scale float8_e8m0fnu [ceil(N/128), ceil(K/128)]. Returns [T, N] in
    out_dtype (default: x's float type, bf16 for codes). Source: specification section 2.2. ValueError for other types or shapes.
    """
    return _fp8_input(x, x_scale, compute) @ dequant_fp8_block.reference(weight_NK, scale, dtype=compute, compute=compute).T


def _fp8_meta(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    dequant_fp8_block.meta(weight_NK, scale, dtype=torch.float32)
    _check_fp8_input("linear_fp8", x, x_scale, weight_NK.shape[1])
    return torch.empty(x.shape[0], weight_NK.shape[0], dtype=out_type(x, out_dtype), device="meta")


def _quantised_samples(make: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]], multiple: int) -> Any:
    def samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
        for name, x, g, n, k, tags in dense_inputs(dtype, seed):
            if k % multiple:
                continue
            w = make(n, k, g)
            yield Sample(f"{name}-weight-only", (x, *w), {}, tags)
            q, s = quant_fp8.reference(x)
            yield Sample(name, (q, *w), {"x_scale": s, "out_dtype": dtype}, tags)

    return samples


def _fp8_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    w, s = block_weight(128, 256, torch.Generator().manual_seed(0))
    x = torch.ones(2, 256, dtype=dtype)
    q, xs = quant_fp8.reference(x)
    yield WrongInput("no-scale", (q, w, s), {}, r"x is torch.float8_e4m3fn without x_scale")
    yield WrongInput("scale-shape", (q, w, s), {"x_scale": xs[:, :1]}, r"x_scale torch.float8_e8m0fnu \(2, 1\); expected")
    yield WrongInput("width", (x[:, :128], w, s), {}, r"x is \(2, 128\), expected \[T, 256\]")
    yield WrongInput("weight-scale", (x, w, s[:, :1]), {}, r"expected a scale of \(1, 2\)")


def _dequantised_bound(x: Tensor, w_NK: Tensor, x_scale: Tensor | None) -> tuple[Tensor]:
    # every dequantised weight and activation code is exact in fp32 and in bf16: only the sum errs
    xd = _fp8_input(x, x_scale, torch.float64)
    return (sum_bound(xd, w_NK, xd.shape[1]),)


linear_fp8 = Contract(
    name="linear_fp8",
    reference=_linear_fp8,
    meta=_fp8_meta,
    samples=_quantised_samples(block_weight, 1),
    errors=_fp8_errors,
    bound=lambda x, weight_NK, scale, *, x_scale=None, out_dtype=None, golden, found: _dequantised_bound(
        x, dequant_fp8_block.reference(weight_NK, scale, dtype=torch.float64, compute=torch.float64), x_scale
    ),
    cost=lambda x, weight_NK, scale, *, x_scale=None, out_dtype=None: product_cost(
        x, weight_NK.shape[0], weight_NK.shape[1], out_type(x, out_dtype), "fp8", weight_NK, scale, x_scale
    ),
)


def _linear_fp4(
    x: Tensor, weight: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """y = x @ w.T with w an FP4 weight, each 32-wide block of K scaled by the weight's and the activation's scale, fp32 sums.

    x as in linear_fp8; weight uint8 [N, K/2] (low nibble first); scale float8_e8m0fnu [N, K/32]. Returns [T, N] as linear_fp8.
    Source: specification sections 2.2 and 10.3. ValueError for other types or shapes.
    """
    return _fp8_input(x, x_scale, compute) @ dequant_mxfp4.reference(weight, scale, dtype=compute, compute=compute).T


def _fp4_meta(
    x: Tensor, weight: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    dequant_mxfp4.meta(weight, scale, dtype=torch.float32)
    _check_fp8_input("linear_fp4", x, x_scale, 2 * weight.shape[1])
    return torch.empty(x.shape[0], weight.shape[0], dtype=out_type(x, out_dtype), device="meta")


def fp4_weight(n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random packed FP4 weight [n, k/2] and its E8M0 scales [n, k/32]."""
    exponent = torch.randint(-8, -2, (n, k // 32), generator=generator)
    return torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8), e8m0_bytes(exponent)


def _fp4_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    w, s = fp4_weight(8, 128, torch.Generator().manual_seed(0))
    x = torch.ones(2, 128, dtype=dtype)
    yield WrongInput("int8-codes", (x, w.view(torch.int8), s), {}, r"q is torch.int8.*view int8 codes")
    yield WrongInput("width", (x[:, :64], w, s), {}, r"x is \(2, 64\), expected \[T, 128\]")
    yield WrongInput("scale", (x, w, s[:, :2]), {}, r"expected a scale of \(8, 4\)")


linear_fp4 = Contract(
    name="linear_fp4",
    reference=_linear_fp4,
    meta=_fp4_meta,
    samples=_quantised_samples(fp4_weight, 32),
    errors=_fp4_errors,
    bound=lambda x, weight, scale, *, x_scale=None, out_dtype=None, golden, found: _dequantised_bound(
        x, dequant_mxfp4.reference(weight, scale, dtype=torch.float64, compute=torch.float64), x_scale
    ),
    cost=lambda x, weight, scale, *, x_scale=None, out_dtype=None: product_cost(
        x, weight.shape[0], 2 * weight.shape[1], out_type(x, out_dtype), "fp8", weight, scale, x_scale
    ),
)


def _linear_int8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """y = x @ (weight * scale[:, None]).T with an INT8 weight per output channel; integer products sum exactly.

    x int8 [T, K] with x_scale fp32 [T], or float [T, K] without x_scale; weight int8 [N, K]; scale fp32 [N]. Returns [T, N] as
    linear_fp8. Source: npu_quant_matmul (Ascend operator notes, section 4). ValueError for other types or shapes.
    """
    xd = x.to(compute) if x_scale is None else dequant_int8.reference(x, x_scale, dtype=compute, compute=compute)
    return xd @ dequant_int8.reference(weight_NK, scale, dtype=compute, compute=compute).T


def _int8_meta(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    dequant_int8.meta(weight_NK, scale, dtype=torch.float32)
    if x.dim() != 2 or x.shape[1] != weight_NK.shape[1]:
        raise ValueError(f"linear_int8: x is {tuple(x.shape)}, expected [T, {weight_NK.shape[1]}] for this weight")
    if x_scale is None and x.dtype not in FLOATS:
        raise ValueError(f"linear_int8: x is {x.dtype} without x_scale; pass the scales, or float activations")
    if x_scale is not None:
        dequant_int8.meta(x, x_scale, dtype=torch.float32)
    return torch.empty(x.shape[0], weight_NK.shape[0], dtype=out_type(x, out_dtype), device="meta")


def _int8_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, g, n, k, tags in dense_inputs(dtype, seed):
        w = quant_int8.reference(torch.randn(n, k, generator=g) * k**-0.5)
        yield Sample(f"{name}-weight-only", (x, *w), {}, tags)
        q, s = quant_int8.reference(x)
        yield Sample(name, (q, *w), {"x_scale": s, "out_dtype": dtype}, tags)


def _int8_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    w, s = quant_int8.reference(torch.ones(8, 64))
    yield WrongInput("no-scale", (w[:2], w, s), {}, r"x is torch.int8 without x_scale")
    yield WrongInput("width", (torch.ones(2, 32, dtype=dtype), w, s), {}, r"x is \(2, 32\), expected \[T, 64\]")
    short = (torch.ones(2, 64, dtype=dtype), w, s[:4])
    yield WrongInput("scale", short, {}, r"scale is torch.float32 \(4,\), expected float32 \(8,\)")


def _int8_bound(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None,
    golden: tuple[Tensor, ...], found: tuple[Tensor, ...],
) -> tuple[Tensor]:  # fmt: skip
    xd = x.double() if x_scale is None else x.double() * x_scale.double()[:, None]
    # scales are arbitrary fp32 numbers: dequantised operands carry a rounding each
    w = weight_NK.double() * scale.double()[:, None]
    return (sum_bound(xd, w, xd.shape[1]) + 4 * bounds.roundoff(torch.float32) * (xd.abs() @ w.abs().T),)


linear_int8 = Contract(
    name="linear_int8",
    reference=_linear_int8,
    meta=_int8_meta,
    samples=_int8_samples,
    errors=_int8_errors,
    bound=_int8_bound,
    cost=lambda x, weight_NK, scale, *, x_scale=None, out_dtype=None: product_cost(
        x, weight_NK.shape[0], weight_NK.shape[1], out_type(x, out_dtype), "int8", weight_NK, scale, x_scale
    ),
)
