"""Hyper-connections, norms, rotations and cache writes of few tokens, fp32. Shapes as in ops/hyper.py, norm.py, rope.py, cache.py."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu_native.library import FEW, NEED, native
from ops.cache import cache_insert
from ops.hyper import hc_head, hc_post, hc_pre
from ops.norm import rms_norm, unit_rms_norm
from ops.rope import q_norm_rope, rope

F32 = (torch.float32,)
_NOTE = f"up to {FEW} tokens, fp32"


def _pre_fits(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> bool:
    return native().hc_pre(True, streams_TnD, fn, scale, base, norm_eps, hc_eps, iters)


@hc_pre.implement("cpu_native", dtypes=F32, needs=[NEED], when=_pre_fits, note=_NOTE)
def _hc_pre(
    streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    return native().hc_pre(False, streams_TnD, fn, scale, base, norm_eps, hc_eps, iters)


def _head_fits(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> bool:
    return native().hc_head(True, streams_TnD, fn, scale, base, norm_eps, hc_eps)


@hc_head.implement("cpu_native", dtypes=F32, needs=[NEED], when=_head_fits, note=_NOTE)
def _hc_head(streams_TnD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, hc_eps: float) -> Tensor:
    return native().hc_head(False, streams_TnD, fn, scale, base, norm_eps, hc_eps)


def _post_fits(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> bool:
    return native().hc_post(True, y_TD, streams_TnD, post_Tn, comb_Tnn)


@hc_post.implement("cpu_native", dtypes=F32, needs=[NEED], when=_post_fits, note=_NOTE)
def _hc_post(y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
    return native().hc_post(False, y_TD, streams_TnD, post_Tn, comb_Tnn)


def _norm_fits(x: Tensor, weight: Tensor, *, eps: float) -> bool:
    return native().rms_norm(True, x, weight, eps)


@rms_norm.implement("cpu_native", dtypes=F32, needs=[NEED], when=_norm_fits, note="small fp32")
def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return native().rms_norm(False, x, weight, eps)


def _unit_fits(x: Tensor, *, eps: float) -> bool:
    return native().rms_norm(True, x, None, eps)


@unit_rms_norm.implement("cpu_native", dtypes=F32, needs=[NEED], when=_unit_fits, note="small fp32")
def _unit_rms_norm(x: Tensor, *, eps: float) -> Tensor:
    return native().rms_norm(False, x, None, eps)


def _rope_fits(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> bool:
    return native().rope(True, x, cos_TR2, sin_TR2)


@rope.implement("cpu_native", dtypes=F32, needs=[NEED], when=_rope_fits, note="small fp32")
def _rope(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    return native().rope(False, x, cos_TR2, sin_TR2, -1.0 if inverse else 1.0, False, 0.0)


def _q_fits(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> bool:
    return native().rope(True, q_THC, cos_TR2, sin_TR2)


@q_norm_rope.implement("cpu_native", dtypes=F32, needs=[NEED], when=_q_fits, note="small fp32")
def _q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    return native().rope(False, q_THC, cos_TR2, sin_TR2, 1.0, True, eps)


def _insert_fits(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> bool:
    return native().cache_insert(True, cache, rows_RW, slots)


@cache_insert.implement("cpu_native", needs=[NEED], when=_insert_fits, note="up to 64 rows of one type")
def _cache_insert(cache: Tensor, rows_RW: Tensor, slots: Tensor) -> None:
    if native().cache_insert(False, cache, rows_RW, slots) is None:
        found, capacity = f"{int(slots.min())} to {int(slots.max())}", cache.shape[0] * cache.shape[1]
        raise IndexError(f"cache_insert: slots reach from {found}, the cache has {capacity} rows")
