"""How tests compare what a model returned: up to roundings of its type, or memory nobody wrote."""

from __future__ import annotations

import torch

POISON = 0xCD


def poisoned(tensor: torch.Tensor) -> bool:
    """Whether every byte is that of memory nobody wrote."""
    return set(tensor.contiguous().view(torch.uint8).flatten().tolist()) <= {POISON}


def near(found: torch.Tensor, expected: torch.Tensor, ulps: float = 1.0) -> None:
    """Equal up to `ulps` roundings of the found type, elementwise, and fp32 noise of the largest element."""
    assert found.shape == expected.shape
    if not found.numel():
        return
    unit = torch.finfo(found.dtype).eps / 2
    allowed = ulps * unit * expected.double().abs() + 2e-6 * expected.double().abs().max()
    assert bool(((found.double() - expected.double()).abs() <= allowed).all())
