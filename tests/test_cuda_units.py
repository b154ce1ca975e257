"""Attention's kernel counts places in units, as int32: caches in which they would not fit go to torch. Shapes only, no memory and no Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops.contract import CONTRACTS
from ops.registry import load_backend

load_backend("cuda_triton")
ROWS, WIDTH, PACKED = 128, 512, 584


def cache(blocks: int, width: int = WIDTH, stride: int | None = None) -> Tensor:
    """Blocks of 128 rows on device meta, `stride` elements apart; uint8 where the width is that of a packed row."""
    kind = torch.uint8 if width == PACKED else torch.bfloat16
    return torch.empty_strided((blocks, ROWS, width), (stride or ROWS * width, width, 1), dtype=kind, device="meta")


def taken(window: Tensor, entries: Tensor | None = None) -> bool:
    """Whether the kernel takes a call over these caches."""
    rule = CONTRACTS["sparse_attention"].impls["cuda_triton"].when
    assert rule is not None
    whole: dict[str, Any] = {"dtype": torch.int32, "device": "meta"}
    args = (torch.empty(1, 64, WIDTH, dtype=torch.bfloat16, device="meta"), window, torch.empty(1, 4, **whole),
            torch.empty(64, device="meta"), torch.empty(2, **whole), torch.empty(1, **whole))  # fmt: skip
    more: dict[str, Any] = {} if entries is None else {"cmp_cache": entries, "cmp_table": torch.empty(1, 4, **whole), "ratio": 128}
    return rule(*args, scale=1.0, window=128, **more)


UNIT_ROWS = 2**31 // ROWS  # blocks whose rows are 2^31
CASES: dict[str, tuple[Tensor, Tensor | None, bool]] = {
    "small": (cache(9), cache(9), True),
    "rows in units of their width": (cache(2 * 2**31 // (ROWS * WIDTH)), None, True),
    "as many rows as int32 has": (cache(UNIT_ROWS), None, False),
    "one block less": (cache(UNIT_ROWS - 1), None, True),
    "entries beyond": (cache(9), cache(UNIT_ROWS), False),
    "blocks an odd way apart": (cache(2**31 // (ROWS * WIDTH), stride=ROWS * WIDTH + 1), None, False),
    "packed, 17 GB in units of 8 bytes": (cache(8 * 2**31 // (ROWS * PACKED) + 1, PACKED), None, False),
    "packed, a little less": (cache(8 * 2**31 // (ROWS * PACKED), PACKED), None, True),
}


@pytest.mark.parametrize("name", CASES)
def test_places_beyond_int32_go_to_torch(name: str) -> None:
    window, entries, expected = CASES[name]
    assert taken(window, entries) == expected
