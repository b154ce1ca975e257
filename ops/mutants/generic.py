"""Faults that any kernel with a floating result can have: lost tails, swapped rows, single wrong elements, wrong roundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.contract import CONTRACTS
from ops.mutants.core import BOTH, mutant

FLOAT_OUTPUT = (
    "rms_norm", "unit_rms_norm", "add_rms_norm", "q_norm_rope", "rope", "dequant_fp8", "dequant_fp8_block", "dequant_mxfp4",
    "dequant_int8", "roundtrip_fp8", "roundtrip_fp4", "hadamard", "linear", "linear_fp8", "linear_fp4", "linear_int8", "grouped_linear",
    "hc_pre", "hc_post", "hc_head", "compress", "sparse_attention", "gate_topk", "gate_hash", "clamped_swiglu", "grouped_experts",
    "grouped_experts_fp4", "grouped_experts_fp8", "grouped_experts_int8", "moe_combine", "moe_mlp",
    "linear_mx", "norm_rope", "moe_int8", "moe_mx",
)  # fmt: skip
"""Ops whose first result is floating."""

_SUMS = (
    "rms_norm", "unit_rms_norm", "add_rms_norm", "q_norm_rope", "linear", "linear_fp8", "linear_fp4", "linear_int8", "grouped_linear",
    "hc_pre", "hc_post", "hc_head", "compress", "sparse_attention", "clamped_swiglu", "grouped_experts", "moe_combine", "moe_mlp", "rope",
    "hadamard",
)  # fmt: skip


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _on_first(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        if isinstance(found, Tensor):
            return change(_copy(found)) if found.numel() else found
        first = change(_copy(found[0])) if found[0].numel() else found[0]
        return (first, *found[1:])

    return body


def _tail(y: Tensor) -> Tensor:
    y[..., -max(y.shape[-1] // 16, 1) :] = 0
    return y


def _swap(y: Tensor) -> Tensor:
    y[[0, -1]] = y[[-1, 0]]
    return y


def _stale(y: Tensor) -> Tensor:
    y[-1] = y[-2] if y.shape[0] > 1 else 0
    return y


def _one(y: Tensor) -> Tensor:
    flat = y.view(-1)
    i = int(torch.nan_to_num(flat.float().abs(), 0, 0, 0).argmax())
    flat[i] = flat[i] * 1.5
    return y


def _nan(y: Tensor) -> Tensor:
    y.view(-1)[y.numel() // 2] = float("nan")
    return y


mutant(FLOAT_OUTPUT, "tail_lost", "the last sixteenth of each row is left at zero")(_on_first(_tail))
mutant(FLOAT_OUTPUT, "rows_swapped", "first and last row change places")(_on_first(_swap))
mutant(FLOAT_OUTPUT, "last_row_stale", "the last row repeats the one before it")(_on_first(_stale))
mutant(FLOAT_OUTPUT, "one_element", "the largest element is 1.5 times what it should be")(_on_first(_one))
mutant(FLOAT_OUTPUT, "nan", "one element is NaN")(_on_first(_nan))
mutant(FLOAT_OUTPUT, "scaled", "everything is 0.5 percent too large")(_on_first(lambda y: (y.float() * 1.005).to(y.dtype)))
mutant(FLOAT_OUTPUT, "column_major", "results lie column by column in memory, under the right shape")(
    _on_first(lambda y: y.transpose(0, -1).contiguous().transpose(0, -1))
)
_EXACT_IN_BF16 = {"dequant_fp8", "dequant_fp8_block", "dequant_mxfp4", "roundtrip_fp4"}
mutant(
    [op for op in FLOAT_OUTPUT if op not in _EXACT_IN_BF16],
    "through_bf16",
    "results are stored in bf16 on the way to fp32",
    dtypes=(torch.float32,),
)(_on_first(lambda y: y.bfloat16().to(y.dtype)))


def toward_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to bf16 by dropping bits."""
    return (x.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _truncates(op: str) -> Callable[..., Any]:
    def body(call: Any, *args: Any, **kwargs: Any) -> Any:
        contract = CONTRACTS[op]
        shapes = contract.meta(*args, **kwargs)
        found = contract.reference(*args, compute=torch.float32, **kwargs)
        if isinstance(found, Tensor):
            return toward_zero(found, shapes.dtype) if shapes.dtype == torch.bfloat16 else found.to(shapes.dtype)
        return tuple(
            toward_zero(f, s.dtype) if s.dtype == torch.bfloat16 else f.to(s.dtype) for f, s in zip(found, shapes, strict=True)
        )

    return body


for _op in _SUMS:
    if _op not in ("moe_combine", "moe_mlp"):  # their results are fp32
        mutant(_op, "truncated", "results are cut off instead of rounded to bf16", dtypes=(torch.bfloat16,))(_truncates(_op))


def _written(call: Any, *args: Any, **kwargs: Any) -> Any:
    found = call(*args, **kwargs)
    first = next(a for a in args if isinstance(a, Tensor))
    if first.numel():
        bits = first.view(torch.uint8)
        bits.reshape(-1)[:1] ^= 1
    return found


mutant(FLOAT_OUTPUT, "argument_written", "the first argument is used as scratch space", dtypes=BOTH)(_written)
