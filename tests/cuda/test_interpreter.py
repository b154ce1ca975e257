"""Triton's interpreter after the repair: what it got wrong agrees with torch, whose roundings are those of the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda import small_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device is not interpreted")


def values() -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=g) * torch.logspace(-9, 2, 4096)
    x[:8] = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 448.0, -448.0, 2.0**-10, 3 * 2.0**-11])
    return x


def test_casts_to_bf16_round_to_nearest_even() -> None:
    x, y = values(), torch.empty(4096, dtype=torch.bfloat16)
    small_kernels.cast[(1,)](x, y, 4096)
    assert torch.equal(y, x.to(torch.bfloat16))


def test_casts_through_float8_agree_with_torch() -> None:
    x = values().clamp(-448, 448)
    y = torch.empty_like(x)
    small_kernels.through_fp8[(1,)](x, y, 4096)
    assert torch.equal(y, x.to(torch.float8_e4m3fn).float())


def test_products_of_bf16_are_products_of_their_values() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=g).bfloat16() for _ in range(2))
    y = torch.empty(16, 16)
    small_kernels.product[(1,)](a, b, y, 16)
    torch.testing.assert_close(y, a.float() @ b.float())
