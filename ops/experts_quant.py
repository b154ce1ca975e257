"""Grouped experts whose weights stay as the checkpoint stores them: FP4 (scale per 32 inputs) or FP8 (scale per 128x128).

Shapes: rows [A, D] sorted by expert, row_weight [A], counts [E]; FP4: w13 [E, 2I, D/2], s13 [E, 2I, D/32], w2 [E, D, I/2],
s2 [E, D, I/32]; FP8: w13 [E, 2I, D], s13 [E, 2*ceil(I/128), ceil(D/128)], w2 [E, D, I], s2 [E, ceil(D/128), ceil(I/128)].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops.contract import Contract, Cost, Sample, WrongInput
from ops.experts_math import Weight, check_rows, experts_bound, experts_cost, experts_reference
from ops.experts_samples import CASES, FP4_CASES, hard_samples, row_errors, sample_dense, sample_rows
from ops.quant import dequant_fp8_block, dequant_mxfp4, quant_mxfp4

_BLOCK = 128
_E8M0 = torch.float8_e8m0fnu


def _check_scale(op: str, name: str, scale: Tensor, expected: tuple[int, ...]) -> None:
    if scale.shape != expected or scale.dtype != _E8M0:
        raise ValueError(f"{op}: {name} is {scale.dtype} {tuple(scale.shape)}, expected {_E8M0} {expected}")


def _check_weight(op: str, name: str, weight: Tensor, dtype: torch.dtype, expected: tuple[int, ...]) -> None:
    if weight.shape != expected or weight.dtype != dtype:
        hint = "; view the checkpoint's int8 as uint8" if weight.dtype == torch.int8 else ""
        raise ValueError(f"{op}: {name} is {weight.dtype} {tuple(weight.shape)}, expected {dtype} {expected}{hint}")


# ---- FP4 ------------------------------------------------------------------------------------------------------------


def _fp4(weight: Tensor, scale: Tensor) -> Weight:
    return lambda expert, dtype: dequant_mxfp4.reference(weight[expert], scale[expert], dtype=dtype, compute=dtype)


def _grouped_experts_fp4(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """grouped_experts over packed FP4 weights: two e2m1 per byte, low nibble first, one E8M0 scale per 32 inputs.

    rows_AD [A, D] any float type; row_weight_A fp32 [A]; counts_E int64 [E]; w13 uint8 [E, 2I, D/2], s13 e8m0 [E, 2I, D/32];
    w2 uint8 [E, D, I/2], s2 e8m0 [E, D, I/32]; D and I multiples of 32. quantize: rows and the weighted activation are rounded
    to FP8 per 128 channels (last group short) before the products, as the published model does. Returns [A, D] in rows' type.
    Source: DeepSeek-V4 specification sections 2.2, 9 and 10.3. ValueError for shapes, types and counts that do not fit.
    """
    kwargs: dict[str, Any] = {"limit": limit, "quantize": quantize, "compute": compute}
    return experts_reference(rows_AD, row_weight_A, counts_E, _fp4(w13, s13), _fp4(w2, s2), **kwargs)


def _grouped_experts_fp4_meta(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    op, width = "grouped_experts_fp4", rows_AD.shape[-1]
    if width % 32 or w13.dim() != 3 or w13.shape[1] % 64:
        raise ValueError(f"{op}: D is {width} and w13 {tuple(w13.shape)}, expected [E, 2I, D/2] with D and I multiples of 32")
    experts, inner = w13.shape[0], w13.shape[1] // 2
    check_rows(op, rows_AD, row_weight_A, counts_E, experts, limit)
    _check_weight(op, "w13", w13, torch.uint8, (experts, 2 * inner, width // 2))
    _check_weight(op, "w2", w2, torch.uint8, (experts, width, inner // 2))
    _check_scale(op, "s13", s13, (experts, 2 * inner, width // 32))
    _check_scale(op, "s2", s2, (experts, width, inner // 32))
    return torch.empty(rows_AD.shape, dtype=rows_AD.dtype, device="meta")


def pack_fp4(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Experts' dense weights quantised to FP4: packed uint8 [E, N, K/2] and e8m0 scales [E, N, K/32]."""
    q, scale = quant_mxfp4.reference(weight_ENK.flatten(0, 1))
    return q.unflatten(0, weight_ENK.shape[:2]), scale.unflatten(0, weight_ENK.shape[:2])


def _grouped_experts_fp4_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (counts, width, inner, spread, limit) in FP4_CASES.items():
        rows = sample_rows(g, counts, width, dtype)
        w13, w2 = sample_dense(g, len(counts), width, inner, spread)
        weights = (*pack_fp4(w13), *pack_fp4(w2))
        yield Sample(name, (*rows, *weights), {"limit": limit}, (name,))
        if name in ("odd", "clamp", "many", "narrow-limit"):
            yield Sample(f"{name}-plain", (*rows, *weights), {"limit": limit, "quantize": False}, (name,))
    yield from hard_samples(g, dtype, lambda w13, w2: (*pack_fp4(w13), *pack_fp4(w2)))


def _grouped_experts_fp4_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    g = torch.Generator().manual_seed(0)
    rows = sample_rows(g, [2, 1], 64, dtype)
    w13, w2 = sample_dense(g, 2, 64, 32, 1.0)
    (q13, s13), (q2, s2) = pack_fp4(w13), pack_fp4(w2)
    kwargs: dict[str, Any] = {"limit": 10.0}
    yield from row_errors(rows, (q13, s13, q2, s2), kwargs)
    yield WrongInput(
        "int8", (*rows, q13.view(torch.int8), s13, q2, s2), kwargs, r"w13 is torch.int8 .*view the checkpoint's int8"
    )
    yield WrongInput(
        "w2-shape", (*rows, q13, s13, q2[:, :, :8], s2), kwargs, r"w2 is torch.uint8 \(2, 64, 8\), expected .*\(2, 64, 16\)"
    )
    yield WrongInput("s13-shape", (*rows, q13, s13[:, :, :1], q2, s2), kwargs, r"s13 is .*\(2, 64, 1\), expected .*\(2, 64, 2\)")
    yield WrongInput("s2-type", (*rows, q13, s13, q2, s2.view(torch.uint8)), kwargs, r"s2 is torch.uint8")
    narrow = sample_rows(g, [2, 1], 48, dtype)
    yield WrongInput("width", (*narrow, q13, s13, q2, s2), kwargs, r"D is 48 .*multiples of 32")


def _fp4_bound(*args: Tensor, limit: float, quantize: bool = True, golden: Any, found: Any) -> tuple[Tensor]:
    rows_AD, row_weight_A, counts_E, w13, s13, w2, s2 = args
    return (experts_bound(rows_AD, row_weight_A, counts_E, _fp4(w13, s13), _fp4(w2, s2), limit=limit, quantize=quantize),)


def _packed_cost(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Cost:
    return experts_cost(rows_AD, row_weight_A, counts_E, w13.shape[1] // 2, (w13, s13, w2, s2), "fp8")


grouped_experts_fp4 = Contract(
    name="grouped_experts_fp4",
    reference=_grouped_experts_fp4,
    meta=_grouped_experts_fp4_meta,
    samples=_grouped_experts_fp4_samples,
    errors=_grouped_experts_fp4_errors,
    bound=_fp4_bound,
    cost=_packed_cost,
    rms_share=1.0,  # where one code alone is uncertain, its flip takes the whole bound of a row
)


# ---- FP8 ------------------------------------------------------------------------------------------------------------


def _blocks(width: int) -> int:
    return -(-width // _BLOCK)


def _fp8(weight: Tensor, scale: Tensor) -> Weight:
    return lambda expert, dtype: dequant_fp8_block.reference(weight[expert], scale[expert], dtype=dtype, compute=dtype)


def _fp8_pair(weight: Tensor, scale: Tensor) -> Weight:
    # w1 and w3 were blocked separately: where I is no multiple of 128, the blocks of w3 start afresh
    inner, blocks = weight.shape[1] // 2, scale.shape[1] // 2
    gate, up = _fp8(weight[:, :inner], scale[:, :blocks]), _fp8(weight[:, inner:], scale[:, blocks:])
    return lambda expert, dtype: torch.cat([gate(expert, dtype), up(expert, dtype)])


def _grouped_experts_fp8(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """grouped_experts over FP8 weights with one E8M0 scale per block of 128 outputs x 128 inputs.

    rows_AD [A, D] any float type; row_weight_A fp32 [A]; counts_E int64 [E]; w13 e4m3fn [E, 2I, D] with s13 e8m0
    [E, 2*ceil(I/128), ceil(D/128)], where w1 and w3 have blocks of their own; w2 e4m3fn [E, D, I] with s2 e8m0
    [E, ceil(D/128), ceil(I/128)]. quantize: rows and the weighted activation are rounded to FP8 per 128 channels (last group
    short) before the products, as the published model does. Returns [A, D] in rows' type.
    Source: DeepSeek-V4 specification sections 2.2, 9 and 10.3. ValueError for shapes, types and counts that do not fit.
    """
    kwargs: dict[str, Any] = {"limit": limit, "quantize": quantize, "compute": compute}
    return experts_reference(rows_AD, row_weight_A, counts_E, _fp8_pair(w13, s13), _fp8(w2, s2), **kwargs)


def _grouped_experts_fp8_meta(
    rows_AD: Tensor,
    row_weight_A: Tensor,
    counts_E: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    *,
    limit: float,
    quantize: bool = True,
) -> Tensor:
    op, width = "grouped_experts_fp8", rows_AD.shape[-1]
    if w13.dim() != 3 or w13.shape[1] % 2:
        raise ValueError(f"{op}: w13 has shape {tuple(w13.shape)}, expected [E, 2I, {width}]")
    experts, inner = w13.shape[0], w13.shape[1] // 2
    check_rows(op, rows_AD, row_weight_A, counts_E, experts, limit)
    _check_weight(op, "w13", w13, torch.float8_e4m3fn, (experts, 2 * inner, width))
    _check_weight(op, "w2", w2, torch.float8_e4m3fn, (experts, width, inner))
    _check_scale(op, "s13", s13, (experts, 2 * _blocks(inner), _blocks(width)))
    _check_scale(op, "s2", s2, (experts, _blocks(width), _blocks(inner)))
    return torch.empty(rows_AD.shape, dtype=rows_AD.dtype, device="meta")


def pack_fp8(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Experts' dense weights quantised per 128x128 block: e4m3fn [E, N, K] and e8m0 scales [E, ceil(N/128), ceil(K/128)]."""
    experts, rows, columns = weight_ENK.shape
    pad = (0, -columns % _BLOCK, 0, -rows % _BLOCK)
    tiles = torch.nn.functional.pad(weight_ENK, pad).reshape(experts, _blocks(rows), _BLOCK, _blocks(columns), _BLOCK)
    exponent = torch.frexp(tiles.abs().amax((2, 4)).clamp_min(1e-4) / 448.0).exponent
    scale = torch.ldexp(torch.ones(exponent.shape), exponent)
    spread = scale.repeat_interleave(_BLOCK, 1)[:, :rows].repeat_interleave(_BLOCK, 2)[:, :, :columns]
    return (weight_ENK / spread).to(torch.float8_e4m3fn), scale.to(_E8M0)


def _fp8_weights(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    halves = [pack_fp8(half) for half in w13.chunk(2, 1)]
    q13 = torch.cat([q.view(torch.uint8) for q, _ in halves], 1).view(torch.float8_e4m3fn)
    s13 = torch.cat([s.view(torch.uint8) for _, s in halves], 1).view(_E8M0)
    return q13, s13, *pack_fp8(w2)


def _grouped_experts_fp8_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    cases = {**CASES, "blocks": ([2, 0, 3], 200, 136, 3.0, 10.0)}
    for name, (counts, width, inner, spread, limit) in cases.items():
        rows = sample_rows(g, counts, width, dtype)
        weights = _fp8_weights(*sample_dense(g, len(counts), width, inner, spread))
        yield Sample(name, (*rows, *weights), {"limit": limit}, (name,))
        if name in ("clamp", "blocks", "many", "narrow-limit"):
            yield Sample(f"{name}-plain", (*rows, *weights), {"limit": limit, "quantize": False}, (name,))
    yield from hard_samples(g, dtype, _fp8_weights)


def _grouped_experts_fp8_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    g = torch.Generator().manual_seed(0)
    rows = sample_rows(g, [2, 1], 200, dtype)
    w13, s13, w2, s2 = _fp8_weights(*sample_dense(g, 2, 200, 40, 1.0))
    kwargs: dict[str, Any] = {"limit": 10.0}
    yield from row_errors(rows, (w13, s13, w2, s2), kwargs)
    yield WrongInput(
        "w13-type", (*rows, w13.float(), s13, w2, s2), kwargs, r"w13 is torch.float32 .*expected torch.float8_e4m3fn"
    )
    yield WrongInput("w13-rows", (*rows, w13[:, :79], s13, w2, s2), kwargs, r"w13 has shape \(2, 79, 200\)")
    yield WrongInput("w2-shape", (*rows, w13, s13, w2[:, :, :8], s2), kwargs, r"w2 is .*\(2, 200, 8\), expected .*\(2, 200, 40\)")
    yield WrongInput("s13-shape", (*rows, w13, s13[:, :1], w2, s2), kwargs, r"s13 is .*\(2, 1, 2\), expected .*\(2, 2, 2\)")
    yield WrongInput("s2-type", (*rows, w13, s13, w2, s2.view(torch.uint8)), kwargs, r"s2 is torch.uint8")


def _fp8_bound(*args: Tensor, limit: float, quantize: bool = True, golden: Any, found: Any) -> tuple[Tensor]:
    rows_AD, row_weight_A, counts_E, w13, s13, w2, s2 = args
    weights = _fp8_pair(w13, s13), _fp8(w2, s2)
    return (experts_bound(rows_AD, row_weight_A, counts_E, *weights, limit=limit, quantize=quantize),)


grouped_experts_fp8 = Contract(
    name="grouped_experts_fp8",
    reference=_grouped_experts_fp8,
    meta=_grouped_experts_fp8_meta,
    samples=_grouped_experts_fp8_samples,
    errors=_grouped_experts_fp8_errors,
    bound=_fp8_bound,
    cost=_packed_cost,
    rms_share=1.0,  # where one code alone is uncertain, its flip takes the whole bound of a row
)
