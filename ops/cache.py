"""Writing rows into paged caches, plain or packed to FP8/FP4, and decoding packed rows for the readers.

Shapes: cache [blocks, P rows per block, W], rows [R, W or C], slots int64 [R] with slot = block*P + row; a slot of -1 is skipped (plain rows
may land in slot 0 of the null block instead).
Packed blocks hold the bytes of all P rows first, then the P groups of scales (FlashMLA's MODEL1 layout, specification 10.4),
so a packed row is not contiguous; only whole blocks are. Blocks may lie apart (any block stride).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ops.cache_samples import insert_errors, insert_samples
from ops.contract import Contract, Cost, tensors_bytes
from ops.quant import quant_fp8, quant_mxfp4

NOPE_GROUP = 64
FP4_GROUP = 32
SCALE_ALIGN = 8
Quantiser = Callable[..., tuple[Tensor, Tensor]]

_BYTES = torch.arange(256, dtype=torch.int32)
_E4M3 = _BYTES.to(torch.uint8).view(torch.float8_e4m3fn).float()[:, None]
_E8M0 = _BYTES.to(torch.uint8).view(torch.float8_e8m0fnu).float()[:, None]
_E2M1 = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
_E2M1_PAIRS = _E2M1[torch.stack((_BYTES % 16, _BYTES // 16), dim=1)]


def fp8_row_parts(channels: int, rope_dim: int) -> tuple[int, int]:
    """Bytes of one packed attention row: (values, scales with padding); (576, 8) for 512 channels with 64 rotary."""
    nope = channels - rope_dim
    return nope + 2 * rope_dim, -(-nope // (NOPE_GROUP * SCALE_ALIGN)) * SCALE_ALIGN


def block_parts(cache: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """Views of a packed cache: values uint8 [blocks, P, values] and scales uint8 [blocks, P, W - values]."""
    blocks, rows, width = cache.shape
    flat = cache.view(blocks, rows * width)
    return flat[:, : rows * values].unflatten(1, (rows, values)), flat[:, rows * values :].unflatten(1, (rows, width - values))


def pack_fp8(rows_RC: Tensor, rope_dim: int, quantise: Quantiser) -> tuple[Tensor, Tensor]:
    """Rows as bytes: (values uint8 [R, nope + 2*rope_dim], scales uint8 [R, padded]); the padding bytes are 0."""
    nope = rows_RC.shape[1] - rope_dim
    codes, scales = quantise(rows_RC[:, :nope], group=NOPE_GROUP)
    rope = rows_RC[:, nope:].to(torch.bfloat16).contiguous()
    padding = fp8_row_parts(rows_RC.shape[1], rope_dim)[1] - scales.shape[1]
    values = torch.cat((codes.view(torch.uint8), rope.view(torch.uint8)), dim=1)
    return values, torch.nn.functional.pad(scales.view(torch.uint8), (0, padding))


def pack_index_fp8(rows_Rd: Tensor, quantise: Quantiser) -> tuple[Tensor, Tensor]:
    """Index keys as bytes: (e4m3 [R, d], one fp32 scale as 4 bytes [R, 4])."""
    codes, scales = quantise(rows_Rd, group=rows_Rd.shape[1])
    # contiguous() would keep a stride of 0 on the single column, which can not be viewed as bytes
    return codes.view(torch.uint8), scales.float().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def pack_index_fp4(rows_Rd: Tensor, quantise: Quantiser) -> tuple[Tensor, Tensor]:
    """Index keys as bytes: (two fp4 per byte [R, d/2], e8m0 [R, d/32])."""
    codes, scales = quantise(rows_Rd)
    return codes, scales.view(torch.uint8)


def _decode(table: Tensor, bytes_: Tensor) -> Tensor:
    """Look every byte up: table [256, n] -> [..., n * last dimension]. Casts of float8 tensors are slower on CPU."""
    found = table.to(bytes_.device).index_select(0, bytes_.int().flatten())
    return found.view(*bytes_.shape[:-1], bytes_.shape[-1] * table.shape[1])


def _at(part: Tensor, slots: Tensor) -> Tensor:
    # a reader masks -1 itself; slot 0 is in the null block and always readable
    safe = slots.to(torch.int64).clamp(min=0)
    return part[safe // part.shape[1], safe % part.shape[1]]


def unpack_fp8_rows(cache: Tensor, slots: Tensor, *, nope: int, rope_dim: int, dtype: torch.dtype) -> Tensor:
    """Attention rows at flat slots (any shape [...]) -> [..., nope + rope_dim] in `dtype`.

    Exact: every value is an e4m3 code times a power of two, or a bf16 number. Negative slots give arbitrary rows, finite where
    the null block is.
    """
    values, scales = block_parts(cache, nope + 2 * rope_dim)
    row = _at(values, slots)
    codes = _decode(_E4M3, row[..., :nope])
    groups = -(-nope // NOPE_GROUP)
    scale = _decode(_E8M0, _at(scales, slots)[..., :groups])
    if nope == groups * NOPE_GROUP:
        codes = (codes.unflatten(-1, (groups, NOPE_GROUP)) * scale.unsqueeze(-1)).flatten(-2)
    else:
        codes = codes * scale.repeat_interleave(NOPE_GROUP, dim=-1)[..., :nope]
    rope = row[..., nope:].contiguous().view(torch.bfloat16)
    return torch.cat((codes.to(dtype), rope.to(dtype)), dim=-1)


def unpack_index_rows(
    cache: Tensor, slots: Tensor, *, dtype: torch.dtype, compute: torch.dtype | None = None, channels: int = 128
) -> Tensor:
    """Index keys at flat slots [...] -> [..., channels], rounded to `dtype` and returned in `compute` (default `dtype`).

    cache: uint8 packed FP8 (channels + 4 wide) or FP4 (channels/2 + channels/32 wide), or a float cache [blocks, P, channels].
    Negative slots give arbitrary rows, finite where the null block is. ValueError for another width.
    """
    width = cache.shape[2]
    if cache.dtype != torch.uint8:
        if width != channels:
            raise ValueError(f"index cache of {cache.dtype} is {width} wide, expected {channels} channels")
        return _at(cache, slots).to(dtype).to(compute or dtype)
    if width == channels + 4:
        values, scales = block_parts(cache, channels)
        keys = _decode(_E4M3, _at(values, slots)) * _at(scales, slots).view(torch.float32)
    elif width == channels // 2 + channels // FP4_GROUP:
        values, scales = block_parts(cache, channels // 2)
        scale = _decode(_E8M0, _at(scales, slots))
        keys = (_decode(_E2M1_PAIRS, _at(values, slots)).unflatten(-1, (-1, FP4_GROUP)) * scale.unsqueeze(-1)).flatten(-2)
    else:
        expected = f"{channels + 4} (FP8) or {channels // 2 + channels // FP4_GROUP} (FP4) for {channels} channels"
        raise ValueError(f"packed index cache is {width} wide, expected {expected}")
    return keys.to(dtype).to(compute or dtype)


def _write(parts: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor) -> None:
    for r, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, row = divmod(slot, parts[0].shape[1])
            for part, value in zip(parts, values, strict=True):
                part[block, row] = value[r]


def _cache_insert(cache: Tensor, rows_RW: Tensor, slots: Tensor, *, compute: torch.dtype = torch.float32) -> None:
    """cache[slot // P, slot % P] = row, for every slot >= 0; the row of a slot of -1 is dropped, or put into slot 0, which no table gives out.

    cache [blocks, P, W] (written); rows [R, W] of the cache's type; slots int64 [R], without duplicates among the valid ones.
    Bitwise copy. Source: specification 10.4 (one row per window token or compressed entry). ValueError for another width or type.
    """
    _write((cache,), (rows_RW,), slots)


def _cache_insert_fp8(
    cache: Tensor, rows_RC: Tensor, slots: Tensor, *, rope_dim: int = 64, compute: torch.dtype = torch.float32
) -> None:
    """Pack attention rows: channels before the last `rope_dim` to e4m3 with an e8m0 scale per 64, the rest to bf16.

    cache uint8 [blocks, P, C + rope_dim + scales padded to 8] (written; 584 for C=512); rows [R, C] any float type;
    slots int64 [R], -1 skipped, no duplicates. Scale 2^ceil(log2(max(amax, 1e-4)/448)); padding bytes are 0.
    Source: specification 10.3, 10.4.
    """
    values = block_parts(cache, fp8_row_parts(rows_RC.shape[1], rope_dim)[0])
    _write(values, pack_fp8(rows_RC, rope_dim, partial(quant_fp8.reference, compute=compute)), slots)


def _index_insert_fp8(cache: Tensor, rows_R128: Tensor, slots: Tensor, *, compute: torch.dtype = torch.float32) -> None:
    """Pack index keys to e4m3 with one fp32 power-of-two scale per key: a block is P*d codes, then P*4 bytes of scales.

    cache uint8 [blocks, P, d + 4] (written); rows [R, d] any float type; slots int64 [R], -1 skipped, no duplicates.
    Scale 2^ceil(log2(max(amax, 1e-4)/448)). Source: specification 7, 10.3.
    """
    parts = block_parts(cache, rows_R128.shape[1])
    _write(parts, pack_index_fp8(rows_R128, partial(quant_fp8.reference, compute=compute)), slots)


def _index_insert_fp4(cache: Tensor, rows_R128: Tensor, slots: Tensor, *, compute: torch.dtype = torch.float32) -> None:
    """Pack index keys to e2m1, low nibble first, an e8m0 scale per 32: a block is P*d/2 codes, then P*d/32 scales.

    cache uint8 [blocks, P, d/2 + d/32] (written; 68 for d=128); rows [R, d], d a multiple of 32, any float type; slots int64 [R],
    -1 skipped, no duplicates. Scale 2^ceil(log2(max(amax, 6*2^-126)/6)). Source: specification 7, 10.4.
    """
    parts = block_parts(cache, rows_R128.shape[1] // 2)
    _write(parts, pack_index_fp4(rows_R128, partial(quant_mxfp4.reference, compute=compute)), slots)


def _check(op: str, cache: Tensor, rows: Tensor, slots: Tensor, width: int, dtype: torch.dtype) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"{op}: rows are {rows.dtype} {tuple(rows.shape)}, expected [R, C] of a floating type")
    if cache.dim() != 3 or cache.shape[2] != width:
        expected = f"[blocks, P, {width}] for rows of {rows.shape[1]} channels"
        raise ValueError(f"{op}: cache has shape {tuple(cache.shape)}, expected {expected}")
    if cache.dtype != dtype:
        raise ValueError(f"{op}: cache is {cache.dtype}, expected {dtype}")
    if slots.shape != rows.shape[:1] or slots.dtype != torch.int64:
        expected = f"torch.int64 ({rows.shape[0]},), one per row"
        raise ValueError(f"{op}: slots are {slots.dtype} {tuple(slots.shape)}, expected {expected}")


def _cache_insert_meta(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    _check("cache_insert", cache, rows_RW, slots, rows_RW.shape[-1], rows_RW.dtype)


def _cache_insert_fp8_meta(cache: Tensor, rows_RC: Tensor, slots: Tensor, *, rope_dim: int = 64) -> None:
    channels = rows_RC.shape[-1]
    if not 0 <= rope_dim < channels:
        raise ValueError(f"cache_insert_fp8: rope_dim is {rope_dim}, expected 0..{channels - 1} for rows of {channels} channels")
    _check("cache_insert_fp8", cache, rows_RC, slots, sum(fp8_row_parts(channels, rope_dim)), torch.uint8)


def _index_insert_fp8_meta(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> None:
    _check("index_insert_fp8", cache, rows_R128, slots, rows_R128.shape[-1] + 4, torch.uint8)


def _index_insert_fp4_meta(cache: Tensor, rows_R128: Tensor, slots: Tensor) -> None:
    d = rows_R128.shape[-1]
    if d % FP4_GROUP:
        raise ValueError(f"index_insert_fp4: rows have {d} channels, expected a multiple of {FP4_GROUP}")
    _check("index_insert_fp4", cache, rows_R128, slots, d // 2 + d // FP4_GROUP, torch.uint8)


def _cost(cache: Tensor, rows: Tensor, slots: Tensor, *, rope_dim: int = 64) -> Cost:
    packed = cache.dtype == torch.uint8
    written = rows.shape[0] * cache.shape[2] * cache.element_size()
    return Cost(0, 4 * rows.numel() if packed else 0, tensors_bytes(rows, slots), written, "fp32")


def _every_bit(*args: Any, golden: Any, found: Any, **kwargs: Any) -> tuple[Any]:
    return (None,)


def _but_slot_0(cache: Tensor, rows_RW: Tensor, slots: Tensor, *, golden: tuple[Tensor, ...], found: Any) -> tuple[Any]:
    """Every bit, except those of slot 0 in a call that drops rows."""

    def complaint(y: Tensor) -> str | None:
        right, left = golden[0].to(y.dtype).flatten(0, 1), y.flatten(0, 1)
        wrong = (left.view(torch.uint8) != right.view(torch.uint8)).any(1)
        if bool((slots < 0).any()):
            wrong[:1] = False
        return f"{int(wrong.sum())} rows of the cache differ (must be bitwise equal)" if bool(wrong.any()) else None

    return (complaint,)


def _insert(
    name: str, reference: Callable[..., None], meta: Callable[..., None], samples: Any, errors: Any, bound: Callable[..., Any] = _every_bit
) -> Contract:  # fmt: skip
    return Contract(
        name=name,
        reference=reference,
        meta=meta,
        samples=samples,
        errors=errors,
        bound=bound,
        cost=_cost,
        mutates=("cache",),
    )


def _fp8_width(channels: int) -> tuple[int, dict[str, Any]]:
    rope_dim = 64 if channels >= 128 else 16
    return sum(fp8_row_parts(channels, rope_dim)), {"rope_dim": rope_dim}


cache_insert = _insert(
    "cache_insert", _cache_insert, _cache_insert_meta, insert_samples(None, (512, 7)), insert_errors(8, 8, True), _but_slot_0
)
cache_insert_fp8 = _insert(
    "cache_insert_fp8",
    _cache_insert_fp8,
    _cache_insert_fp8_meta,
    insert_samples(_fp8_width, (512, 80, 40)),
    insert_errors(584, 512, False, [("all-rotary", 64, {}, r"rope_dim is 64, expected 0\.\.63")]),
)
index_insert_fp8 = _insert(
    "index_insert_fp8",
    _index_insert_fp8,
    _index_insert_fp8_meta,
    insert_samples(lambda d: (d + 4, {}), (128, 32)),
    insert_errors(132, 128, False),
)
index_insert_fp4 = _insert(
    "index_insert_fp4",
    _index_insert_fp4,
    _index_insert_fp4_meta,
    insert_samples(lambda d: (d // 2 + d // FP4_GROUP, {}), (128, 32)),
    insert_errors(68, 128, False, [("groups", 40, {}, r"rows have 40 channels, expected a multiple of 32")]),
)
