"""All experts of a layer in one op, over stored weights: routed experts, their weighted sum, and the shared expert added to it.

Shapes: x [T, D], ids and weights [T, K], routed w13 [E, 2I, D] and w2 [E, D, I] with their scales, shared w13 [2J, D] and w2 [D, J].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.experts_int8 import _int8, _interval, pack_int8, roundtrip_rows
from ops.experts_math import Interval, Trip, Weight, experts_bound, experts_reference, fp8_interval
from ops.experts_quant import _fp4, pack_fp4
from ops.experts_samples import sample_dense
from ops.moe import _check_routing, _moe_combine, _moe_dispatch, _routing
from ops.quant import MXFP8_FLOOR, dequant_fp8, dequant_fp8_block, e8m0_bytes, power_of_two_exponent, quant_int8, quant_mxfp8
from ops.swiglu import check_limit

_BLOCK = 128
_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def roundtrip_mx(x_AK: Tensor, compute: torch.dtype) -> Tensor:
    """x quantised to MXFP8 (a power of two per row and 32 channels) and back, in `compute` precision (the rule of quant_mxfp8)."""
    return dequant_fp8.reference(*quant_mxfp8.reference(x_AK), group=32, dtype=compute, compute=compute)


def _fp8(weight: Tensor, scale: Tensor) -> Weight:
    return lambda expert, dtype: dequant_fp8_block.reference(weight[expert], scale[expert], dtype=dtype, compute=dtype)


_KINDS: Mapping[str, tuple[Callable[[Tensor, Tensor], Weight], Callable[[Tensor, Tensor], Weight], Trip, Interval]] = {
    "moe_int8": (_int8, _int8, roundtrip_rows, _interval),
    "moe_mx": (_fp4, _fp8, roundtrip_mx, partial(fp8_interval, group=32, floor=MXFP8_FLOOR)),
}
"""Op -> weights of routed and of shared experts, and how their activations are rounded."""


def _parts(
    op: str, x_TD: Tensor, ids_TK: Tensor, routed_weights: tuple[Tensor, ...], shared: tuple[Tensor, ...]
) -> tuple[tuple[tuple[Tensor, Tensor, Tensor, Weight, Weight], ...], Tensor]:
    """(rows, ones, counts and both weights) of the routed and of the shared experts, and the flat index of each routed row."""
    routed_of, shared_of, *_ = _KINDS[op]
    w13, s13, w2, s2 = routed_weights
    rows, _, counts, index = _moe_dispatch(x_TD, ids_TK, torch.ones(ids_TK.shape), num_experts=w13.shape[0])
    a, sa, b, sb = (t[None] for t in shared)
    tokens = x_TD.shape[0]
    routed = (rows, torch.ones(rows.shape[0]), counts, routed_of(w13, s13), routed_of(w2, s2))
    return (routed, (x_TD, torch.ones(tokens), torch.tensor([tokens]), shared_of(a, sa), shared_of(b, sb))), index


def _sum(y_AD: Tensor, index_A: Tensor, weights_TK: Tensor) -> Tensor:
    """Rows times their routing weight, summed per token."""
    weighted = y_AD * weights_TK.flatten()[index_A.long()].to(y_AD.dtype)[:, None]
    return _moe_combine(weighted, index_A, tokens=weights_TK.shape[0], topk=weights_TK.shape[1], compute=y_AD.dtype)


def _layer(op: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *weights: Tensor, limit: float, compute: torch.dtype) -> Tensor:
    (routed, shared), index = _parts(op, x_TD, ids_TK, weights[:4], weights[4:])
    run: dict[str, Any] = {"limit": limit, "quantize": True, "compute": compute, "trip": _KINDS[op][2]}
    return _sum(experts_reference(*routed, **run), index, weights_TK) + experts_reference(*shared, **run)


def _bound(
    op: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *weights: Tensor, limit: float, golden: Any, found: Any
) -> tuple[Tensor]:
    (routed, shared), index = _parts(op, x_TD, ids_TK, weights[:4], weights[4:])
    *_, trip, interval = _KINDS[op]
    unit, run = bounds.roundoff(x_TD.dtype), {"limit": limit, "quantize": True, "trip": trip}
    errors, sizes = [], []
    for part in (routed, shared):
        y = experts_reference(*part, compute=torch.float64, **run)  # type: ignore[arg-type]
        # each expert's result may be rounded to x's type before the sum
        errors.append(experts_bound(*part, interval=interval, **run) + unit * y.abs())  # type: ignore[arg-type]
        sizes.append(y.abs())
    size = _sum(sizes[0], index, weights_TK) + sizes[1]
    # so may the weighted row, where the weight goes in before the second product
    return (_sum(errors[0] + unit * sizes[0], index, weights_TK) + errors[1] + bounds.accumulate(ids_TK.shape[1] + 2, size),)


def _moe_int8(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float, compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """y = sum over k of weight * expert(x) + shared(x) with INT8 weights per channel and INT8 activations per row, as grouped_experts_int8.

    x_TD [T, D] any float type; ids_TK int32 [T, K], entries in 0..E-1; weights_TK fp32 [T, K]; w13 int8 [E, 2I, D], s13 bf16 or fp32
    [E, 2I]; w2 int8 [E, D, I], s2 bf16 or fp32 [E, D]; shared_w13 int8 [2J, D] with fp32 [2J], shared_w2 int8 [D, J] with fp32 [D].
    Sums in fp32; a single expert's result may be rounded to x's type. Returns [T, D] in x's type.
    Source: DeepSeek-V4 specification section 9. ValueError for shapes and types that do not fit.
    """
    weights = (w13, s13, w2, s2, shared_w13, shared_s13, shared_w2, shared_s2)
    return _layer("moe_int8", x_TD, ids_TK, weights_TK, *weights, limit=limit, compute=compute)


def _moe_mx(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float, compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """y = sum over k of weight * expert(x) + shared(x) with the hub's FP4 experts and FP8 shared expert, and MXFP8 activations.

    x_TD [T, D] any float type; ids_TK int32 [T, K], entries in 0..E-1; weights_TK fp32 [T, K]; w13 uint8 [E, 2I, D/2], s13 e8m0
    [E, 2I, D/32]; w2 uint8 [E, D, I/2], s2 e8m0 [E, D, I/32]; shared_w13 e4m3 [2J, D], shared_w2 e4m3 [D, J] with e8m0 scales of their
    128 x 128 blocks; D, I and J multiples of 32. x and each activated row are rounded as quant_mxfp8 does; the routing weight comes after
    the second product. Sums in fp32. Returns [T, D] in x's type.
    Source: specification section 9 with the MX block of 32. ValueError for shapes and types that do not fit.
    """
    weights = (w13, s13, w2, s2, shared_w13, shared_s13, shared_w2, shared_s2)
    return _layer("moe_mx", x_TD, ids_TK, weights_TK, *weights, limit=limit, compute=compute)


def _check(op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected or tensor.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {wanted} {expected}")


def _meta_of(op: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *weights: Tensor, limit: float) -> Tensor:
    _check_routing(op, x_TD, ids_TK, weights_TK)
    check_limit(op, limit)
    w13, s13, w2, s2, a, sa, b, sb = weights
    d, mx = x_TD.shape[1], op == "moe_mx"
    if w13.dim() != 3 or w13.shape[1] % 2 or a.dim() != 2 or a.shape[0] % 2:
        raise ValueError(f"{op}: w13 is {tuple(w13.shape)}, shared_w13 {tuple(a.shape)}; expected [E, 2I, {d}] and [2J, {d}]")
    e, i, j = w13.shape[0], w13.shape[1] // 2, a.shape[0] // 2
    if not mx:
        scales = (torch.bfloat16, torch.float32)
        _check(op, "w13", w13, (torch.int8,), (e, 2 * i, d))
        _check(op, "w2", w2, (torch.int8,), (e, d, i))
        _check(op, "s13", s13, scales, (e, 2 * i))
        _check(op, "s2", s2, scales, (e, d))
        for name, w, s, n, k in (("shared_w13", a, sa, 2 * j, d), ("shared_w2", b, sb, d, j)):
            _check(op, name, w, (torch.int8,), (n, k))
            _check(op, f"{name} scale", s, (torch.float32,), (n,))
    else:
        if d % 32 or i % 32 or j % 32:
            raise ValueError(f"{op}: D is {d}, I {i} and J {j}, expected multiples of 32")
        _check(op, "w13", w13, (torch.uint8,), (e, 2 * i, d // 2))
        _check(op, "w2", w2, (torch.uint8,), (e, d, i // 2))
        _check(op, "s13", s13, (_E8M0,), (e, 2 * i, d // 32))
        _check(op, "s2", s2, (_E8M0,), (e, d, i // 32))
        for name, w, s, n, k in (("shared_w13", a, sa, 2 * j, d), ("shared_w2", b, sb, d, j)):
            _check(op, name, w, (_E4M3,), (n, k))
            _check(op, f"{name} scale", s, (_E8M0,), (-(-n // _BLOCK), -(-k // _BLOCK)))
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, device="meta")


def pack_fp8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """A dense weight in FP8 with a power of two per 128 x 128 block: e4m3 [N, K] and e8m0 [N/128, K/128], rounded up."""
    n, k = weight_NK.shape
    wide = torch.nn.functional.pad(weight_NK, (0, -k % _BLOCK, 0, -n % _BLOCK)).unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
    exponent = power_of_two_exponent(wide.abs().amax((1, 3)).clamp_min(1e-4), 448.0)
    spread = exponent.repeat_interleave(_BLOCK, 0)[:n].repeat_interleave(_BLOCK, 1)[:, :k]
    return torch.ldexp(weight_NK, -spread).to(_E4M3), e8m0_bytes(exponent)


_CASES: dict[str, tuple[int, int, int, int, int, float, float]] = {  # T, E, K, D, I, spread of gate and up, limit
    "zero": (0, 4, 2, 32, 32, 2.0, 10.0),
    "one": (1, 4, 2, 128, 128, 2.0, 10.0),
    "odd": (5, 5, 3, 160, 96, 2.0, 10.0),
    "all-on-one": (4, 1, 1, 64, 32, 2.0, 10.0),
    "clamp": (3, 4, 2, 128, 128, 9.0, 10.0),
    "narrow-limit": (4, 3, 2, 128, 128, 1.0, 0.6),
    "wide-inner": (2, 2, 1, 64, 1056, 2.0, 10.0),
    "many": (33, 8, 4, 256, 128, 2.0, 10.0),
    "flash": (2, 8, 6, 4096, 256, 3.0, 10.0),
}


def _samples(op: str, dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    pack, pack_shared = (pack_int8, quant_int8.reference) if op == "moe_int8" else (pack_fp4, pack_fp8)
    for name, (tokens, experts, topk, width, inner, spread, limit) in _CASES.items():
        x = torch.randn(tokens, width, generator=g).to(dtype)
        w13, w2 = sample_dense(g, experts, width, inner, spread)
        a, b = sample_dense(g, 1, width, inner, spread)
        routed, shared = (*pack(w13), *pack(w2)), (*pack_shared(a[0]), *pack_shared(b[0]))
        yield Sample(name, (x, *_routing(g, tokens, topk, experts), *routed, *shared), {"limit": limit}, (name,))
        if name == "many":
            # the largest of 32 channels is just below a power of two: with a scale rounded down it would not fit the codes
            high = torch.where(torch.arange(width) % 32 == 0, x.sign() * 7.9, x.float() / 8).to(dtype)
            yield Sample("below-power", (high, *_routing(g, tokens, topk, experts), *routed, *shared), {"limit": limit}, ("outliers",))


def _errors(op: str, dtype: torch.dtype) -> Iterator[WrongInput]:
    x, ids, weights, *rest = next(s for s in _samples(op, dtype, 0) if s.name == "odd").args
    kwargs = {"limit": 10.0}
    yield WrongInput("ids-type", (x, ids.long(), weights, *rest), kwargs, r"ids is torch.int64")
    yield WrongInput("limit", (x, ids, weights, *rest), {"limit": 0.0}, r"limit is 0.0")
    yield WrongInput("w2", (x, ids, weights, *rest[:2], rest[2][:1], *rest[3:]), kwargs, r"w2 is .*expected")
    yield WrongInput("s13", (x, ids, weights, rest[0], rest[1].double(), *rest[2:]), kwargs, r"s13 is torch.float64")
    yield WrongInput("shared", (x, ids, weights, *rest[:4], rest[4].float(), *rest[5:]), kwargs, r"shared_w13 is torch.float32")
    yield WrongInput("shared-scale", (x, ids, weights, *rest[:7], rest[7][:0]), kwargs, r"shared_w2 scale is .*expected")


def _cost(rate: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *weights: Tensor, limit: float) -> Cost:
    rows, experts, width = ids_TK.numel(), weights[0].shape[0], x_TD.shape[1]
    read = min(rows, experts) if ids_TK.device.type == "meta" else len(ids_TK.unique())
    inner, shared = weights[0].shape[1] // 2, weights[4].shape[0] // 2
    work = rows * inner + x_TD.shape[0] * shared
    stored = tensors_bytes(*weights[:4]) // max(experts, 1) * read + tensors_bytes(*weights[4:])
    return Cost(2 * 3 * work * width, 9 * work + rows * width, tensors_bytes(x_TD, ids_TK, weights_TK) + stored, tensors_bytes(x_TD), rate)


def _composed(ops: Any) -> Callable[..., Tensor]:
    def moe_int8(
        x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
        shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
    ) -> Tensor:  # fmt: skip
        rows, row_weight, counts, index = ops.moe_dispatch(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
        rows = ops.grouped_experts_int8(rows, row_weight, counts, w13, s13, w2, s2, limit=limit)
        routed = ops.moe_combine(rows, index, tokens=ids_TK.shape[0], topk=ids_TK.shape[1])

        def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            codes, row_scale = ops.quant_int8(x)
            y: Tensor = ops.linear_int8(codes, weight, scale, x_scale=row_scale, out_dtype=x.dtype)
            return y

        h = ops.clamped_swiglu(product(x_TD, shared_w13, shared_s13), limit=limit)
        return (routed + product(h, shared_w2, shared_s2)).to(x_TD.dtype)

    return moe_int8


def _int8_meta(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    weights = (w13, s13, w2, s2, shared_w13, shared_s13, shared_w2, shared_s2)
    return _meta_of("moe_int8", x_TD, ids_TK, weights_TK, *weights, limit=limit)


def _mx_meta(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, shared_w13: Tensor,
    shared_s13: Tensor, shared_w2: Tensor, shared_s2: Tensor, *, limit: float,
) -> Tensor:  # fmt: skip
    weights = (w13, s13, w2, s2, shared_w13, shared_s13, shared_w2, shared_s2)
    return _meta_of("moe_mx", x_TD, ids_TK, weights_TK, *weights, limit=limit)


moe_int8 = Contract(
    name="moe_int8",
    reference=_moe_int8,
    meta=_int8_meta,
    samples=partial(_samples, "moe_int8"),
    errors=partial(_errors, "moe_int8"),
    bound=partial(_bound, "moe_int8"),
    cost=partial(_cost, "int8"),
    rms_share=1.0,  # as grouped_experts_int8
    compose=_composed,
    parts=("moe_dispatch", "grouped_experts_int8", "moe_combine", "quant_int8", "linear_int8", "clamped_swiglu"),
)

moe_mx = Contract(
    name="moe_mx",
    reference=_moe_mx,
    meta=_mx_meta,
    samples=partial(_samples, "moe_mx"),
    errors=partial(_errors, "moe_mx"),
    bound=partial(_bound, "moe_mx"),
    cost=partial(_cost, "fp8"),
    rms_share=1.0,  # in fp16 one code alone may be uncertain, and its flip takes the whole bound of a row
)
