"""Sample inputs and wrong inputs of the quantisers. Shapes: x [T, K]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops.contract import Sample, WrongInput

FLOORS = (1e-4, 448.0 * 2.0**-126, 6.0 * 2.0**-126)
"""Lowest magnitudes that the FP8, MXFP8 and FP4 quantisers take a scale from."""
_LARGEST = (448.0, 6.0, 127.0)
_FULL_SCALE_EVERY = (32, 64, 128, 256)


def _wide(g: torch.Generator, *shape: int) -> Tensor:
    """Values of both signs whose logarithms are evenly spread over 22 binades."""
    return torch.randn(shape, generator=g).sign() * torch.exp2(-22 * torch.rand(shape, generator=g))


def _beside(value: Tensor, step: int) -> Tensor:
    """The number `step` places behind a positive one in its type."""
    return (value.view(torch.int16 if value.element_size() == 2 else torch.int32) + step).view(value.dtype)


def _exact(g: torch.Generator, every: int, dtype: torch.dtype) -> Tensor:
    """Rows whose groups of `every` end in a format's largest number times a power of two, or in the number beside that."""
    rows = []
    for largest in _LARGEST:
        for step in (-1, 0, 1):
            # far from 1, where an fp32 logarithm can not tell neighbours apart
            binade = int(torch.randint(8, 13, (), generator=g)) * (-1 if torch.rand((), generator=g) < 0.5 else 1)
            if largest * 2.0**binade > torch.finfo(dtype).max / 2:
                binade = -binade
            top = torch.tensor(largest * 2.0**binade, dtype=dtype)
            x = (_wide(g, 256) * float(top) * 0.9).to(dtype)
            x[every - 1 :: every] = _beside(top[None], step) * torch.randn(256 // every, generator=g).sign().to(dtype)
            rows.append(x)
    return torch.stack(rows)


def delicate(dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Inputs that only an exact quantiser gets right: ties, full scale, floors, signed zeros, groups of differing size."""
    g = torch.Generator().manual_seed(seed + 1)
    halves = torch.randint(-253, 254, (3, 256), generator=g) / 2
    halves[:, ::32] = 127
    yield "halves", halves.to(dtype), ("ties",)
    for every in _FULL_SCALE_EVERY:
        yield f"exact-{every}", _exact(g, every, dtype), ("exact",)
    floors = torch.tensor([[floor * share] for floor in FLOORS for share in (0.5, 0.99, 1.0, 1.5, 1.99)])
    x = _wide(g, len(floors), 256)
    x[:, 5::32] = 1
    yield "floors", (x * floors).to(dtype), ("floors",)
    tiny = torch.rand(2, 256, generator=g) * 2.0**-21 * (torch.rand(2, 256, generator=g) < 0.5)
    signed = torch.copysign(tiny, torch.randn(2, 256, generator=g))
    signed[:, 7::32] = 1
    yield "signed-zeros", signed.to(dtype), ("signed-zeros",)
    for name, shape in (("groups", (4, 512)), ("groups-tail", (3, 160))):
        size = torch.exp2(torch.randint(-20, 21, (shape[0], shape[1] // 32), generator=g).float())
        most = torch.finfo(dtype).max / 2  # codes are rounded up too
        yield name, (_wide(g, *shape) * size.repeat_interleave(32, 1)).clamp(-most, most).to(dtype), ("groups",)


def values(dtype: torch.dtype, seed: int, width: int = 128) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """Inputs whose quantisation is delicate: ties, powers of two, denormals, outliers, zeros, odd and real widths."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"zero": (0, width), "one": (1, width), "odd": (3, width + 32), "flash": (2, 4096), "pro": (1, 7168)}
    for name, shape in shapes.items():
        yield f"{name}-unit", torch.randn(shape, generator=g).to(dtype), (name, "unit")
        yield f"{name}-tiny", (torch.randn(shape, generator=g) * 2e-3).to(dtype), (name, "tiny")
    most = torch.finfo(dtype).max / 2
    yield "huge", (torch.randn(4, width, generator=g) * 3e4).clamp(-most, most).to(dtype), ("huge",)
    yield "zeros", torch.zeros(2, width, dtype=dtype), ("constant",)
    yield "denormal", torch.full((1, width), 2.0**-130).to(dtype), ("denormal",)
    outliers = torch.randn(4, width, generator=g)
    outliers[:, ::17] *= 300
    yield "outliers", outliers.to(dtype), ("outliers",)
    yield "powers", torch.ldexp(torch.ones(2, width), torch.arange(width) % 20 - 10).to(dtype), ("powers",)
    yield "boundary", torch.tensor([[448.0, 449.0, 0.7, 1.0] * (width // 4)] * 2).to(dtype), ("boundary",)
    yield from delicate(dtype, seed)


def value_samples(**kwargs: Any) -> Any:
    """A samples function over `values` with these keyword arguments."""

    def samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
        for name, x, tags in values(dtype, seed):
            yield Sample(name, (x,), kwargs, tags)

    return samples


def roundtrip_samples(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
    """Round trips of the first 64 channels, and of several groups with channels behind them, as attention rows have."""
    for name, x, tags in values(dtype, seed):
        yield Sample(name, (x,), {"channels": 64}, tags)
        if x.shape[1] > 128:
            channels = min(x.shape[1] - 64, 448) // 64 * 64
            yield Sample(f"{name}-{channels}", (x,), {"channels": channels}, tags)
    x = _wide(torch.Generator().manual_seed(seed), 3, 2, 512).to(dtype)
    yield Sample("heads-448", (x,), {"channels": 448}, ("heads",))


def value_errors(op: str, **kwargs: Any) -> Any:
    """Wrong inputs common to the quantisers."""

    def errors(dtype: torch.dtype) -> Iterator[WrongInput]:
        integers = torch.zeros(2, 64, dtype=torch.int32)
        yield WrongInput("integer", (integers,), kwargs, rf"{op}: x is torch.int32, expected float32")

    return errors
