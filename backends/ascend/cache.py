"""Cache writes through the vendor's scatter over the cache seen as rows.

Shapes as in ops/cache.py. Source: Ascend operator notes, section 8. The packed formats of the contracts keep the scales of a block
behind its rows, those of the vendor's epilogue ops behind each row: packed rows are written by plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.ascend.hoist import ByIdentity
from ops.cache import cache_insert

SCATTER = "custom::scatter_nd_update_asc"
WIDTHS = (1, 128, 512)
_HALVES = (torch.bfloat16, torch.float16)
_written = ByIdentity()


def _writable(cache: Tensor, rows_RW: Tensor) -> bool:
    return 0 < rows_RW.shape[0] <= cache.shape[0] * cache.shape[1] and cache.is_contiguous() and rows_RW.is_contiguous()


def _scatter_when(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> bool:
    return not rows_RW.shape[0] or (rows_RW.shape[1] in WIDTHS and _writable(cache, rows_RW))


@cache_insert.implement("ascend", name=SCATTER, dtypes=_HALVES, soc=("910b", "910_93"), needs=(SCATTER,), when=_scatter_when)
def _cache_insert(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    if rows_RW.shape[0]:
        torch.ops.custom.scatter_nd_update_asc(var=cache.view(-1, cache.shape[2]), indices=slots[:, None], update=rows_RW)


@cache_insert.implement(
    "ascend",
    name="npu_scatter_nd_update_",
    needs=("npu::npu_scatter_nd_update_",),
    when=lambda cache, rows_RW, slots: not rows_RW.shape[0] or _writable(cache, rows_RW),
    note="rows of -1 land in slot 0, which lies in the null block",
)
def _cache_insert_wheel(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    if rows_RW.shape[0]:
        # -1 is not skipped by this op; every layer of a kind has the same slots
        at = _written(slots, (), lambda: slots.clamp(min=0)[:, None])
        torch.ops.npu.npu_scatter_nd_update_(input=cache.view(-1, cache.shape[2]), indices=at, updates=rows_RW)
