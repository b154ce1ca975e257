"""Mixture of experts: gates, dispatch of rows to experts, the experts themselves, and the sum of their outputs per token.

Importing this module declares every MoE op. Shapes: x [T, D], ids and weights [T, K], rows [A = T*K, D] sorted by expert,
counts [E], w13 [E, 2I, D], w2 [E, D, I].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ops import bounds
from ops.contract import Contract, Cost, Sample, WrongInput, tensors_bytes
from ops.experts import check_dense_experts, grouped_experts
from ops.experts_int8 import grouped_experts_int8
from ops.experts_quant import grouped_experts_fp4, grouped_experts_fp8
from ops.experts_samples import ONE_SIDED, sample_dense, sample_one_sided
from ops.gate import gate_hash, gate_topk
from ops.swiglu import check_limit, clamped_swiglu

__all__ = ["clamped_swiglu", "gate_hash", "gate_topk", "grouped_experts", "grouped_experts_fp4", "grouped_experts_fp8"]
__all__ += ["grouped_experts_int8", "moe_combine", "moe_dispatch", "moe_mlp"]


def _check_routing(op: str, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
    if not x_TD.is_floating_point() or x_TD.dim() != 2:
        raise ValueError(f"{op}: x is {x_TD.dtype} {tuple(x_TD.shape)}, expected a floating type [T, D]")
    if ids_TK.dim() != 2 or ids_TK.shape[0] != x_TD.shape[0] or ids_TK.dtype != torch.int32:
        raise ValueError(f"{op}: ids is {ids_TK.dtype} {tuple(ids_TK.shape)}, expected torch.int32 [{x_TD.shape[0]}, K]")
    if weights_TK.shape != ids_TK.shape or weights_TK.dtype != torch.float32:
        found = f"{weights_TK.dtype} {tuple(weights_TK.shape)}"
        raise ValueError(f"{op}: weights is {found}, expected torch.float32 {tuple(ids_TK.shape)}, the shape of ids")


# ---- moe_dispatch ---------------------------------------------------------------------------------------------------


def _moe_dispatch(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row per (token, chosen expert), sorted by expert; rows of one expert keep the order of their flat index t*K + k.

    x_TD [T, D] any float type; ids_TK int32 [T, K], entries in 0..num_experts-1; weights_TK fp32 [T, K].
    Returns rows [T*K, D] in x's type, row_weight fp32 [T*K], counts int64 [num_experts], row_index int32 [T*K] (the flat index
    of each row). Bitwise copies. Source: DeepSeek-V4 specification section 9.
    ValueError for shapes and types that do not fit.
    """
    order_A = torch.sort(ids_TK.flatten(), stable=True).indices
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
    tokens_A = order_A // max(ids_TK.shape[1], 1)
    return x_TD[tokens_A], weights_TK.flatten()[order_A], counts_E, order_A.to(torch.int32)


def _moe_dispatch_meta(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> tuple[Tensor, ...]:
    _check_routing("moe_dispatch", x_TD, ids_TK, weights_TK)
    if num_experts < 1:
        raise ValueError(f"moe_dispatch: num_experts is {num_experts}, expected at least 1")
    rows = ids_TK.numel()
    shapes = ((rows, x_TD.shape[1]), x_TD.dtype), ((rows,), torch.float32), ((num_experts,), torch.int64), ((rows,), torch.int32)
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes)


_ROUTES = {  # T, E, K, D, experts in use
    "zero": (0, 4, 2, 8, 4),
    "one": (1, 8, 2, 16, 8),
    "odd": (5, 7, 3, 19, 7),
    "all-on-one": (6, 4, 1, 16, 1),
    "same-experts": (4, 9, 3, 16, 3),
    "many": (37, 16, 6, 24, 16),
    "flash": (2, 256, 6, 4096, 256),
}


def _routing(g: torch.Generator, tokens: int, topk: int, used: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, used, generator=g).argsort(-1)[:, :topk].to(torch.int32)
    return ids, 1.5 * torch.rand(tokens, topk, generator=g)


def _moe_dispatch_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (tokens, experts, topk, width, used) in _ROUTES.items():
        x = torch.randn(tokens, width, generator=g).to(dtype)
        yield Sample(name, (x, *_routing(g, tokens, topk, used)), {"num_experts": experts}, (name,))


def _routing_errors(x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[WrongInput]:
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    yield WrongInput("x-shape", (x[0], ids, weights, *rest), kwargs, r"x is .*, expected a floating type \[T, D\]")
    yield WrongInput(
        "ids-type", (x, ids.long(), weights, *rest), kwargs, r"ids is torch.int64 \(3, 2\), expected torch.int32 \[3, K\]"
    )
    yield WrongInput("ids-tokens", (x, ids[:2], weights, *rest), kwargs, r"ids is torch.int32 \(2, 2\)")
    yield WrongInput(
        "weights-shape", (x, ids, weights[:, :1], *rest), kwargs, r"weights is torch.float32 \(3, 1\), expected .*\(3, 2\)"
    )
    yield WrongInput("weights-type", (x, ids, weights.double(), *rest), kwargs, r"weights is torch.float64")


def _moe_dispatch_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, ids, weights = torch.zeros(3, 8, dtype=dtype), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    yield from _routing_errors(x, (), {"num_experts": 4})
    yield WrongInput("no-experts", (x, ids, weights), {"num_experts": 0}, "num_experts is 0")


def _moe_dispatch_cost(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *, num_experts: int) -> Cost:
    rows = ids_TK.numel() * x_TD.shape[1] * x_TD.element_size()
    index = tensors_bytes(ids_TK, weights_TK)
    return Cost(0, 0, rows + index, rows + index + 8 * num_experts, "fp32")


moe_dispatch = Contract(
    name="moe_dispatch",
    reference=_moe_dispatch,
    meta=_moe_dispatch_meta,
    samples=_moe_dispatch_samples,
    errors=_moe_dispatch_errors,
    bound=lambda x_TD, ids_TK, weights_TK, *, num_experts, golden, found: (None,) * 4,
    cost=_moe_dispatch_cost,
)


# ---- moe_combine ----------------------------------------------------------------------------------------------------


def _moe_combine(rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int, compute: torch.dtype = torch.float32) -> Tensor:
    """y[t] = sum of the rows whose flat index t*topk + k belongs to token t, in fp32, by ascending k.

    rows_AD [A, D] any float type; row_index_A int32 [A], distinct entries in 0..tokens*topk-1. A may be less than tokens*topk
    (rows computed elsewhere count as 0). Returns fp32 [tokens, D]. Source: specification section 9 (y accumulates in fp32).
    ValueError for shapes and types that do not fit.
    """
    flat = torch.zeros(tokens * topk, rows_AD.shape[1], dtype=compute)
    flat[row_index_A.long()] = rows_AD.to(compute)
    return flat.reshape(tokens, topk, rows_AD.shape[1]).sum(1)


def _moe_combine_meta(rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int) -> Tensor:
    if not rows_AD.is_floating_point() or rows_AD.dim() != 2:
        raise ValueError(f"moe_combine: rows are {rows_AD.dtype} {tuple(rows_AD.shape)}, expected a floating type [A, D]")
    if row_index_A.shape != rows_AD.shape[:1] or row_index_A.dtype != torch.int32:
        found = f"{row_index_A.dtype} {tuple(row_index_A.shape)}"
        raise ValueError(f"moe_combine: row_index is {found}, expected torch.int32 ({rows_AD.shape[0]},), one per row")
    if tokens < 0 or topk < 1 or rows_AD.shape[0] > tokens * topk:
        raise ValueError(
            f"moe_combine: {rows_AD.shape[0]} rows for tokens={tokens}, topk={topk}; expected at most tokens*topk rows"
        )
    return torch.empty((tokens, rows_AD.shape[1]), dtype=torch.float32, device="meta")


def _moe_combine_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (tokens, _, topk, width, _) in _ROUTES.items():
        rows = torch.randn(tokens * topk, width, generator=g).to(dtype)
        index = torch.randperm(tokens * topk, generator=g).to(torch.int32)
        yield Sample(name, (rows, index), {"tokens": tokens, "topk": topk}, (name,))
        if name in ("odd", "many"):
            part = len(rows) // 2
            yield Sample(f"{name}-partial", (rows[:part], index[:part]), {"tokens": tokens, "topk": topk}, ("partial",))
    yield Sample("none", (rows[:0], index[:0]), {"tokens": 3, "topk": 2}, ("partial",))


def _moe_combine_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    rows, index, kwargs = torch.zeros(6, 4, dtype=dtype), torch.arange(6, dtype=torch.int32), {"tokens": 3, "topk": 2}
    yield WrongInput("index-type", (rows, index.long()), kwargs, r"row_index is torch.int64 \(6,\), expected torch.int32 \(6,\)")
    yield WrongInput("index-length", (rows, index[:5]), kwargs, r"row_index is torch.int32 \(5,\)")
    yield WrongInput("too-many", (rows, index), {"tokens": 2, "topk": 2}, r"6 rows for tokens=2, topk=2")
    yield WrongInput("rows-shape", (rows[0], index), kwargs, r"rows are .*expected a floating type \[A, D\]")


def _moe_combine_bound(
    rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int, golden: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> tuple[Tensor]:
    absolute = _moe_combine(rows_AD.abs(), row_index_A, tokens=tokens, topk=topk, compute=torch.float64)
    return (bounds.accumulate(topk, absolute),)


moe_combine = Contract(
    name="moe_combine",
    reference=_moe_combine,
    meta=_moe_combine_meta,
    samples=_moe_combine_samples,
    errors=_moe_combine_errors,
    bound=_moe_combine_bound,
    cost=lambda rows_AD, row_index_A, *, tokens, topk: Cost(
        0, rows_AD.numel(), tensors_bytes(rows_AD, row_index_A), 4 * tokens * rows_AD.shape[1], "fp32"
    ),
)


# ---- moe_mlp --------------------------------------------------------------------------------------------------------


def _moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Routed experts of each token, summed: moe_dispatch, grouped_experts and moe_combine in one.

    x_TD [T, D] any float type; ids_TK int32 [T, K], entries in 0..E-1; weights_TK fp32 [T, K]; w13 [E, 2I, D] and w2 [E, D, I] of
    one float type. Returns fp32 [T, D]. Source: DeepSeek-V4 specification section 9.
    ValueError for shapes and types that do not fit.
    """
    rows, row_weight, counts, row_index = _moe_dispatch(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
    y_AD = grouped_experts.reference(rows, row_weight, counts, w13, w2, limit=limit, compute=compute)
    return _moe_combine(y_AD, row_index, tokens=ids_TK.shape[0], topk=ids_TK.shape[1], compute=compute)


def _moe_mlp_meta(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
    _check_routing("moe_mlp", x_TD, ids_TK, weights_TK)
    check_limit("moe_mlp", limit)
    check_dense_experts("moe_mlp", x_TD, w13, w2)
    return torch.empty(x_TD.shape, dtype=torch.float32, device="meta")


def _moe_mlp_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    for name, (tokens, experts, topk, width, used) in {**_ROUTES, "flash": (2, 8, 6, 4096, 8)}.items():
        inner, spread = (32, 3.0) if name == "flash" else (11, 9.0 if name == "many" else 2.0)
        x = torch.randn(tokens, width, generator=g).to(dtype)
        w13, w2 = (w.to(dtype) for w in sample_dense(g, experts, width, inner, spread))
        yield Sample(name, (x, *_routing(g, tokens, topk, used), w13, w2), {"limit": 10.0}, (name,))
    x = torch.randn(3, 40, generator=g).to(dtype)
    w13, w2 = sample_dense(g, 5, 40, 24, 9.0)
    yield Sample("mixed", (x, *_routing(g, 3, 2, 5), w13, w2), {"limit": 10.0}, ("mixed", "clamp"))
    w13, w2 = (w.to(dtype) for w in sample_dense(g, 5, 40, 24, 1.0))
    yield Sample("narrow-limit", (x, *_routing(g, 3, 2, 5), w13, w2), {"limit": 0.6}, ("narrow-limit",))
    for name, (counts, width, inner) in ONE_SIDED.items():
        (x, *_), w13, w2 = sample_one_sided(g, counts, width, inner, dtype)
        route = _routing(g, len(x), 2, len(counts))
        yield Sample(name, (x, *route, w13.to(dtype), w2.to(dtype)), {"limit": 10.0}, ("one-sided",))


def _moe_mlp_errors(dtype: torch.dtype) -> Iterator[WrongInput]:
    x, ids, weights = torch.zeros(3, 8, dtype=dtype), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    w13, w2 = torch.zeros(4, 10, 8, dtype=dtype), torch.zeros(4, 8, 5, dtype=dtype)
    yield from _routing_errors(x, (w13, w2), {"limit": 10.0})
    yield WrongInput("w13-width", (x, ids, weights, w13[:, :, :5], w2), {"limit": 10.0}, r"w13 has shape \(4, 10, 5\)")
    yield WrongInput(
        "w2-shape", (x, ids, weights, w13, w2[:3]), {"limit": 10.0}, r"w2 has shape \(3, 8, 5\), expected \(4, 8, 5\)"
    )
    yield WrongInput("limit", (x, ids, weights, w13, w2), {"limit": 0.0}, r"limit is 0.0")


def _moe_mlp_bound(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float, golden: Any, found: Any
) -> tuple[Tensor]:
    rows, row_weight, counts, row_index = _moe_dispatch(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
    args = (rows, row_weight, counts, w13, w2)
    y = grouped_experts.reference(*args, limit=limit, compute=torch.float64)
    (error,) = grouped_experts.bound(*args, limit=limit, golden=(y,), found=(y,))
    shape: dict[str, Any] = {"tokens": ids_TK.shape[0], "topk": ids_TK.shape[1], "compute": torch.float64}
    error = error + bounds.roundoff(x_TD.dtype) * y.abs()  # an expert's output may be rounded to x's type before the sum
    return (
        _moe_combine(error, row_index, **shape) + bounds.accumulate(ids_TK.shape[1], _moe_combine(y.abs(), row_index, **shape)),
    )


def _moe_mlp_cost(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Cost:
    rows, (experts, width, inner) = ids_TK.numel(), w2.shape
    read = min(rows, experts) if ids_TK.device.type == "meta" else len(ids_TK.unique())
    weight_bytes = tensors_bytes(w13, w2) // max(experts, 1) * read
    return Cost(
        2 * rows * 3 * inner * width,
        9 * rows * inner + rows * width,
        tensors_bytes(x_TD, ids_TK, weights_TK) + weight_bytes,
        4 * x_TD.numel(),
        "bf16",
    )


def _moe_mlp_compose(ops: Any) -> Callable[..., Tensor]:
    def composed(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *, limit: float) -> Tensor:
        rows, row_weight, counts, row_index = ops.moe_dispatch(x_TD, ids_TK, weights_TK, num_experts=w13.shape[0])
        y_AD = ops.grouped_experts(rows, row_weight, counts, w13, w2, limit=limit)
        return ops.moe_combine(y_AD, row_index, tokens=ids_TK.shape[0], topk=ids_TK.shape[1])

    return composed


moe_mlp = Contract(
    name="moe_mlp",
    reference=_moe_mlp,
    meta=_moe_mlp_meta,
    samples=_moe_mlp_samples,
    errors=_moe_mlp_errors,
    bound=_moe_mlp_bound,
    cost=_moe_mlp_cost,
    compose=_moe_mlp_compose,
    parts=("moe_dispatch", "grouped_experts", "moe_combine"),
)
