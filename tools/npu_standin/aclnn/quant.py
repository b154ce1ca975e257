"""Dynamic quantisation."""

from __future__ import annotations

from torch import Tensor

from tools.npu_standin.aclnn import ACL_CODES, code, model, put
from tools.npu_standin.host import bridge


@bridge("aclnnDynamicQuantV2", "x:t smooth:t group_index:t dst_type:w y:t scale:t offset:t")
def dynamic_quant(
    x: Tensor, smooth: Tensor | None, group_index: Tensor | None, dst_type: int, y: Tensor, scale: Tensor, offset: Tensor | None
) -> None:
    """npu_dynamic_quant, per token."""
    put(
        model("npu::npu_dynamic_quant")(x, smooth_scales=smooth, group_index=group_index, dst_type=ACL_CODES + dst_type), y, scale
    )


@bridge(
    "aclnnDynamicQuantV4",
    "x:t smooth:t group_index:t dst_type:w symmetric:b quant_mode:s dst_type_max:f y:t scale:t offset:t",
)
def dynamic_quant_v4(
    x: Tensor, smooth: Tensor | None, group_index: Tensor | None, dst_type: int, symmetric: bool, quant_mode: str, dst_type_max: float,
    y: Tensor, scale: Tensor, offset: Tensor | None,
) -> None:  # fmt: skip
    """npu_dynamic_quant with another mode or bound."""
    results = model("npu::npu_dynamic_quant")(
        x,
        smooth_scales=smooth,
        group_index=group_index,
        dst_type=ACL_CODES + dst_type,
        quant_mode=quant_mode,
        dst_type_max=dst_type_max,
    )
    put(results, y, scale)


@bridge("aclnnDynamicBlockQuantV2", "x:t min_scale:d round_mode:s dst_type:w rows:i columns:i dst_type_max:d y:t scale:t")
def dynamic_block_quant(
    x: Tensor,
    min_scale: float,
    round_mode: str,
    dst_type: int,
    rows: int,
    columns: int,
    dst_type_max: float,
    y: Tensor,
    scale: Tensor,
) -> None:
    """npu_dynamic_block_quant."""
    results = model("npu::npu_dynamic_block_quant")(
        x, min_scale=min_scale, round_mode=round_mode, dst_type=ACL_CODES + dst_type, row_block_size=rows, col_block_size=columns,
        dst_type_max=dst_type_max,
    )  # fmt: skip
    put(results, y, scale)


@bridge(
    "aclnnDynamicMxQuantV3",
    "x:t axis:i round_mode:s dst_type:w block_size:i scale_alg:i dst_type_max:d max_low_bound:d y:t scale:t",
)
def dynamic_mx_quant(
    x: Tensor, axis: int, round_mode: str, dst_type: int, block_size: int, scale_alg: int, dst_type_max: float, max_low_bound: float,
    y: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """npu_dynamic_mx_quant."""
    results = model("npu::npu_dynamic_mx_quant")(
        x, axis=axis, round_mode=round_mode, dst_type=ACL_CODES + dst_type, block_size=block_size, scale_alg=scale_alg,
        dst_type_max=dst_type_max, max_low_bound=max_low_bound,
    )  # fmt: skip
    put(results, y, scale)


@bridge("aclnnAntiMxQuant", "x:t scale:t axis:i dst_type:w y:t")
def anti_mx_quant(x: Tensor, scale: Tensor, axis: int, dst_type: int, y: Tensor) -> None:
    """npu_anti_mx_quant; what the bytes are stands in the descriptor of x."""
    put(model("npu::npu_anti_mx_quant")(x, scale, axis=axis, dst_type=ACL_CODES + dst_type, src_type=code(x)), y)
