"""The judge itself: what an elementwise bound alone would let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.cache import cache_insert
from ops.contract import Sample
from ops.error_statistics import gain, lean
from ops.judge import judge
from ops.linear import linear
from ops.norm import rms_norm


def _sample(dtype: torch.dtype, rows: int = 64, width: int = 512, seed: int = 0) -> Sample:
    g = torch.Generator().manual_seed(seed)
    return Sample(
        "made", (torch.randn(rows, width, generator=g).to(dtype), (torch.rand(width, generator=g) + 0.5).to(dtype)), {"eps": 1e-6}
    )


def _exact(*args: Any, **kwargs: Any) -> Tensor:
    return rms_norm.reference(*args, **kwargs, compute=torch.float64)


def _nearest(*args: Any, **kwargs: Any) -> Tensor:
    return _exact(*args, **kwargs).to(torch.bfloat16)


def _truncated(*args: Any, **kwargs: Any) -> Tensor:
    exact = _exact(*args, **kwargs).float()
    return (exact.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


@pytest.mark.parametrize("seed", range(10))
def test_a_rounding_passes_and_a_truncation_does_not(seed: int) -> None:
    sample = _sample(torch.bfloat16, seed=seed)
    assert judge(rms_norm, _nearest, sample).ok
    assert not judge(rms_norm, _truncated, sample).ok


def test_errors_that_lean_are_found_though_each_is_allowed() -> None:
    g = torch.Generator().manual_seed(0)
    golden, tiny = torch.rand(4096, generator=g, dtype=torch.float64) * 0.4 + 1.5, torch.full((4096,), 1e-7, dtype=torch.float64)
    noise = torch.randn(4096, generator=g, dtype=torch.float64) * 2.0**-10
    assert lean(golden.to(torch.bfloat16), golden, tiny) is None
    assert lean((golden * (1 + noise)).to(torch.bfloat16), golden, tiny) is None
    z = lean((golden * (1 - 2.0**-10)).to(torch.bfloat16), golden, tiny)
    assert z is not None and z < -8


def test_a_gain_is_found_but_not_in_the_rounding_of_values_that_repeat() -> None:
    g = torch.Generator().manual_seed(2)
    golden = torch.randn(140, 128, generator=g, dtype=torch.float64)
    clamped = golden.abs().clamp(max=0.731)  # the rounding of 0.731 alone makes every row too small
    for exact in (golden, clamped):
        assert gain(exact.to(torch.bfloat16), exact) is None
        found = gain((exact * 1.006).to(torch.bfloat16), exact)
        assert found is not None and found[0] == pytest.approx(0.006, rel=0.4)


def test_errors_too_large_on_the_whole_are_found_though_each_is_allowed() -> None:
    g = torch.Generator().manual_seed(1)
    sample = Sample("made", (torch.randn(16, 512, generator=g), torch.randn(64, 512, generator=g)))
    golden = linear.reference(*sample.args, compute=torch.float64)
    (bound,) = linear.bound(*sample.args, golden=(golden,), found=(golden,))
    sign = torch.randn(golden.shape, generator=g).sign()

    def off(share: float) -> Callable[..., Tensor]:
        return lambda x, weight_NK, out_dtype=None: (golden + sign * share * bound).float()

    assert judge(linear, off(0.2), sample).ok
    verdict = judge(linear, off(0.6), sample)
    assert not verdict.ok and verdict.worst < 1 and "RMS error" in str(verdict)


def test_an_accumulator_of_lower_precision_is_found() -> None:
    g = torch.Generator().manual_seed(3)
    sample = Sample("made", (torch.randn(32, 4096, generator=g), torch.randn(64, 4096, generator=g)))

    def narrow(x: Tensor, weight_NK: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        products = (x[:, None, :] * weight_NK).view(32, 64, 64, 64).sum(-1)
        total = torch.zeros(32, 64, dtype=torch.bfloat16)
        for part in products.unbind(-1):
            total = total + part.to(torch.bfloat16)
        return total.float()

    assert judge(linear, lambda x, w, out_dtype=None: x @ w.T, sample).ok
    assert not judge(linear, narrow, sample).ok


def test_writes_outside_an_argument_are_found() -> None:
    sample = Sample("made", (torch.zeros(2, 4, 8), torch.ones(1, 8), torch.tensor([3])))

    def behind(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
        cache.view(-1, 8)[slots] = rows_RW
        torch.as_strided(cache, (1,), (1,), cache.storage_offset() + cache.numel()).fill_(7.0)

    def right(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
        cache.view(-1, 8)[slots] = rows_RW

    assert judge(cache_insert, right, sample).ok
    verdict = judge(cache_insert, behind, sample)
    assert not verdict.ok and "outside" in str(verdict)


@pytest.mark.parametrize("change", [lambda y: y * (1 + 2.0**-20), lambda y: y + 2e-6])
def test_small_uniform_errors_in_fp32_are_found(change: Callable[[Tensor], Tensor]) -> None:
    verdict = judge(rms_norm, lambda *a, **k: change(_exact(*a, **k)).float(), _sample(torch.float32))
    assert not verdict.ok
