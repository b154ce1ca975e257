"""Linear layers on the CPU: oneDNN's product where it is present, torch's otherwise; packed weights decoded in row blocks.

Shapes as in ops/linear.py. oneDNN reads the weights of a single row at close to memory bandwidth, two to three times faster than
the BLAS torch calls for fp32, and is ahead for many rows too (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ops.linear import grouped_linear, linear, linear_fp4, linear_fp8, linear_int8, out_type
from ops.quant import dequant_fp8, dequant_fp8_block, dequant_mxfp4

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_BLOCK_BYTES = 32 << 20


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T for operands of one float type, fp32 accumulation; returns [M, N] in that type."""
    if _ONEDNN and x.dtype == torch.float32 and x.shape[0] and w.shape[0]:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.nn.functional.linear(x, w)


@linear.implement("cpu")
def _linear(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    out = out_dtype or x.dtype
    if x.dtype != weight_NK.dtype or (out == torch.float32 and x.dtype != torch.float32):
        return _wide(x, weight_NK).to(out)
    y = matmul_nt(x, weight_NK) if x.dim() == 2 else torch.nn.functional.linear(x, weight_NK)
    return y if out == x.dtype else y.to(out)


def _wide(x: Tensor, weight_NK: Tensor) -> Tensor:
    """fp32 result of narrow operands, the weight widened in row blocks so that no second copy of it is made."""
    flat = x.reshape(-1, x.shape[-1]).float()
    step = max(_BLOCK_BYTES // max(4 * weight_NK.shape[1], 1), 64)
    parts = [matmul_nt(flat, weight_NK[i : i + step].float()) for i in range(0, weight_NK.shape[0], step)]
    y = torch.cat(parts, dim=1) if len(parts) != 1 else parts[0]
    return y.view(*x.shape[:-1], weight_NK.shape[0])


def _in_blocks(x: Tensor, rows: int, width: int, out: torch.dtype, decode: Callable[[int, int], Tensor]) -> Tensor:
    """x @ w.T in fp32 with `decode(i, j)` giving rows i..j of w; the decoded weight never exists as a whole."""
    step = max(_BLOCK_BYTES // max(4 * width, 1) // 128 * 128, 128)
    y = torch.empty(x.shape[0], rows, dtype=out)
    for i in range(0, rows, step):
        y[:, i : i + step] = matmul_nt(x, decode(i, min(i + step, rows)))
    return y


def _activations(x: Tensor, x_scale: Tensor | None) -> Tensor:
    return x.float() if x_scale is None else dequant_fp8.reference(x, x_scale, dtype=torch.float32, compute=torch.float32)


@linear_fp8.implement("cpu")
def _linear_fp8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    def decode(i: int, j: int) -> Tensor:
        part = scale.view(torch.uint8)[i // 128 : -(-j // 128)].view(torch.float8_e8m0fnu)
        return dequant_fp8_block.reference(weight_NK[i:j], part, dtype=torch.float32, compute=torch.float32)

    return _in_blocks(_activations(x, x_scale), *weight_NK.shape, out_type(x, out_dtype), decode)


@linear_fp4.implement("cpu")
def _linear_fp4(
    x: Tensor, weight: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    def decode(i: int, j: int) -> Tensor:
        return dequant_mxfp4.reference(weight[i:j], scale[i:j], dtype=torch.float32, compute=torch.float32)

    return _in_blocks(_activations(x, x_scale), weight.shape[0], 2 * weight.shape[1], out_type(x, out_dtype), decode)


@linear_int8.implement("cpu")
def _linear_int8(
    x: Tensor, weight_NK: Tensor, scale: Tensor, *, x_scale: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    y = _in_blocks(x.float(), *weight_NK.shape, torch.float32, lambda i, j: weight_NK[i:j].float())
    y *= scale
    if x_scale is not None:
        y *= x_scale[:, None]
    return y.to(out_type(x, out_dtype))


@grouped_linear.implement("cpu")
def _grouped_linear(x_TGK: Tensor, weight_GNK: Tensor) -> Tensor:
    t, groups, _ = x_TGK.shape
    if x_TGK.dtype != weight_GNK.dtype:
        return _grouped_linear(x_TGK.float(), weight_GNK.float()).to(x_TGK.dtype)
    y = x_TGK.new_empty(t, groups, weight_GNK.shape[1])
    for g in range(groups):
        y[:, g] = matmul_nt(x_TGK[:, g].contiguous(), weight_GNK[g])
    return y
