"""Ops without caches: one call per token, declared by the arguments that hold a row per token.

Shapes: T tokens (rows of dimension 0), A rows sorted by expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backends import cpu
from ops.contract import CONTRACTS, Contract
from ops.experts_math import segments
from ops.registry import signature

__all__ = ["DELEGATED", "ROWS", "cpu", "fresh", "register"]

BACKEND = "cpu_invariant"

# op: arguments whose dimension 0 counts tokens; an optional one may be absent
ROWS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("x",),
    "unit_rms_norm": ("x",),
    "add_rms_norm": ("x", "residual"),
    "rope": ("x", "cos_TR2", "sin_TR2"),
    "q_norm_rope": ("q_THC", "cos_TR2", "sin_TR2"),
    "hadamard": ("x",),
    "linear": ("x",),
    "linear_fp8": ("x", "x_scale"),
    "linear_fp4": ("x", "x_scale"),
    "linear_int8": ("x", "x_scale"),
    "linear_mx": ("x", "x_scale"),
    "grouped_linear": ("x_TGK",),
    "hc_pre": ("streams_TnD",),
    "hc_post": ("y_TD", "streams_TnD", "post_Tn", "comb_Tnn"),
    "hc_head": ("streams_TnD",),
    "gate_topk": ("x_TD",),
    "gate_hash": ("x_TD", "token_ids_T"),
    "clamped_swiglu": ("gate_up_T2I", "row_weight"),
    "moe_mlp": ("x_TD", "ids_TK", "weights_TK"),
    "moe_mx": ("x_TD", "ids_TK", "weights_TK"),
    "sample": ("logits_BV", "temperature_B", "top_k_B", "top_p_B", "uniform_B"),
}
# op: the weights that hold a matrix per expert
EXPERTS: dict[str, tuple[str, ...]] = {
    "grouped_experts": ("w13", "w2"),
    "grouped_experts_fp4": ("w13", "s13", "w2", "s2"),
    "grouped_experts_fp8": ("w13", "s13", "w2", "s2"),
    "grouped_experts_int8": ("w13", "s13", "w2", "s2"),
}
# copies, and results of which the contract defines every bit
DELEGATED = (
    *("quant_fp8", "quant_mxfp8", "quant_mxfp4", "quant_int8", "roundtrip_fp8", "roundtrip_fp4"),
    *("dequant_fp8", "dequant_fp8_block", "dequant_mxfp4", "dequant_int8"),
    *("cache_insert", "cache_insert_fp8", "index_insert_fp8", "index_insert_fp4"),
    *("moe_dispatch", "argmax", "all_reduce", "all_gather", "all_to_all"),
)


def fresh(x: Tensor, first: int, end: int) -> Tensor:
    """Rows first..end-1 of x as a new contiguous tensor: the same bits at the same alignment wherever they came from."""
    return x[first:end].clone(memory_format=torch.contiguous_format)


def register(op: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Make `wrap(cpu implementation)` this backend's implementation of `op`; nothing when the cpu backend composes the op."""
    contract = CONTRACTS[op]
    if (impl := contract.impls.get("cpu")) is None:
        return
    fn = wrap(impl.fn)
    fn.__signature__ = signature(contract)  # type: ignore[attr-defined]
    note = "cpu" if op in DELEGATED else "one token at a time"
    contract.implement(BACKEND, dtypes=tuple(impl.dtypes), needs=impl.needs, when=impl.when, note=note)(fn)


def _joined(results: Sequence[Any]) -> Any:
    if isinstance(results[0], Tensor):
        return torch.cat(list(results))
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def _per_row(contract: Contract, names: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    bind = signature(contract).bind

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = bind(*args, **kwargs)
            rows = {n: bound.arguments[n] for n in names if isinstance(bound.arguments.get(n), Tensor)}
            first = next(iter(rows.values()))
            if first.dim() == 1:  # one row without a token dimension
                bound.arguments[names[0]] = first.clone(memory_format=torch.contiguous_format)
                return fn(*bound.args, **bound.kwargs)
            if not (count := first.shape[0]):
                return fn(*args, **kwargs)
            results = []
            for t in range(count):
                bound.arguments.update({name: fresh(value, t, t + 1) for name, value in rows.items()})
                results.append(fn(*bound.args, **bound.kwargs))
            return _joined(results)

        return call

    return wrap


def _per_expert_row(contract: Contract, weights: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    bind = signature(contract).bind
    one = torch.ones(1, dtype=torch.int64)

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            bound = bind(*args, **kwargs)
            given = dict(bound.arguments)
            rows_AD, row_weight_A = given["rows_AD"], given["row_weight_A"]
            y_AD = torch.empty_like(rows_AD)
            bound.arguments["counts_E"] = one
            for e, i, j in segments(given["counts_E"]):
                bound.arguments.update({name: given[name][e : e + 1] for name in weights})
                for a in range(i, j):
                    bound.arguments["rows_AD"] = fresh(rows_AD, a, a + 1)
                    bound.arguments["row_weight_A"] = fresh(row_weight_A, a, a + 1)
                    y_AD[a : a + 1] = fn(*bound.args, **bound.kwargs)
            return y_AD

        return call

    return wrap


def _combine(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(rows_AD: Tensor, row_index_A: Tensor, *, tokens: int, topk: int) -> Tensor:
        index, order = torch.sort(row_index_A)
        ends = torch.searchsorted(index, torch.arange(tokens + 1, dtype=index.dtype) * topk).tolist()
        y_TD = torch.empty(tokens, rows_AD.shape[1])
        for t in range(tokens):
            mine = order[ends[t] : ends[t + 1]]
            y_TD[t : t + 1] = fn(rows_AD[mine], row_index_A[mine] - t * topk, tokens=1, topk=topk)
        return y_TD

    return call


def _as_is(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


for _op, _names in ROWS.items():
    register(_op, _per_row(CONTRACTS[_op], _names))
for _op, _names in EXPERTS.items():
    register(_op, _per_expert_row(CONTRACTS[_op], _names))
for _op in DELEGATED:
    register(_op, _as_is)
register("moe_combine", _combine)
