"""Linear layers over the hub's FP8 weights with MXFP8 activations: one power of two per token and 32 channels instead of 128.

Shapes: x [T, K], weight [N, K]. y = x @ weight.T; there are no biases in the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops.contract import Contract, Sample, WrongInput
from ops.linear_dense import FLOATS, dense_inputs, product_cost, sum_bound
from ops.quant import block_weight, dequant_fp8, dequant_fp8_block, quant_mxfp8

_GROUP = 32
_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def _linear_mx(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype, compute: torch.dtype = torch.float32
) -> Tensor:  # fmt: skip
    """y = x @ w.T with w an FP8 weight in 128 x 128 blocks and x in MXFP8: products of codes summed in fp32, times both scales.

    x float8_e4m3fn [T, K] with x_scale float8_e8m0fnu [T, K/32], as quant_mxfp8 gives them, K a multiple of 32; weight float8_e4m3fn
    [N, K]; scale float8_e8m0fnu [ceil(N/128), ceil(K/128)]. Returns [T, N] in out_dtype. Source: specification section 2.2 with the MX
    block of 32. ValueError for other types or shapes.
    """
    xd = dequant_fp8.reference(x, x_scale, group=_GROUP, dtype=compute, compute=compute)
    return xd @ dequant_fp8_block.reference(weight_NK, scale, dtype=compute, compute=compute).T


def _meta(x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    dequant_fp8_block.meta(weight_NK, scale, dtype=torch.float32)
    n, k = weight_NK.shape
    if x.dim() != 2 or x.shape[1] != k or k % _GROUP:
        raise ValueError(f"linear_mx: x is {tuple(x.shape)}, expected [T, {k}] for this weight, a multiple of {_GROUP} wide")
    expected = (x.shape[0], k // _GROUP)
    if x.dtype != _E4M3 or x_scale.dtype != _E8M0 or tuple(x_scale.shape) != expected:
        found = f"x is {x.dtype} with x_scale {x_scale.dtype} {tuple(x_scale.shape)}"
        raise ValueError(f"linear_mx: {found}; expected float8_e4m3fn with float8_e8m0fnu {expected}")
    if out_dtype not in FLOATS:
        raise ValueError(f"linear_mx: out_dtype is {out_dtype}, expected a float type")
    return torch.empty(x.shape[0], n, dtype=out_dtype, device="meta")


def _samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, g, n, k, tags in dense_inputs(dtype, seed):
        if k % _GROUP:
            continue
        w, scale = block_weight(n, k, g)
        codes, x_scale = quant_mxfp8.reference(x)
        yield Sample(name, (codes, w, scale), {"x_scale": x_scale, "out_dtype": dtype}, tags)
    # groups of one token that differ by powers of two: a scale per 128 channels would lose the small ones
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 256, generator=g) * torch.tensor([2.0**-12, 1.0, 2.0**6, 0.0]).repeat(2).repeat_interleave(_GROUP)
    w, scale = block_weight(128, 256, g)
    codes, x_scale = quant_mxfp8.reference(x.to(dtype))
    yield Sample("uneven", (codes, w, scale), {"x_scale": x_scale, "out_dtype": dtype}, ("uneven",))


def _errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    w, s = block_weight(128, 256, torch.Generator().manual_seed(0))
    codes, xs = quant_mxfp8.reference(torch.ones(2, 256))
    kw = {"out_dtype": dtype}
    yield WrongInput("scale-per-128", (codes, w, s), {**kw, "x_scale": xs[:, ::4]}, r"float8_e8m0fnu \(2, 2\); expected .*\(2, 8\)")
    yield WrongInput("width", (codes[:, :128], w, s), {**kw, "x_scale": xs[:, :4]}, r"x is \(2, 128\), expected \[T, 256\]")
    yield WrongInput("floats", (codes.float(), w, s), {**kw, "x_scale": xs}, r"x is torch.float32")
    yield WrongInput("weight-scale", (codes, w, s[:, :1]), {**kw, "x_scale": xs}, r"expected a scale of \(1, 2\)")


def _bound(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype,
    golden: tuple[Tensor, ...], found: tuple[Tensor, ...],
) -> tuple[Tensor]:  # fmt: skip
    # dequantised codes are exact in fp32: only the sum errs
    f64 = torch.float64
    xd = dequant_fp8.reference(x, x_scale, group=_GROUP, dtype=f64, compute=f64)
    return (sum_bound(xd, dequant_fp8_block.reference(weight_NK, scale, dtype=f64, compute=f64), x.shape[1]),)


linear_mx = Contract(
    name="linear_mx",
    reference=_linear_mx,
    meta=_meta,
    samples=_samples,
    errors=_errors,
    bound=_bound,
    cost=lambda x, weight_NK, scale, *, x_scale, out_dtype: product_cost(
        x, weight_NK.shape[0], weight_NK.shape[1], out_dtype, "fp8", weight_NK, scale, x_scale
    ),
)
