"""Products of grouped rows with one weight per expert. Shapes: M rows, E experts, K inputs, N outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.npu_standin.models import OLDER, model, needed, require, require_dtype, require_shape, soc, undefined
from tools.npu_standin.models.blocks import mx_values, pack, unpack
from tools.npu_standin.models.codes import FP4_E2M1, type_of

CUMULATED, COUNTS, PAIRS = 0, 1, 2
OP = "npu_grouped_matmul"


def group_slices(group_list: Tensor, kind: int, rows: int, experts: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every group."""
    require_dtype(OP, "group_list", group_list, torch.int64)
    if kind == PAIRS:
        require_shape(OP, "group_list", group_list, None, 2)
        names, counts = group_list[:, 0].tolist(), group_list[:, 1].tolist()
    else:
        require(kind in (CUMULATED, COUNTS), OP, f"group_list_type {kind}", "0 cumulative, 1 counts, 2 pairs")
        require_shape(OP, "group_list", group_list, experts)
        names = list(range(experts))
        given = group_list.tolist()
        counts = given if kind == COUNTS else [b - a for a, b in zip([0, *given[:-1]], given, strict=True)]
    require(all(c >= 0 for c in counts), OP, f"group_list {group_list.tolist()} of type {kind}",
            "rows that do not decrease (type 0, the default, is cumulative; type 1 is counts)")  # fmt: skip
    require(sum(counts) <= rows, OP, f"groups of {sum(counts)} rows", f"at most {rows} rows")
    ends = torch.tensor(counts).cumsum(0).tolist() if counts else []
    return [(e, end - c, end) for e, c, end in zip(names, counts, ends, strict=True)]


def _only(name: str, values: list[Tensor] | None) -> Tensor | None:
    if not values:
        return None
    require(len(values) == 1, OP, f"{len(values)} tensors in {name}", "one")
    return values[0]


def _mx_weight(codes_NK: Tensor, scale: Tensor, kind: torch.dtype | str) -> Tensor:
    """Weight [K, N] of one expert from its rows of outputs [N, K] (fp4: bytes [N, K/2]) and scales [K/64, N, 2].

    The pairs of scales stay together, also where the hub keeps [N, K/32].
    """
    require_shape(OP, "scale of an expert", scale, None, codes_NK.shape[0], 2)
    return mx_values(codes_NK, scale.transpose(0, 1), kind).T


@dataclass(frozen=True)
class Operands:
    """x [M, K] as numbers, the weight [K, N] of an expert as numbers, and what multiplies the sums: per column [E, N], per row [M]."""

    left: Tensor
    right: Callable[[int], Tensor]
    columns: int
    column_scale: Tensor | None = None
    row_scale: Tensor | None = None


def _is_e8m0(code: int | None) -> bool:
    return code is not None and type_of(code) == torch.float8_e8m0fnu


def _mx_operands(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    antiquant: Tensor | None,
    row_scale: Tensor | None,
    kinds: dict[str, int | None],
) -> Operands:
    x_kind = type_of(kinds["x"]) if kinds["x"] is not None else x.dtype
    w_kind = type_of(kinds["weight"]) if kinds["weight"] is not None else weight.dtype
    require(soc() not in OLDER, OP, f"{x_kind} x {w_kind} on {soc()}", "fp8 and fp4 on 950 only")
    require(w_kind != torch.uint8, OP, "uint8 weight without weight_dtype", "weight_dtype=296 for fp4")
    require(_is_e8m0(kinds["row"]), OP, f"per_token_scale_dtype {kinds['row']}", "293 (MX)")
    rows = needed(OP, "per_token_scale [M, K/64, 2]", row_scale)
    if antiquant is not None:
        require(
            x.dtype == torch.float8_e4m3fn and w_kind == FP4_E2M1, OP, f"{x.dtype} x {w_kind}", "e4m3 x fp4 with antiquant_scale"
        )
        a8w4 = lambda e: _mx_weight(weight[e].T, antiquant[e], FP4_E2M1)  # noqa: E731
        return Operands(mx_values(x, rows, x.dtype), a8w4, weight.shape[2])
    require(_is_e8m0(kinds["scale"]), OP, f"scale_dtype {kinds['scale']}", "293 (MX)")
    table = needed(OP, "scale [E, K/64, N, 2]", scale)
    if w_kind == FP4_E2M1:  # weight [E, K, N/2], or [E, K/2, N] seen from [E, N, K/2]
        legal = x.dtype == torch.uint8 and x_kind == FP4_E2M1
        require(legal, OP, f"x {x.dtype} as {x_kind}", "uint8 x with x_dtype=296: without it N is read as N/2")
        if weight.shape[1] == x.shape[1]:
            return Operands(mx_values(x, rows, FP4_E2M1), lambda e: _mx_weight(weight[e].T, table[e], FP4_E2M1), weight.shape[2])
        a4w4 = lambda e: _mx_weight(pack(unpack(weight[e]).T), table[e], FP4_E2M1)  # noqa: E731
        return Operands(mx_values(x, rows, FP4_E2M1), a4w4, weight.shape[2] * 2)
    require_dtype(OP, "weight", weight, torch.float8_e4m3fn, torch.float8_e5m2)
    return Operands(mx_values(x, rows, x.dtype), lambda e: _mx_weight(weight[e].T, table[e], weight.dtype), weight.shape[2])


def _operands(x: Tensor, weight: Tensor, scale: Tensor | None, row_scale: Tensor | None) -> Operands:
    if x.dtype == torch.int8:
        require_dtype(OP, "weight", weight, torch.int8)
        if scale is not None:
            require_dtype(OP, "scale", scale, torch.bfloat16, torch.float32)
            require_shape(OP, "scale", scale, weight.shape[0], weight.shape[2])
        if row_scale is not None:
            require_dtype(OP, "per_token_scale", row_scale, torch.float32)
            require_shape(OP, "per_token_scale", row_scale, x.shape[0])
        return Operands(x.double(), lambda e: weight[e].double(), weight.shape[2], scale, row_scale)
    require_dtype(OP, "x", x, torch.bfloat16, torch.float16, torch.float32)
    require_dtype(OP, "weight", weight, x.dtype)
    require(scale is None and row_scale is None, OP, "scales with floating operands", "none")
    return Operands(x.float(), lambda e: weight[e].float(), weight.shape[2])


def _output_type(x: Tensor, scale: Tensor | None, output_dtype: int | None) -> torch.dtype:
    wanted = None if output_dtype is None else type_of(output_dtype)
    if x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        require(wanted in (None, x.dtype), OP, f"output_dtype {wanted}", f"the type of x, {x.dtype}")
        return x.dtype
    if x.dtype != torch.int8:
        require(
            wanted in (torch.bfloat16, torch.float16, torch.float32),
            OP,
            f"output_dtype {wanted}",
            "bf16, fp16 or fp32, passed explicitly",
        )
        assert isinstance(wanted, torch.dtype)
        return wanted
    if scale is None:
        require(wanted == torch.int32, OP, f"output_dtype {wanted} without scale", "int32")
        return torch.int32
    fitting = torch.bfloat16 if scale.dtype == torch.bfloat16 else torch.float16
    require(
        wanted == fitting,
        OP,
        f"output_dtype {wanted} with a scale of {scale.dtype}",
        "bf16 scale for bf16 output, fp32 scale for fp16",
    )
    return fitting


@model("npu::npu_grouped_matmul")
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    offset: list[Tensor] | None = None,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: list[Tensor] | None = None,
    activation_quant_scale: list[Tensor] | None = None,
    activation_quant_offset: list[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """A list of one [M, N]: rows of group e times weight[e]. group_list is cumulative unless group_list_type says 1 (counts) or 2 (pairs).

    Modelled: one x, one weight, split_item 2 or 3, group_type 0; bf16/fp16/fp32, int8 x int8 (W8A8), and on 950 the MX pairs
    e4m3 x e4m3, e4m3 x fp4 (antiquant_scale) and fp4 x fp4. Rows behind the last group are undefined.
    """
    rows, table = needed(OP, "x", _only("x", x)), needed(OP, "weight", _only("weight", weight))
    unused = (offset, antiquant_offset, activation_input, activation_quant_scale, activation_quant_offset)
    require(not any(unused) and not act_type, OP, "offsets or activations", "none (not modelled)")
    require(split_item in (2, 3), OP, f"split_item {split_item}", "2 or 3 (one output)")
    require(group_type == 0, OP, f"group_type {group_type}", "group_type 0 with a tensor group_list")
    groups = needed(OP, "group_list", group_list)
    require(
        rows.dim() == 2 and table.dim() == 3,
        OP,
        f"x {list(rows.shape)}, weight {list(table.shape)}",
        "x [M, K], weight [E, K, N]",
    )
    require(
        table.shape[0] <= 1024 and max(rows.shape[1], *table.shape[1:]) < 65536,
        OP,
        f"weight {list(table.shape)}",
        "E <= 1024, K and N below 65536",
    )
    per_channel, antiquant, per_row = (
        _only("scale", scale),
        _only("antiquant_scale", antiquant_scale),
        _only("per_token_scale", per_token_scale),
    )
    kind = _output_type(rows, per_channel, output_dtype)
    if torch.uint8 in (rows.dtype, table.dtype) or rows.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        kinds = {"x": x_dtype, "weight": weight_dtype, "scale": scale_dtype, "row": per_token_scale_dtype}
        parts = _mx_operands(rows, table, per_channel, antiquant, per_row, kinds)
    else:
        require(antiquant is None, OP, "antiquant_scale", "none for this pair of types")
        parts = _operands(rows, table, per_channel, per_row)
    return [
        _products(
            parts,
            group_slices(groups, int(group_list_type or 0), rows.shape[0], table.shape[0]),
            _only("bias", bias),
            rows,
            table,
            kind,
        )
    ]


def _products(
    parts: Operands, groups: list[tuple[int, int, int]], bias: Tensor | None, x: Tensor, weight: Tensor, kind: torch.dtype
) -> Tensor:
    if bias is not None:
        require_dtype(OP, "bias", bias, {torch.bfloat16: torch.float32, torch.int8: torch.int32}.get(x.dtype, x.dtype))
        require_shape(OP, "bias", bias, weight.shape[0], parts.columns)
    y = undefined((x.shape[0], parts.columns), kind)
    for e, first, end in groups:
        if first == end:
            continue
        right = parts.right(e)
        require(
            parts.left.shape[1] == right.shape[0], OP, f"K = {parts.left.shape[1]} in x and {right.shape[0]} in weight", "equal K"
        )
        product = parts.left[first:end] @ right
        product = product if bias is None else product + bias[e]
        product = product if parts.column_scale is None else product.float() * parts.column_scale[e].float()
        y[first:end] = (product if parts.row_scale is None else product * parts.row_scale[first:end, None]).to(kind)
    return y
