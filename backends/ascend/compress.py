"""The compressor: projections, state, pooling, norm and rotation in custom.compressor, whose state rows are those of the contract.

The op packs the entries of a call one after another and leaves the rows behind them undefined; it takes one row of rotary values per
row of its output, sines first. Shapes as in ops/compress.py. Source: Ascend operator notes, section 5.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from backends.ascend.hoist import ByIdentity
from backends.ascend.lengths import Lengths
from backends.ascend.rope import pairs
from ops.compress import compress

COMPRESSOR = "custom::compressor"
KINDS = {(2, 4, 512), (2, 4, 128), (1, 128, 512)}
"""(coff, ratio, entry width): entries of CSA, keys of the indexer, entries of HCA."""

ROTARY = 64
_INTERLEAVED, _BY_BLOCK = 2, 1
_LEAST, _MOST, _STEP = 1024, 10240, 512
_tables = ByIdentity()


def _table(values_ER2: Tensor, rows: int) -> Tensor:
    """[E, R2] -> fp32 [rows, 2*R2]: every angle twice, zeros behind the entries."""

    entries, width = values_ER2.shape
    if not entries:
        return _zeros(rows, 2 * width, values_ER2.device)

    def make() -> Tensor:
        if rows <= entries:
            return pairs(values_ER2[:rows])
        return torch.cat((pairs(values_ER2), _zeros(rows - entries, 2 * width, values_ER2.device)))

    return _tables(values_ER2, (rows,), make)


@functools.lru_cache(maxsize=64)
def _zeros(rows: int, width: int, device: torch.device) -> Tensor:
    """Rotary values of rows that no entry has; most steps of one token complete none."""
    return torch.zeros(rows, width, device=device)


def _when(
    x_TD: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, norm_weight: Tensor, cos_ER2: Tensor, sin_ER2: Tensor, state: Tensor,
    state_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, ratio: int, eps: float,
) -> bool:  # fmt: skip
    width = norm_weight.shape[0]
    hidden = x_TD.shape[1]
    types = wkv.dtype == wgate.dtype == x_TD.dtype and norm_weight.dtype == torch.float32
    sizes = _LEAST <= hidden <= _MOST and hidden % _STEP == 0 and 2 * cos_ER2.shape[1] == ROTARY
    contiguous = all(t.is_contiguous() for t in (x_TD, wkv, wgate, ape, norm_weight, state))
    return x_TD.shape[0] > 0 and (wkv.shape[0] // width, ratio, width) in KINDS and types and sizes and contiguous


@compress.implement("ascend", name=COMPRESSOR, dtypes=(torch.bfloat16, torch.float16), needs=(COMPRESSOR,), when=_when)
def _compress(
    x_TD: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, norm_weight: Tensor, cos_ER2: Tensor, sin_ER2: Tensor, state: Tensor,
    state_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, *, ratio: int, eps: float,
) -> Tensor:  # fmt: skip
    lengths = Lengths(cu_seqlens, start_pos, x_TD.device)
    tokens, made = lengths.tokens, lengths.completed(ratio)
    wanted, width = cos_ER2.shape[0], norm_weight.shape[0]
    if not tokens:
        return x_TD.new_zeros(wanted, width)
    rows = min(tokens, tokens // ratio + lengths.batch)
    # seqused is given although every token counts: without it the vendor picks a template that misplaces rows for some widths
    packed: Tensor = torch.ops.custom.compressor(
        x=x_TD[:tokens],
        wkv=wkv,
        wgate=wgate,
        state_cache=state,
        ape=ape,
        norm_weight=norm_weight,
        rope_sin=_table(sin_ER2, rows),
        rope_cos=_table(cos_ER2, rows),
        rope_head_dim=ROTARY,
        cmp_ratio=ratio,
        state_block_table=lengths.there("state", state_table),
        cu_seqlens=lengths.cu_seqlens,
        seqused=lengths.counts,
        start_pos=lengths.start,
        coff=wkv.shape[0] // width,
        norm_eps=eps,
        rotary_mode=_INTERLEAVED,
        cache_mode=_BY_BLOCK,
    )
    if made == wanted:
        return packed[:made]
    padded = x_TD.new_zeros(wanted, width)
    padded[:made] = packed[:made]
    return padded
