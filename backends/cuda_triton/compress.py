"""The compressor in three kernels: projections, pooling of completed entries, state. Shapes as in ops/compress.py.

The state is written last, since the entries are pooled from the state as it was before the call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backends.cuda_triton.launch import FLOATS, NEED, SOC, blocks, kernels, power, warps
from ops.compress import compress

BF16 = (torch.bfloat16,)
WIDEST = 1024
"""Channels of an entry up to which one program holds it."""
_PROGRAMS = 264
_SPLITS = 8


def _plan(tokens: int, hidden: int, width: int) -> dict[str, int]:
    """Sizes of the projection: few tokens read weights only, so that D is split over programs."""
    few = tokens <= 32
    rows, columns, depth = (16, 64, 128) if few else (64, 128, 64)
    programs = blocks(tokens, rows) * 2 * blocks(width, columns)
    wanted = min(max(_PROGRAMS // programs, 1), _SPLITS)
    chunk = blocks(blocks(hidden, depth), wanted) * depth
    return {"TOKENS": rows, "BLOCK_N": columns, "BLOCK_K": depth, "num_warps": 4 if few else 8, "num_stages": 3, "chunk": chunk}


def _fits(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
) -> bool:
    if x_TD.dim() != 2 or not x_TD.numel() or not start_pos.numel() or ratio < 1 or wkv.dim() != 2 or state.dim() != 3:
        return False
    w, c, batch = wkv.shape[0], norm_weight.shape[-1], start_pos.shape[0]
    types = {x_TD.dtype, wkv.dtype, wgate.dtype} == {torch.bfloat16} and norm_weight.dtype in FLOATS
    exact = {t.dtype for t in (ape, cos_ER2, sin_ER2, state)} == {torch.float32}
    lists = {t.dtype for t in (state_table, cu_seqlens, start_pos)} == {torch.int32} and cu_seqlens.shape == (batch + 1,)
    shapes = wkv.shape == wgate.shape == (w, x_TD.shape[1]) and w in (c, 2 * c) and c % 2 == 0 and c <= WIDEST and ape.shape == (ratio, w)
    angles = cos_ER2.dim() == 2 and cos_ER2.shape == sin_ER2.shape and 2 * cos_ER2.shape[1] <= c
    places = state.shape[2] == 2 * w and state_table.dim() == 2 and state_table.shape[0] == batch
    dense = all(t.is_contiguous() for t in (x_TD, wkv, wgate, ape, norm_weight, cos_ER2, sin_ER2, state))
    return types and exact and lists and shapes and angles and places and dense


@compress.implement("cuda_triton", dtypes=BF16, soc=SOC, needs=[NEED], when=_fits, note="bf16 tokens and weights")
def _compress(
    x_TD: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    cos_ER2: Tensor,
    sin_ER2: Tensor,
    state: Tensor,
    state_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    *,
    ratio: int,
    eps: float,
) -> Tensor:
    (tokens, hidden), (entries, pairs), batch = x_TD.shape, cos_ER2.shape, start_pos.shape[0]
    w, c, per_block, device = wkv.shape[0], norm_weight.shape[0], state.shape[1], x_TD.device
    table, cu, start = (t.to(device).contiguous() for t in (state_table, cu_seqlens, start_pos))
    sizes = _plan(tokens, hidden, w)
    splits, module = blocks(hidden, sizes["chunk"]), kernels("compress")
    rows = torch.empty(splits, tokens, 2 * w, dtype=torch.float32, device=device)
    grid = (blocks(tokens, sizes["TOKENS"]), 2 * blocks(w, sizes["BLOCK_N"]), splits)
    align = math.gcd(16, wkv.data_ptr(), wgate.data_ptr())
    module.project[grid](x_TD, wkv, wgate, rows, tokens, hidden, w, ALIGN=align, **sizes)
    out = torch.empty(entries, c, dtype=x_TD.dtype, device=device)
    place = (table.shape[1], per_block, w)
    if entries:
        step = min(power(2 * ratio if w > c else ratio), 8)
        module.pool[(entries,)](
            rows, ape, norm_weight, cos_ER2, sin_ER2, state, table, cu, start, out, tokens, batch, *place, pairs, eps, RATIO=ratio,
            OVERLAP=w > c, ENTRY=c, SPLITS=splits, BATCH=power(batch + 1), STEP=step, BLOCK_C=power(c, 16), num_warps=8,
        )  # fmt: skip
    block = min(power(2 * w, 16), 1024)
    module.store[(tokens, blocks(2 * w, block))](
        rows, ape, state, table, cu, start, tokens, batch, *place, RATIO=ratio, SPLITS=splits, BATCH=power(batch), BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return out
