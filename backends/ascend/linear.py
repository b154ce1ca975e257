"""Products of dense weights: the grouped output projection in one call. Plain linear layers are torch's own matmul, which is the vendor's.

Shapes as in ops/linear_dense.py. Source: Ascend operator notes, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.linear import grouped_linear

TRANSPOSE_BMM = "npu::npu_transpose_batchmatmul"
_HALVES = (torch.bfloat16, torch.float16)
_MULTIPLE = 16
_LARGEST = 65536
"""K times groups must stay below: Flash's 4096 * 8 does, Pro's 4096 * 16 does not."""


def _transpose_bmm_when(x_TGK: Tensor, weight_GNK: Tensor) -> bool:
    groups, n, k = weight_GNK.shape
    fits = n % _MULTIPLE == 0 and k % _MULTIPLE == 0 and k * groups < _LARGEST
    # the op takes [G, K, N]: the weight must lie in memory that way round, as weight preparation leaves it
    return fits and x_TGK.shape[0] > 0 and x_TGK.is_contiguous() and weight_GNK.transpose(1, 2).is_contiguous()


@grouped_linear.implement(
    "ascend", name="npu_transpose_batchmatmul", dtypes=_HALVES, needs=(TRANSPOSE_BMM,), when=_transpose_bmm_when
)  # fmt: skip
def _grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    y: Tensor = torch.ops.npu.npu_transpose_batchmatmul(
        input=x_TGK, weight=weight_GNK.transpose(1, 2), perm_x1=(1, 0, 2), perm_x2=(0, 1, 2), perm_y=(1, 0, 2), batch_split_factor=1
    )
    return y


@grouped_linear.implement(
    "ascend", name="torch.matmul", dtypes=_HALVES, when=lambda x_TGK, weight_GNK: weight_GNK.dtype == x_TGK.dtype, note="one product of all groups"
)  # fmt: skip
def _grouped_matmul(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    return torch.matmul(x_TGK.transpose(0, 1), weight_GNK.transpose(1, 2)).transpose(0, 1).contiguous()
