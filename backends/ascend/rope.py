"""Rotation of the last channels in interleaved pairs: the vendor's op works in place, on tables with every angle twice.

Shapes as in ops/rope.py; the vendor's x is [T, N, 1, C] with cos and sin [T, 1, 1, 2*R2]. Source: Ascend operator notes, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.ascend.hoist import ByIdentity
from backends.ascend.norm import RMS_NORM, ones
from ops.rope import norm_rope, q_norm_rope, rope

ROTARY = {"custom": "custom::inplace_partial_rotary_mul", "cann_ops_transformer": "cann_ops_transformer::inplace_partial_rotary_mul"}
"""Namespace -> the op, whose arguments go by the same names in both."""

WIDEST = 1024
_DTYPES = (torch.bfloat16, torch.float32)
_twice = ByIdentity()


def pairs(table_TR2: Tensor) -> Tensor:
    """[T, R2] -> [T, 2*R2] with every value twice, side by side; repeat_interleave would wait for the device."""
    return table_TR2[:, :, None].expand(-1, -1, 2).reshape(table_TR2.shape[0], -1)


def doubled(table_TR2: Tensor, negative: bool = False) -> Tensor:
    """[T, R2] -> [T, 1, 1, 2*R2] with every value twice (c0, c0, c1, c1, ...), made once per table."""

    def make() -> Tensor:
        wide = pairs(-table_TR2 if negative else table_TR2)
        return wide[:, None, None]

    return _twice(table_TR2, (negative,), make)


def _rotate_(namespace: str, x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, inverse: bool) -> Tensor:
    """Turn the last channels of x [T, C] or [T, N, C] in place; the inverse rotation has -sin."""
    channels = x.shape[-1]
    getattr(torch.ops, namespace).inplace_partial_rotary_mul(
        x=x.view(x.shape[0], -1, 1, channels),
        r1=doubled(cos_TR2),
        r2=doubled(sin_TR2, negative=inverse),
        rotary_mode="interleave",
        partial_slice=[channels - 2 * cos_TR2.shape[1], channels],
    )
    return x


def _fits(x: Tensor, cos_TR2: Tensor) -> bool:
    return x.shape[0] > 0 and x.shape[-1] % 2 == 0 and x.shape[-1] <= WIDEST and cos_TR2.shape[1] > 0


def _rope_of(namespace: str) -> Callable[..., Tensor]:
    def run(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
        return _rotate_(namespace, x.clone(memory_format=torch.contiguous_format), cos_TR2, sin_TR2, inverse)

    return run


def _q_norm_rope_of(namespace: str) -> Callable[..., Tensor]:
    def run(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
        normed: Tensor = torch.ops.npu.npu_rms_norm(input=q_THC, gamma=ones(q_THC.shape[-1], q_THC.dtype, q_THC.device), epsilon=eps)[0]
        return _rotate_(namespace, normed, cos_TR2, sin_TR2, False)

    return run


def _norm_rope_of(namespace: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
        normed: Tensor = torch.ops.npu.npu_rms_norm(input=x, gamma=weight, epsilon=eps)[0]
        return _rotate_(namespace, normed, cos_TR2, sin_TR2, False)

    return run


def _norm_fits(x: Tensor, weight: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> bool:
    return _fits(x, cos_TR2) and x.is_contiguous() and weight.dtype == x.dtype


for _namespace, _op in ROTARY.items():
    norm_rope.implement("ascend", name=f"npu_rms_norm, {_op}", dtypes=_DTYPES, needs=(RMS_NORM, _op), when=_norm_fits)(_norm_rope_of(_namespace))
    rope.implement(
        "ascend",
        name=_op,
        dtypes=_DTYPES,
        needs=(_op,),
        when=lambda x, cos_TR2, sin_TR2, *, inverse=False: _fits(x, cos_TR2),
    )(_rope_of(_namespace))
    q_norm_rope.implement(
        "ascend",
        name=f"npu_rms_norm, {_op}",
        dtypes=_DTYPES,
        needs=(RMS_NORM, _op),
        when=lambda q_THC, cos_TR2, sin_TR2, *, eps: _fits(q_THC, cos_TR2) and q_THC.is_contiguous(),
    )(_q_norm_rope_of(_namespace))

SLICE = 896
ROWS = 1000


@functools.cache
def _wheel_fits(channels: int, rows: int) -> bool:
    return 0 < channels < SLICE and 0 < rows < ROWS


def _rotary_mul_when(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> bool:
    return _wheel_fits(2 * cos_TR2.shape[1], x.numel() // max(x.shape[-1], 1))


@rope.implement("ascend", name="npu_rotary_mul", dtypes=_DTYPES, needs=("npu::npu_rotary_mul",), when=_rotary_mul_when,
                note="in fp32 on the rotary channels")  # fmt: skip
def _rope_wheel(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    rotary = 2 * cos_TR2.shape[1]
    y = x.clone(memory_format=torch.contiguous_format)
    tail = y[..., x.shape[-1] - rotary :].float().reshape(x.shape[0], -1, 1, rotary)
    arguments: dict[str, Any] = {"r1": doubled(cos_TR2), "r2": doubled(sin_TR2, negative=inverse)}
    turned = torch.ops.npu.npu_rotary_mul(input=tail, rotary_mode="interleave", **arguments)
    y[..., x.shape[-1] - rotary :] = turned.view(*x.shape[:-1], rotary).to(x.dtype)
    return y
