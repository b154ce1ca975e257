"""Linear layers over plain float weights, and the per-group product of the output projection.

Shapes: x [T, K], weight [N, K], G groups. y = x @ weight.T; there are no biases in the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SIZES = {
    "zero": (0, 64, 128),
    "one": (1, 48, 256),
    "odd": (3, 40, 160),
    "unaligned": (5, 37, 50),
    "many": (33, 136, 128),
    "flash": (2, 512, 4096),
    "pro": (1, 256, 7168),
}


def out_type(x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The result's type: as asked, else the activation's, else bf16 for quantised activations."""
    return out_dtype or (x.dtype if x.dtype in FLOATS else torch.bfloat16)


def _linear(
    x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None, compute: torch.dtype = torch.float32
) -> Tensor:
    """y = x @ weight.T, products of the stored values accumulated in fp32, one rounding to `out_dtype` (default: x's type).

    x [..., K] float; weight [N, K] float, also of another type than x. Returns [..., N]. Source: specification section 2.2.
    ValueError for differing K or integer types.
    """
    return x.to(compute) @ weight_NK.to(compute).T


def _check_plain(op: str, x: Tensor, weight: Tensor) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected float32, bfloat16 or float16")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x is {tuple(x.shape)}, weight {tuple(weight.shape)}; expected [..., K] and [N, K] with equal K")


def _linear_meta(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    _check_plain("linear", x, weight_NK)
    return torch.empty(*x.shape[:-1], weight_NK.shape[0], dtype=out_type(x, out_dtype), device="meta")


def dense_inputs(dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor, torch.Generator, int, int, tuple[str, ...]]]:
    """Activations with the generator for a weight and its N and K: name, x, generator, N, K, tags."""
    g = torch.Generator().manual_seed(seed)
    huge = 1.0 if dtype == torch.float16 else 1e3  # FP8 weights alone bring sums near the largest fp16 number
    for name, (t, n, k) in _SIZES.items():
        for tag, size in (("unit", 1.0), ("tiny", 2e-3), ("huge", huge)):
            yield f"{name}-{tag}", (torch.randn(t, k, generator=g) * size).to(dtype), g, n, k, (name, tag)
    x = torch.randn(4, 128, generator=g)
    x[:, ::31] *= 200
    yield "outliers", x.to(dtype), g, 64, 128, ("outliers",)
    yield "constant", torch.ones(2, 128).to(dtype), g, 64, 128, ("constant",)


def _linear_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    for name, x, g, n, k, tags in dense_inputs(dtype, seed):
        w = torch.randn(n, k, generator=g) * k**-0.5
        yield Sample(name, (x, w.to(dtype)), {}, tags)
        yield Sample(f"{name}-fp32-out", (x, w.to(dtype)), {"out_dtype": torch.float32}, tags)
    yield Sample("mixed", (x, w), {}, ("mixed",))
    yield Sample("three-dimensions", (x.view(2, -1, x.shape[-1]), w.to(dtype)), {}, ("mixed",))


def _linear_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w = torch.zeros(2, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype)
    yield WrongInput("width", (x, w[:, :4]), {}, r"x is \(2, 8\), weight \(3, 4\); expected \[\.\.\., K\]")
    yield WrongInput("codes", (x, w.to(torch.int8)), {}, r"weight is torch.int8, expected float32")


def sum_bound(x: Tensor, w_NK: Tensor, terms: int) -> Tensor:
    """Error [T, N] of the product of x [T, K] and w [N, K] accumulated in fp32."""
    return bounds.accumulate(terms, x.double().abs() @ w_NK.double().abs().T)


def _rate(*tensors: Tensor) -> str:
    return "fp32" if any(t.dtype == torch.float32 for t in tensors) else "bf16"


def product_cost(x: Tensor, n: int, k: int, out_dtype: torch.dtype, rate: str, *read: Tensor | None) -> Cost:
    """Cost of x [..., K] times a weight [N, K] kept in the tensors `read`."""
    t = x.numel() // max(x.shape[-1], 1)
    return Cost(2 * t * n * k, 0, tensors_bytes(x, *read), t * n * out_dtype.itemsize, rate)


linear = Contract(
    name="linear",
    reference=_linear,
    meta=_linear_meta,
    samples=_linear_samples,
    errors=_linear_errors,
    bound=lambda x, weight_NK, *, out_dtype=None, golden, found: (sum_bound(x, weight_NK, x.shape[-1]),),
    cost=lambda x, weight_NK, *, out_dtype=None: product_cost(
        x, weight_NK.shape[0], weight_NK.shape[1], out_type(x, out_dtype), _rate(x, weight_NK), weight_NK
    ),
)


def _grouped_linear(x_TGK: Tensor, weight_GNK: Tensor, *, compute: torch.dtype = torch.float32) -> Tensor:
    """y[t, g] = weight[g] @ x[t, g]: the per-group half of the output projection, fp32 accumulation, one rounding.

    x [T, G, K] float; weight [G, N, K] float. Returns [T, G, N] in x's type. Source: specification section 4.2. ValueError for
    other shapes or integer types.
    """
    return torch.einsum("tgk,gnk->tgn", x_TGK.to(compute), weight_GNK.to(compute)).contiguous()


def _grouped_meta(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    ranks = (x_TGK.dim(), weight_GNK.dim())
    if ranks != (3, 3) or x_TGK.shape[1] != weight_GNK.shape[0] or x_TGK.shape[2] != weight_GNK.shape[2]:
        raise ValueError(
            f"grouped_linear: x is {tuple(x_TGK.shape)}, weight {tuple(weight_GNK.shape)}; expected [T, G, K] and [G, N, K]"
        )
    for name, tensor in (("x", x_TGK), ("weight", weight_GNK)):
        if tensor.dtype not in FLOATS:
            raise ValueError(f"grouped_linear: {name} is {tensor.dtype}, expected float32, bfloat16 or float16")
    return torch.empty(x_TGK.shape[0], *weight_GNK.shape[:2], dtype=x_TGK.dtype, device="meta")


def _grouped_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    sizes = {"zero": (0, 2, 16, 32), "one": (1, 4, 24, 64), "odd": (5, 3, 7, 33), "flash": (2, 2, 64, 4096)}
    for name, (t, groups, n, k) in sizes.items():
        for tag, size in (("unit", 1.0), ("tiny", 2e-3), ("huge", 1e3)):
            x = torch.randn(t, groups, k, generator=g) * size
            w = torch.randn(groups, n, k, generator=g) * k**-0.5
            yield Sample(f"{name}-{tag}", (x.to(dtype), w.to(dtype)), {}, (name, tag))


def _grouped_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, w = torch.zeros(2, 2, 8, dtype=dtype), torch.zeros(2, 4, 8, dtype=dtype)
    yield WrongInput("groups", (x[:, :1], w), {}, r"x is \(2, 1, 8\), weight \(2, 4, 8\)")
    yield WrongInput("codes", (x, w.to(torch.int8)), {}, r"weight is torch.int8")


grouped_linear = Contract(
    name="grouped_linear",
    reference=_grouped_linear,
    meta=_grouped_meta,
    samples=_grouped_samples,
    errors=_grouped_errors,
    bound=lambda x_TGK, weight_GNK, *, golden, found: (
        bounds.accumulate(x_TGK.shape[2], torch.einsum("tgk,gnk->tgn", x_TGK.double().abs(), weight_GNK.double().abs())),
    ),
    cost=lambda x_TGK, weight_GNK: Cost(
        2 * x_TGK.shape[0] * weight_GNK.numel(),
        0,
        tensors_bytes(x_TGK, weight_GNK),
        x_TGK.shape[0] * weight_GNK.shape[0] * weight_GNK.shape[1] * x_TGK.element_size(),
        _rate(x_TGK, weight_GNK),
    ),
)
