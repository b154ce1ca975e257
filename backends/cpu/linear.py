"""Linear layers on the CPU: oneDNN's product where it is the faster one, torch's otherwise; packed weights decoded in row blocks.

Shapes as in ops/linear.py. For large fp32 weights oneDNN spreads even a single row over the threads and reads at close to memory
bandwidth, where the BLAS that torch calls stays on one thread (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backends.cpu.quant import fp4_values, fp8_values, scale_blocks_, scale_groups_
from ops.linear import grouped_linear, linear, linear_fp4, linear_fp8, linear_int8, out_type
from ops.linear_mx import linear_mx

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_onednn = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None
_product = torch.nn.functional.linear
# oneDNN costs about 13 microseconds more per call: as long as reading this many fp32 weights takes, or multiplying so many rows
_ONEDNN_WEIGHTS, _ONEDNN_ROWS = 1 << 18, 64
_BF16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# two rows (one drafted token) of at most this width go through BLAS faster with the weight as the left operand
_PAIR_WIDTH = 1024
# bytes of decoded weights in flight: a share of the second-level cache for few tokens, more when the product dominates
_FEW, _MANY, _TOKENS = 2 << 20, 16 << 20, 64


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T for operands of one float type, fp32 accumulation; returns [M, N] in that type."""
    rows = x.shape[0]
    if rows and x.dtype == torch.float32 and _onednn is not None and x.device.type == "cpu" and (rows >= _ONEDNN_ROWS or w.numel() >= _ONEDNN_WEIGHTS):
        if rows == 2 and x.shape[1] <= _PAIR_WIDTH:
            return torch.mm(w, x.t()).t().contiguous()
        return _onednn(x, w, None, "none", [], "")
    return _product(x, w)


def _row_blocks(x: Tensor, rows: int, out: torch.dtype, itemsize: int, decode: Callable[[int, int], Tensor]) -> Tensor:
    """x [T, K] @ w.T, `decode(i, j)` giving rows i..j of w in x's type: the widened weight never exists as a whole."""
    held = _FEW if x.shape[0] < _TOKENS else _MANY
    step = max(held // max(itemsize * x.shape[1], 1) // 128, 1) * 128
    if rows <= step:
        return matmul_nt(x, decode(0, rows)).to(out)
    y = x.new_empty(x.shape[0], rows, dtype=out)
    for i in range(0, rows, step):
        y[:, i : i + step] = matmul_nt(x, decode(i, min(i + step, rows)))
    return y


@linear.implement("cpu")
def _linear(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    out = out_dtype or x.dtype
    if x.dim() != 2:
        flat = _linear(x.reshape(-1, x.shape[-1]), weight_NK, out_dtype=out_dtype)
        return flat.view(*x.shape[:-1], weight_NK.shape[0])
    if x.dtype != weight_NK.dtype or out.itemsize > x.dtype.itemsize:
        wide = torch.promote_types(torch.promote_types(x.dtype, weight_NK.dtype), torch.float32)
        return _row_blocks(x.to(wide), weight_NK.shape[0], out, wide.itemsize, lambda i, j: weight_NK[i:j].to(wide))
    y = matmul_nt(x, weight_NK)
    return y if out == x.dtype else y.to(out)


def _activations(x: Tensor, x_scale: Tensor | None, out: torch.dtype, group: int = 128) -> Tensor:
    """Activations in the type of the product: bf16 where that is exact for both operands and the result is bf16, else fp32."""
    narrow = torch.bfloat16 if _BF16 and out == torch.bfloat16 and (x_scale is not None or x.dtype == out) else torch.float32
    return x.to(narrow) if x_scale is None else scale_groups_(fp8_values(x, narrow), x_scale, group)


@linear_fp8.implement("cpu")
def _linear_fp8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = out_type(x, out_dtype)
    a_TK = _activations(x, x_scale, out)

    def decode(i: int, j: int) -> Tensor:
        return scale_blocks_(fp8_values(weight_NK[i:j], a_TK.dtype), scale[i // 128 : -(-j // 128)])

    return _row_blocks(a_TK, weight_NK.shape[0], out, a_TK.dtype.itemsize, decode)


@linear_mx.implement("cpu")
def _linear_mx(x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    a_TK = _activations(x, x_scale, out_dtype, 32)

    def decode(i: int, j: int) -> Tensor:
        return scale_blocks_(fp8_values(weight_NK[i:j], a_TK.dtype), scale[i // 128 : -(-j // 128)])

    return _row_blocks(a_TK, weight_NK.shape[0], out_dtype, a_TK.dtype.itemsize, decode)


@linear_fp4.implement("cpu")
def _linear_fp4(
    x: Tensor, weight: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = out_type(x, out_dtype)
    a_TK = _activations(x, x_scale, out)

    def decode(i: int, j: int) -> Tensor:
        return scale_groups_(fp4_values(weight[i:j], a_TK.dtype), scale[i:j], 32)

    return _row_blocks(a_TK, weight.shape[0], out, a_TK.dtype.itemsize, decode)


@linear_int8.implement("cpu")
def _linear_int8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    y = _row_blocks(x.float(), weight_NK.shape[0], torch.float32, 4, lambda i, j: weight_NK[i:j].float())
    y = y.mul_(scale)
    return (y if x_scale is None else y.mul_(x_scale[:, None])).to(out_type(x, out_dtype))


@grouped_linear.implement("cpu")
def _grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    y = x_TGK.new_empty(x_TGK.shape[0], *weight_GNK.shape[:2])
    for g, weight_NK in enumerate(weight_GNK):
        y[:, g] = _linear(x_TGK[:, g].contiguous(), weight_NK)
    return y
