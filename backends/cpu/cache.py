"""Cache writes by indexed assignment; packed formats through the quantisers of this backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ops import cache as contracts
from ops.quant import quant_fp8, quant_mxfp4


def _write(parts: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor) -> None:
    # slots are never below -1, so a negative minimum means that some rows are skipped
    if slots.numel() and int(slots.min()) < 0:
        kept = (slots >= 0).nonzero().squeeze(1)
        slots, values = slots[kept], [value[kept] for value in values]
    block, row = slots // parts[0].shape[1], slots % parts[0].shape[1]
    for part, value in zip(parts, values, strict=True):
        part[block, row] = value


@contracts.cache_insert.implement("cpu")
def _cache_insert(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    _write((cache,), (rows_RW,), slots)


@contracts.cache_insert_fp8.implement("cpu")
def _cache_insert_fp8(cache: Tensor, rows_RC: Tensor, slots: Tensor, *, rope_dim: int = 64) -> None:
    parts = contracts.block_parts(cache, contracts.fp8_row_parts(rows_RC.shape[1], rope_dim)[0])
    _write(parts, contracts.pack_fp8(rows_RC, rope_dim, quant_fp8.impls["cpu"].fn), slots)


@contracts.index_insert_fp8.implement("cpu")
def _index_insert_fp8(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> None:
    parts = contracts.block_parts(cache, rows_R128.shape[1])
    _write(parts, contracts.pack_index_fp8(rows_R128, quant_fp8.impls["cpu"].fn), slots)


@contracts.index_insert_fp4.implement("cpu")
def _index_insert_fp4(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> None:
    parts = contracts.block_parts(cache, rows_R128.shape[1] // 2)
    _write(parts, contracts.pack_index_fp4(rows_R128, quant_mxfp4.impls["cpu"].fn), slots)
