"""Rotation as complex products on the rotary channels, fp32 inside; the other channels are only copied."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.cpu.norm import PIECE, inverse_rms, piece_rows
from ops.rope import q_norm_rope, rope


def _turns(cos: Tensor, sin: Tensor, inverse: bool, dims: int) -> Tensor:
    turn = torch.complex(cos, -sin if inverse else sin)
    return turn[:, None] if dims == 3 else turn


def _rotate(y: Tensor, turn: Tensor) -> None:
    """Turn the last channels of y in place, computing in fp32."""
    pairs = turn.shape[-1]
    if not pairs or not y.numel():
        return
    tail = y[..., -2 * pairs :]
    # complex views need fp32 and even strides: an odd width or a narrow type goes through a copy of the tail
    if y.dtype == torch.float32 and y.shape[-1] % 2 == 0:
        torch.view_as_complex(tail.unflatten(-1, (pairs, 2))).mul_(turn)
        return
    wide = tail.to(torch.float32, memory_format=torch.contiguous_format, copy=True).unflatten(-1, (pairs, 2))
    torch.view_as_complex(wide).mul_(turn)
    tail.copy_(wide.flatten(-2))


@rope.implement("cpu")
def _rope(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, inverse: bool = False) -> Tensor:
    turn = _turns(cos_TR2, sin_TR2, inverse, x.dim())
    if x.numel() <= PIECE:
        y = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        _rotate(y, turn)
        return y.to(x.dtype)
    y, step = torch.empty_like(x, memory_format=torch.contiguous_format), piece_rows(x)
    for i in range(0, x.shape[0], step):
        part = y[i : i + step]
        part.copy_(x[i : i + step])
        _rotate(part, turn[i : i + step])
    return y


@q_norm_rope.implement("cpu")
def _q_norm_rope(q_THC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, eps: float) -> Tensor:
    turn = _turns(cos_TR2, sin_TR2, False, 3)
    if q_THC.numel() <= PIECE:
        wide = q_THC.float().contiguous()
        out = wide * inverse_rms(wide, eps)
        _rotate(out, turn)
        return out.to(q_THC.dtype)
    y, step = torch.empty_like(q_THC, memory_format=torch.contiguous_format), piece_rows(q_THC)
    for i in range(0, q_THC.shape[0], step):
        part = q_THC[i : i + step]
        wide = part.float()
        if q_THC.dtype == torch.float32:
            out = torch.mul(wide, inverse_rms(wide, eps), out=y[i : i + step])
        else:
            out = wide.mul_(inverse_rms(wide, eps))
        _rotate(out, turn[i : i + step])
        if q_THC.dtype != torch.float32:
            y[i : i + step] = out
    return y
