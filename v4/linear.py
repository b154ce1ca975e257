"""A linear layer over a weight as stored: dense, or FP8 blocks kept packed with quantised activations.

T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantised(NamedTuple):
    """FP8 activations [T, K] with their E8M0 scales [T, K/128] and the type results return to."""

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

    packed False: weight [N, K] in `dtype`. packed True: weight float8_e4m3fn [N, K] with scale float8_e8m0fnu
    [N/128, K/128]; activations are quantised per token and 128 channels first. Source: specification section 2.2.
    """

    def __init__(self, ops: SimpleNamespace, n_out: int, n_in: int, *, dtype: torch.dtype, packed: bool = False) -> None:
        super().__init__()
        self.ops, self.packed = ops, packed
        self.weight = parameter((n_out, n_in), torch.float8_e4m3fn if packed else dtype)
        if packed:
            self.scale = parameter((blocks(n_out), blocks(n_in)), torch.float8_e8m0fnu)

    def prepare(self, x_TK: Tensor) -> Tensor | Quantised:
        """Quantise activations once for several packed layers; dense layers take them as they are."""
        if not self.packed:
            return x_TK
        values, scales = self.ops.quant_fp8(x_TK)
        return Quantised(values, scales, x_TK.dtype)

    def forward(self, x_TK: Tensor | Quantised) -> Tensor:
        """[T, K] -> [T, N] in the activation type; accepts the result of `prepare`."""
        if not self.packed:
            return self.ops.linear(x_TK, self.weight)
        x = x_TK if isinstance(x_TK, Quantised) else self.prepare(x_TK)
        assert isinstance(x, Quantised)
        return self.ops.linear_fp8(x.values, self.weight, self.scale, x_scale=x.scales, out_dtype=x.dtype)
