"""Rotation as complex products on the rotary channels, fp32 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.rope import q_norm_rope, rope


def _rotate(y: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Turn the last channels of y in place; fp32, last dimension contiguous."""
    pairs = cos.shape[1]
    if not pairs or not y.numel():
        return
    turn = torch.complex(cos, -sin if inverse else sin)
    if y.dim() == 3:
        turn = turn[:, None]
    if y.shape[-1] % 2:
        # an odd width shifts every second row off the alignment that complex views need
        tail = torch.view_as_complex(y[..., -2 * pairs :].reshape(*y.shape[:-1], pairs, 2).contiguous())
        y[..., -2 * pairs :] = torch.view_as_real(tail * turn).flatten(-2)
        return
    torch.view_as_complex(y[..., -2 * pairs :].unflatten(-1, (pairs, 2))).mul_(turn)


@rope.implement("cpu")
def _rope(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    y = x.float() if x.dtype != torch.float32 else x.clone(memory_format=torch.contiguous_format)
    _rotate(y, cos_TR2, sin_TR2, inverse)
    return y.to(x.dtype)


@q_norm_rope.implement("cpu")
def _q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    y = torch.nn.functional.rms_norm(q_THC.float(), q_THC.shape[-1:], None, eps)
    _rotate(y, cos_TR2, sin_TR2, False)
    return y.to(q_THC.dtype)
