"""Matrix products."""

from __future__ import annotations

from torch import Tensor

from tools.npu_standin.aclnn import code, fp4_code, model, put
from tools.npu_standin.host import bridge

_BITS = 0xFFFF


def _groups(packed: int) -> list[int] | None:
    """Group sizes m, n, k out of one integer of 16 bits each; None when it is 0."""
    return [packed >> 32 & _BITS, packed >> 16 & _BITS, packed & _BITS] if packed else None


def _given(tensor: Tensor | None) -> Tensor | None:
    """None for the empty tensor by which the host says that an argument is absent."""
    return tensor if tensor is not None and tensor.numel() else None


@bridge(
    "aclnnQuantMatmulV5",
    "x1:t x2:t row_scale:t scale:t y_scale:t row_offset:t offset:t y_offset:t bias:t transpose1:b transpose2:b groups:i y:t",
)
def quant_matmul(
    x1: Tensor, x2: Tensor, row_scale: Tensor | None, scale: Tensor, y_scale: Tensor | None, row_offset: Tensor | None,
    offset: Tensor | None, y_offset: Tensor | None, bias: Tensor | None, transpose1: bool, transpose2: bool, groups: int, y: Tensor,
) -> None:  # fmt: skip
    """npu_quant_matmul; the host passes transposed operands as views, so the flags are off."""
    if transpose1 or transpose2:
        raise NotImplementedError("aclnnQuantMatmulV5 with transpose flags")
    result = model("npu::npu_quant_matmul")(
        x1, x2, scale, offset=_given(offset), pertoken_scale=_given(row_scale), bias=bias, output_dtype=code(y), x1_dtype=fp4_code(x1),
        x2_dtype=fp4_code(x2), pertoken_scale_dtype=None if row_scale is None else code(row_scale), scale_dtype=code(scale),
        group_sizes=_groups(groups), y_scale=_given(y_scale),
    )  # fmt: skip
    put(result, y)


@bridge("aclnnTransposeBatchMatMul", "x:t weight:t bias:t scale:t perm_x1:I perm_x2:I perm_y:I cube_math:w split:w y:t")
def transpose_batchmatmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, perm_x1: list[int], perm_x2: list[int], perm_y: list[int],
    cube_math: int, split: int, y: Tensor,
) -> None:  # fmt: skip
    """npu_transpose_batchmatmul; cube_math 0 keeps the precision of the operands."""
    result = model("npu::npu_transpose_batchmatmul")(
        x, weight, bias=bias, scale=scale, perm_x1=perm_x1, perm_x2=perm_x2, perm_y=perm_y, batch_split_factor=split
    )
    put(result, y)


_GROUPED = (
    "x:T weight:T bias:T scale:T offset:T antiquant_scale:T antiquant_offset:T per_token_scale:T group_list:t activation_input:T"
    " activation_quant_scale:T activation_quant_offset:T split_item:i group_type:i group_list_type:i act_type:i"
)


def _grouped(
    x: list[Tensor], weight: list[Tensor], scale: list[Tensor] | None, antiquant_scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None, y: list[Tensor], **rest: object,
) -> None:  # fmt: skip
    names = ("activation_feature", "dynamic_scale")
    if unexpected := [n for n in names if rest.pop(n, None) is not None]:
        raise NotImplementedError(f"grouped product with outputs {unexpected}")
    results = model("npu::npu_grouped_matmul")(
        x, weight, scale=scale, antiquant_scale=antiquant_scale, per_token_scale=per_token_scale, output_dtype=code(y[0]),
        x_dtype=fp4_code(x[0]), weight_dtype=fp4_code(weight[0]), scale_dtype=code(scale[0]) if scale else None,
        per_token_scale_dtype=code(per_token_scale[0]) if per_token_scale else None, **rest,
    )  # fmt: skip
    put(results, *y)


@bridge("aclnnGroupedMatmulV5", f"{_GROUPED} tuning_config:I y:T activation_feature:T dynamic_scale:T")
def grouped_matmul(**arguments: object) -> None:
    """npu_grouped_matmul."""
    _grouped(**arguments)  # type: ignore[arg-type]


@bridge("aclnnGroupedMatmulV4", f"{_GROUPED} y:T activation_feature:T dynamic_scale:T")
def grouped_matmul_v4(**arguments: object) -> None:
    """npu_grouped_matmul without tuning."""
    _grouped(**arguments)  # type: ignore[arg-type]
