"""Hyper-connections in two kernels: the product of all streams with fn, then coefficients, Sinkhorn and the collapse.

Shapes as in ops/hyper.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cuda_triton.launch import FLOATS, NEED, SOC, blocks, kernels, power, warps
from ops.hyper import hc_head, hc_post, hc_pre

STREAMS = (2, 4, 8)
NOTE = f"contiguous streams, {STREAMS} of them"
_PROGRAMS = 264
"""Programs that fill the chip twice."""


def _split(tokens: int, wide: int) -> dict[str, int]:
    # few tokens: many splits, so that reading fn is spread over the chip
    rows, block = 64 if tokens >= 1024 else 16, 128
    wanted = max(_PROGRAMS // blocks(tokens, rows), 1)
    chunk = blocks(blocks(wide, block), min(wanted, 128)) * block
    return {"rows": rows, "block": block, "chunk": chunk, "splits": blocks(wide, chunk)}


def _mixes(streams_TnD: Tensor, fn: Tensor) -> tuple[Tensor, int, int]:
    """Partial sums [S, T, N] fp32 with the number of splits S and of padded mixes N."""
    tokens, wide, count = streams_TnD.shape[0], streams_TnD.shape[1] * streams_TnD.shape[2], fn.shape[0]
    plan, padded = _split(tokens, wide), power(count + 1, 16)
    partial = torch.empty(plan["splits"], tokens, padded, dtype=torch.float32, device=streams_TnD.device)
    kernels("hyper").mixes[(blocks(tokens, plan["rows"]), plan["splits"])](
        streams_TnD, fn, partial, tokens, wide, count, plan["chunk"], BF16=streams_TnD.dtype == torch.bfloat16,
        TOKENS=plan["rows"], MIXES=padded, BLOCK=plan["block"], num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial, plan["splits"], padded


def _collapse(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float, iters: int, head: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, width = streams_TnD.shape
    partial, splits, padded = _mixes(streams_TnD, fn)
    x = torch.empty(tokens, width, dtype=streams_TnD.dtype, device=streams_TnD.device)
    # the head has neither; a tensor is needed in their place
    post, comb = (x, x) if head else (torch.empty(tokens, *[n] * k, dtype=torch.float32, device=x.device) for k in (1, 2))
    block = min(power(width, 16), 1024)
    kernels("hyper").collapse[(tokens, blocks(width, block))](
        streams_TnD, partial, scale, base, x, post, comb, tokens, width, fn.shape[0], splits, norm_eps, hc_eps, iters,
        HEAD=head, STREAMS=n, MIXES=padded, SPLITS=power(splits), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return x, post, comb


def _fits(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, head: bool) -> bool:
    if streams.dim() != 3 or streams.shape[1] not in STREAMS or streams.dtype not in FLOATS or not streams.numel():
        return False
    n = streams.shape[1]
    rows = n if head else (2 + n) * n
    shapes = fn.shape == (rows, n * streams.shape[2]) and scale.shape == (1 if head else 3,) and base.shape == (rows,)
    return shapes and all(t.is_contiguous() for t in (streams, fn, scale, base)) and {
        fn.dtype, scale.dtype, base.dtype
    } == {torch.float32}  # fmt: skip


def _pre_fits(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int) -> bool:
    return iters >= 1 and _fits(streams_TnD, fn, scale, base, False)


@hc_pre.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_pre_fits, note=NOTE)
def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _collapse(streams_TnD, fn, scale, base, norm_eps, hc_eps, iters, False)


def _head_fits(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> bool:
    return _fits(streams_TnD, fn, scale, base, True)


@hc_head.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_head_fits, note=NOTE)
def _hc_head(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
    return _collapse(streams_TnD, fn, scale, base, norm_eps, hc_eps, 0, True)[0]


def _post_fits(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> bool:
    if streams_TnD.dim() != 3 or streams_TnD.shape[1] not in STREAMS or streams_TnD.dtype not in FLOATS or not streams_TnD.numel():
        return False
    t, n, d = streams_TnD.shape
    shapes = y_TD.shape == (t, d) and post_Tn.shape == (t, n) and comb_Tnn.shape == (t, n, n)
    types = y_TD.dtype == streams_TnD.dtype and post_Tn.dtype == comb_Tnn.dtype == torch.float32
    return shapes and types and all(x.is_contiguous() for x in (y_TD, streams_TnD, post_Tn, comb_Tnn))


@hc_post.implement("cuda_triton", dtypes=FLOATS, soc=SOC, needs=[NEED], when=_post_fits, note=NOTE)
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    tokens, n, width = streams_TnD.shape
    out = torch.empty_like(streams_TnD)
    block = min(power(width, 16), 1024)
    kernels("hyper").mix_back[(tokens, blocks(width, block))](
        y_TD, streams_TnD, post_Tn, comb_Tnn, out, width, STREAMS=n, BLOCK=block, num_warps=warps(n * block)
    )
    return out
