"""Sample inputs and wrong inputs of writing rows into caches.

Shapes: cache [blocks, P, W], rows [R, C], slots [R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ops.contract import Sample, WrongInput
from ops.quant_samples import delicate

Extra = Sequence[tuple[str, int, dict[str, Any], str]]
WidthOf = Callable[[int], tuple[int, dict[str, Any]]]


def insert_samples(width_of: WidthOf | None, channels: Sequence[int]) -> Callable[..., Iterator[Sample]]:
    """Samples of inserts of rows with these numbers of channels; width_of(channels) gives a packed row's bytes and keywords."""

    def make(dtype: torch.dtype, seed: int) -> Iterator[Sample]:
        g = torch.Generator().manual_seed(seed)
        shapes = (("zero", 0, 3, 4), ("one", 1, 2, 1), ("odd", 7, 5, 3), ("block", 128, 3, 128), ("skipped", 4, 4, 16))
        for channel in channels:
            for name, rows, blocks, per_block in shapes:
                # magnitudes from subnormal scales to beyond the e4m3 range; a zero row takes the floor of the scale
                values = torch.randn(rows, channel, generator=g) * torch.logspace(-5, 4, rows or 1)[:rows, None]
                values[2:3] = 0
                slots = (torch.randperm((blocks - 1) * per_block, generator=g)[:rows]) + per_block
                slots[1::3] = -1
                if name == "skipped":
                    slots[:] = -1
                width, kwargs = width_of(channel) if width_of else (channel, {})
                if width_of:
                    cache = torch.randint(0, 256, (blocks, per_block, width), generator=g, dtype=torch.uint8)
                else:
                    cache = torch.randn(blocks, per_block, width, generator=g).to(dtype)
                yield Sample(f"{name}-{channel}", (cache, values.to(dtype), slots), kwargs, (name,))
            if width_of:
                flat = torch.cat([x.flatten() for _, x, _ in delicate(dtype, seed)])
                hard = flat[: len(flat) // channel * channel].view(-1, channel)
                cache = torch.randint(0, 256, (len(hard) // 16 + 2, 16, width), generator=g, dtype=torch.uint8)
                slots = torch.randperm(len(hard), generator=g) + 16
                yield Sample(f"delicate-{channel}", (cache, hard, slots), kwargs, ("delicate",))

    return make


def insert_errors(width: int, channels: int, plain: bool, extra: Extra = ()) -> Callable[..., Any]:
    """Wrong inputs of inserts into a cache of this width; `extra`: name, channels, keywords and message of more."""

    def make(dtype: torch.dtype) -> Iterator[WrongInput]:
        rows, slots = torch.zeros(2, channels, dtype=dtype), torch.tensor([1, -1])
        cache = torch.zeros(2, 4, width, dtype=dtype if plain else torch.uint8)
        yield WrongInput("cache-width", (cache[:, :, 1:], rows, slots), {}, rf"expected \[blocks, P, {width}\]")
        yield WrongInput("cache-type", (cache.to(torch.int16), rows, slots), {}, r"cache is torch.int16, expected")
        yield WrongInput("slot-type", (cache, rows, slots.int()), {}, r"slots are torch.int32 \(2,\), expected torch.int64")
        yield WrongInput("slot-count", (cache, rows, slots[:1]), {}, r"expected torch.int64 \(2,\), one per row")
        yield WrongInput("rows-type", (cache, rows.int(), slots), {}, r"rows are torch.int32")
        for name, count, kwargs, match in extra:
            yield WrongInput(name, (cache, rows[:, :count], slots), kwargs, match)

    return make
