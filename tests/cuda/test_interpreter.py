"""Triton's interpreter after the repair: what it got wrong agrees with torch, whose roundings are those of the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.quant import dequant_mxfp4
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


def test_products_of_scaled_fp4_weights_are_those_of_the_decoded_ones() -> None:
    g = torch.Generator().manual_seed(0)
    code = torch.randint(0, 256, (64, 64), generator=g, dtype=torch.uint8)
    scale = torch.randint(100, 140, (64, 4), generator=g, dtype=torch.uint8)
    b = torch.randn(128, 16, generator=g).bfloat16()
    y = torch.empty(64, 16)
    small_kernels.scaled_product[(1,)](code, scale, b, y, 64, 128, 16)
    weight = dequant_mxfp4.reference(code, scale.view(torch.float8_e8m0fnu), dtype=torch.float64, compute=torch.float64)
    # sums of 128 fp32 terms of very unlike size
    assert ((y - weight @ b.double()).abs() <= 1e-5 * (weight.abs() @ b.double().abs())).all()
