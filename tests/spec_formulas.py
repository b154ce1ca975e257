"""Formulas of the specification that transformers does not compute, written out from its text: FP8 and FP4 round trips, the
quantised indexer of a CSA layer, and routed experts with quantised activations.

Shapes: T tokens, D hidden, H index heads, d index width, E entries, A rows of one expert, I expert width. All fp32, one
sequence from 0."""

from __future__ import annotations

import torch
from torch import Tensor

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def _power_of_two_above(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.exp2((exponent - (mantissa == 0.5).int()).double())


def fp8(x: Tensor, group: int = 128) -> Tensor:
    """Round trip of activations: groups of `group` along the last axis, s = 2^ceil(log2(max(amax, 1e-4)/448)) (section 10.3)."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group].double()
        scale = _power_of_two_above(part.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)
        rounded = (part / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
        out[..., start : start + group] = (rounded * scale).float()
    return out


def fp4(x: Tensor, group: int = 32) -> Tensor:
    """Round trip to e2m1 in groups of 32: s = 2^ceil(log2(max(amax, 6*2^-126)/6)), to nearest, ties to the even code
    (section 7)."""
    parts = x.double().unflatten(-1, (-1, group))
    scale = _power_of_two_above(parts.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126) / 6)
    magnitude = (parts / scale).abs().clamp(max=6)
    distance = (magnitude[..., None] - _FP4).abs()
    odd = torch.arange(8) % 2
    code = (distance + odd * 1e-12).argmin(-1)  # an exact tie goes to the code with a zero last bit
    return (torch.copysign(_FP4[code], parts) * scale).flatten(-2).float()


def hadamard(x: Tensor) -> Tensor:
    """x @ H / sqrt(n), H the Sylvester matrix of the last axis' size."""
    h = torch.ones(1, 1)
    while h.shape[0] < x.shape[-1]:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return x @ h * x.shape[-1] ** -0.5


def rope(x: Tensor, positions_T: Tensor, frequency_R2: Tensor) -> Tensor:
    """Interleaved rotation of the last channels of x [T, ..., d] as complex numbers."""
    r = 2 * len(frequency_R2)
    angle = positions_T.float()[:, None] * frequency_R2
    turn = torch.polar(torch.ones_like(angle), angle).reshape(len(angle), *[1] * (x.dim() - 2), -1)
    pairs = torch.view_as_complex(x[..., -r:].float().unflatten(-1, (-1, 2)).contiguous())
    return torch.cat([x[..., :-r], torch.view_as_real(pairs * turn).flatten(-2)], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps)."""
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def csa_entries(x_TD: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, norm: Tensor, frequency_R2: Tensor) -> Tensor:
    """Entries [T//4, c] of an overlapping compressor (section 6): first halves of the block before, second halves of the own
    block."""
    c = norm.shape[0]
    k = x_TD @ wkv.T
    s = x_TD @ wgate.T + ape[torch.arange(len(x_TD)) % 4]
    entries = []
    for i in range(len(x_TD) // 4):
        own, before = slice(4 * i, 4 * i + 4), slice(4 * i - 4, 4 * i)
        values, scores = k[own, c:], s[own, c:]
        if i:
            values, scores = torch.cat([k[before, :c], values]), torch.cat([s[before, :c], scores])
        entries.append((scores.softmax(0) * values).sum(0))
    return rope(rms_norm(torch.stack(entries), norm), 4 * torch.arange(len(entries)), frequency_R2)


def index_scores(q_THd: Tensor, w_TH: Tensor, keys_Ed: Tensor) -> Tensor:
    """S[t, i] = sum_h w[t, h] * max(0, <q[t, h], K[i]>), minus infinity for entries a query may not see (section 7)."""
    scores = torch.einsum("thd,ed->the", q_THd, keys_Ed).relu().mul(w_TH[..., None]).sum(1)
    visible = (torch.arange(len(q_THd)) + 1) // 4
    return scores.masked_fill(torch.arange(len(keys_Ed)) >= visible[:, None], float("-inf"))


def expert(x_AD: Tensor, weight_A: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    """One routed expert with quantised activations: the clamp is asymmetric and the routing weight enters before w2 (section
    9)."""
    x = fp8(x_AD)
    a, b = (x @ w1.T).clamp(max=limit), (x @ w3.T).clamp(-limit, limit)
    return fp8(torch.nn.functional.silu(a) * b * weight_A[:, None]) @ w2.T
