"""Hyper-connections, norms, rotations and cache writes of few tokens, fp32. Shapes as in ops/hyper.py, norm.py, rope.py, cache.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu_native.library import FEW, NEED, kernel, threads
from ops.cache import cache_insert
from ops.hyper import hc_head, hc_post, hc_pre
from ops.norm import rms_norm, unit_rms_norm
from ops.rope import q_norm_rope, rope

F32 = (torch.float32,)
_NOTE = f"up to {FEW} tokens, fp32"
_SMALL = 1 << 16  # elements up to which one thread is at least as fast as torch


def _plain(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors)


def _weights_fit(streams_TnD: Tensor, rows: int, scales: int, fn: Tensor, scale: Tensor, base: Tensor) -> bool:
    t, n, d = streams_TnD.shape
    agree = fn.shape == (rows, n * d) and scale.shape == (scales,) and base.shape == (rows,)
    packed = fn.is_contiguous() and scale.is_contiguous() and base.is_contiguous()
    return agree and packed and 0 < t <= FEW and _plain(streams_TnD, fn, scale, base)


def _pre_fits(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> bool:
    n = streams_TnD.shape[1]
    return _weights_fit(streams_TnD, (2 + n) * n, 3, fn, scale, base)


@hc_pre.implement("cpu_native", dtypes=F32, needs=[NEED], when=_pre_fits, note=_NOTE)
def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    streams, (t, n, d) = streams_TnD.contiguous(), streams_TnD.shape
    x, post, comb = streams.new_empty(t, d), streams.new_empty(t, n), streams.new_empty(t, n, n)
    kernel("v4_hc_pre")(
        streams.data_ptr(), fn.data_ptr(), scale.data_ptr(), base.data_ptr(), x.data_ptr(), post.data_ptr(), comb.data_ptr(),
        t, n, d, norm_eps, hc_eps, iters, threads(),
    )  # fmt: skip
    return x, post, comb


def _head_fits(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> bool:
    return _weights_fit(streams_TnD, streams_TnD.shape[1], 1, fn, scale, base)


@hc_head.implement("cpu_native", dtypes=F32, needs=[NEED], when=_head_fits, note=_NOTE)
def _hc_head(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
    streams, (t, n, d) = streams_TnD.contiguous(), streams_TnD.shape
    x = streams.new_empty(t, d)
    kernel("v4_hc_head")(
        streams.data_ptr(), fn.data_ptr(), scale.data_ptr(), base.data_ptr(), x.data_ptr(), t, n, d, norm_eps, hc_eps, threads()
    )
    return x


def _post_fits(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> bool:
    t, n, d = streams_TnD.shape
    agree = y_TD.shape == (t, d) and post_Tn.shape == (t, n) and comb_Tnn.shape == (t, n, n)
    return agree and 0 < t <= FEW and _plain(y_TD, streams_TnD, post_Tn, comb_Tnn)


@hc_post.implement("cpu_native", dtypes=F32, needs=[NEED], when=_post_fits, note=_NOTE)
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    y, streams, post, comb = y_TD.contiguous(), streams_TnD.contiguous(), post_Tn.contiguous(), comb_Tnn.contiguous()
    out, (t, n, d) = torch.empty_like(streams), streams.shape
    kernel("v4_hc_post")(y.data_ptr(), streams.data_ptr(), post.data_ptr(), comb.data_ptr(), out.data_ptr(), t, n, d)
    return out


def _norm_fits(x: Tensor, weight: Tensor, *, eps: float) -> bool:
    return x.dtype == weight.dtype == torch.float32 and 0 < x.numel() <= _SMALL and weight.shape == x.shape[-1:]


@rms_norm.implement("cpu_native", dtypes=F32, needs=[NEED], when=_norm_fits, note="small fp32")
def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    x, weight, d = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    kernel("v4_rms_norm")(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // d, d, eps)
    return y


def _unit_fits(x: Tensor, *, eps: float) -> bool:
    return x.dtype == torch.float32 and 0 < x.numel() <= _SMALL


@unit_rms_norm.implement("cpu_native", dtypes=F32, needs=[NEED], when=_unit_fits, note="small fp32")
def _unit_rms_norm(x: Tensor, *, eps: float) -> Tensor:
    x, d = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    kernel("v4_rms_norm")(x.data_ptr(), None, y.data_ptr(), x.numel() // d, d, eps)
    return y


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float, normalise: int, eps: float) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y, tokens, c = torch.empty_like(x), x.shape[0], x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    kernel("v4_rope")(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), tokens, heads, c, cos.shape[1], sign, normalise, eps
    )
    return y


def _turn_fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    agree = x.dim() in (2, 3) and cos.shape == sin.shape == (x.shape[0], cos.shape[1]) and 2 * cos.shape[1] <= x.shape[-1]
    return agree and 0 < x.numel() <= _SMALL and _plain(x, cos, sin)


def _rope_fits(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> bool:
    return _turn_fits(x, cos_TR2, sin_TR2)


@rope.implement("cpu_native", dtypes=F32, needs=[NEED], when=_rope_fits, note="small fp32")
def _rope(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    return _turned(x, cos_TR2, sin_TR2, -1.0 if inverse else 1.0, 0, 0.0)


def _q_fits(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> bool:
    return _turn_fits(q_THC, cos_TR2, sin_TR2)


@q_norm_rope.implement("cpu_native", dtypes=F32, needs=[NEED], when=_q_fits, note="small fp32")
def _q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    return _turned(q_THC, cos_TR2, sin_TR2, 1.0, 1, eps)


def _insert_fits(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> bool:
    agree = rows_RW.shape == (slots.shape[0], cache.shape[2]) and cache.dtype == rows_RW.dtype and slots.dtype == torch.int64
    return agree and cache.is_contiguous() and rows_RW.shape[0] <= 64


@cache_insert.implement("cpu_native", needs=[NEED], when=_insert_fits, note="up to 64 rows of one type")
def _cache_insert(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    if not rows_RW.shape[0]:
        return
    rows, slots, capacity = rows_RW.contiguous(), slots.contiguous(), cache.shape[0] * cache.shape[1]
    size = cache.shape[2] * cache.element_size()
    if kernel("v4_insert")(cache.data_ptr(), rows.data_ptr(), slots.data_ptr(), rows.shape[0], capacity, size):
        raise IndexError(
            f"cache_insert: slots reach from {int(slots.min())} to {int(slots.max())}, the cache has {capacity} rows"
        )
