"""A linear layer over a weight as stored: dense, or FP8 blocks or INT8 channels with quantised activations.

T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from v4.norm import Norm


class Quantised(NamedTuple):
    """Codes [T, K] of activations with their scales (E8M0 [T, K/128] of FP8 and [T, K/32] of MXFP8, fp32 [T] of INT8) and the type results return to."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """An inference parameter without storage; the loader materialises it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def blocks(n: int, size: int = 128) -> int:
    """Number of blocks of `size` that cover n."""
    return -(-n // size)


class Linear(nn.Module):
    """y = x @ weight.T without bias.

    kind "dense": weight [N, K] in `dtype`. "fp8": weight float8_e4m3fn [N, K] with scale float8_e8m0fnu [N/128, K/128]; activations are
    quantised per token and 128 channels first (specification section 2.2). "mx": the same weight, activations per token and 32 channels.
    "int8": weight int8 [N, K] with scale fp32 [N]; activations are quantised per token.
    """

    def __init__(self, ops: SimpleNamespace, n_out: int, n_in: int, *, dtype: torch.dtype, kind: str = "dense") -> None:
        super().__init__()
        self.ops, self.kind = ops, kind
        self.weight = parameter((n_out, n_in), {"fp8": torch.float8_e4m3fn, "mx": torch.float8_e4m3fn, "int8": torch.int8}.get(kind, dtype))
        if kind in ("fp8", "mx"):
            self.scale = parameter((blocks(n_out), blocks(n_in)), torch.float8_e8m0fnu)
        elif kind == "int8":
            self.scale = parameter((n_out,), torch.float32)

    def prepare(self, x_TK: Tensor) -> Tensor | Quantised:
        """Quantise activations once for several layers of one kind; dense layers take them as they are."""
        if self.kind == "dense":
            return x_TK
        quantise = {"fp8": self.ops.quant_fp8, "mx": self.ops.quant_mxfp8, "int8": self.ops.quant_int8}[self.kind]
        values, scales = quantise(x_TK)
        return Quantised(values, scales, x_TK.dtype)

    def normed(self, x_TK: Tensor, norm: Norm) -> Tensor | Quantised:
        """`prepare` of norm(x_TK): in one op for the kinds that have one."""
        if self.kind not in ("int8", "mx"):
            return self.prepare(norm(x_TK))
        values, scales = self.ops.rms_norm_quant(x_TK, norm.weight, eps=norm.eps, kind=self.kind)
        return Quantised(values, scales, x_TK.dtype)

    def forward(self, x_TK: Tensor | Quantised) -> Tensor:
        """[T, K] -> [T, N] in the activation type; accepts the result of `prepare`."""
        if self.kind == "dense":
            return self.ops.linear(x_TK, self.weight)
        x = x_TK if isinstance(x_TK, Quantised) else self.prepare(x_TK)
        assert isinstance(x, Quantised)
        run = {"fp8": self.ops.linear_fp8, "mx": self.ops.linear_mx, "int8": self.ops.linear_int8}[self.kind]
        return run(x.values, self.weight, self.scale, x_scale=x.scales, out_dtype=x.dtype)
