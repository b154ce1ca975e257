"""Error bounds from the arithmetic: how far a correct implementation may lie from the exact result."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
}
SPREAD = 4.0


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff u: a rounding to `dtype` errs by at most u times the value. ValueError for integer types."""
    if dtype not in _ROUNDOFF:
        raise ValueError(f"no unit roundoff for {dtype}; known: {', '.join(map(str, _ROUNDOFF))}")
    return _ROUNDOFF[dtype]


def accumulate(terms: int, absolute_sum: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bound of a sum of `terms` products accumulated in `dtype`, given the sum of their absolute values.

    c*sqrt(K)*u*sum|a||b| with c = 4: four standard deviations of independent roundings, any summation order.
    """
    return SPREAD * max(terms, 1) ** 0.5 * roundoff(dtype) * absolute_sum
