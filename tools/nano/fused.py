"""Element-wise parts of the training model as functions of flat tokens, so that each can be compiled alone and once.

N tokens, n streams, D hidden, H heads, C width, R2 rotary pairs, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.nano import fake
from tools.nano.sinkhorn import sinkhorn

T = TypeVar("T")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D] normalised in fp32, times `weight` [D] if there is one; in x's type."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2*R2 channels of x [..., C] in interleaved pairs; cos and sin broadcast to [..., R2]."""
    r = 2 * cos.shape[-1]
    a, b = x[..., -r::2].float(), x[..., x.shape[-1] - r + 1 :: 2].float()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-r], turned.to(x.dtype)], -1)


def q_norm_rope(q: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Per-head norm without weight, then rope; q [B, T, H, C], cos and sin [T, R2]."""
    return rope(rms_norm(q, None, eps), cos[:, None], sin[:, None])


def _coefficients(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    f = streams.flatten(1)
    inverse = torch.rsqrt(f.float().square().mean(-1, keepdim=True) + eps)
    return F.linear(f, fn.to(f.dtype)).float() * inverse


def hc_coefficients(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, hc_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [N, n, D] -> sublayer input [N, D], post [N, n], logits of comb [N, n, n]."""
    n = streams.shape[1]
    u = _coefficients(streams, fn, eps)
    pre = torch.sigmoid(u[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(u[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (u[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    return (pre[..., None] * streams.float()).sum(1).to(streams.dtype), post, logits


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y [N, D] and streams [N, n, D] -> new streams: post_k * y + sum_j comb[j, k] * stream_j."""
    mixed = (comb[..., None] * streams.float()[:, :, None]).sum(1)
    return (post[..., None] * y.float()[:, None] + mixed).to(streams.dtype)


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, eps: float, hc_eps: float) -> Tensor:
    """Streams [N, n, D] -> [N, D]."""
    pre = torch.sigmoid(_coefficients(streams, fn, eps) * scale + base) + hc_eps
    return (pre[..., None] * streams.float()).sum(1).to(streams.dtype)


def swiglu(gate: Tensor, up: Tensor, limit: float, weight: Tensor | None = None) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), times `weight` if given; fp32 inside."""
    h = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    return (h if weight is None else h * weight).to(gate.dtype)


def pool(k: Tensor, s: Tensor) -> Tensor:
    """Softmax over the slots: k and s [B, E, slots, c] -> fp32 [B, E, c]."""
    return (torch.softmax(s.float(), 2) * k.float()).sum(2)


def part(scores: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over one part of the keys: probabilities in the scores' type, and the log of the sum of exponentials fp32 [..., 1].

    Rows without a usable key give zeros and -inf.
    """
    s = scores.float().masked_fill(~usable, float("-inf"))
    lse = torch.logsumexp(s, -1, keepdim=True)
    return torch.exp(s - lse.clamp(min=-1e30)).to(scores.dtype), lse


def index_scores(dots: Tensor, w: Tensor, visible: Tensor) -> Tensor:
    """dots [B, Hi, T, E], w fp32 [B, T, Hi] -> fp32 [B, T, E]: sum over heads of w * relu(dots), -inf where not visible."""
    found = (F.relu(dots.float()) * w.transpose(1, 2)[..., None]).sum(1)
    return found.masked_fill(~visible, float("-inf"))


def index_loss(p: Tensor, share: Tensor, scores: Tensor, usable: Tensor) -> Tensor:
    """KL divergence of the indexer from the attention, weighted by the attention's mass on compressed entries.

    p [B, H, T, E] and share fp32 [B, H, T, 1], taken as constants; scores fp32 and usable [B, T, E].
    """
    target = (p.detach().float() * share.detach()).sum(1)
    mass = target.sum(-1)
    target = target / mass.clamp(min=1e-9)[..., None]
    log_q = torch.log_softmax(scores.masked_fill(~usable, -1e9), -1)
    kl = (target * (torch.log(target.clamp(min=1e-20)) - log_q)).sum(-1)
    return (kl * mass).sum() / mass.sum().clamp(min=1e-9)


class Fused:
    """These functions, compiled or as they are. sinkhorn: "torch" or "triton"."""

    def __init__(self, *, compiled: bool = False, sinkhorn_kind: str = "torch") -> None:
        self.compiled, self.sinkhorn_kind = compiled, sinkhorn_kind
        if compiled:
            # one version per stage and kind of layer: the default of 8 would leave some of them uncompiled
            torch._dynamo.config.recompile_limit = 64

        def wrap(f: Callable[..., T]) -> Callable[..., T]:
            return torch.compile(f, dynamic=True) if compiled else f

        self._rms_norm, self._rope, self.q_norm_rope = wrap(rms_norm), wrap(rope), wrap(q_norm_rope)
        self.hc_coefficients, self.hc_post, self.hc_head = wrap(hc_coefficients), wrap(hc_post), wrap(hc_head)
        self.swiglu, self.pool, self.part = wrap(swiglu), wrap(pool), wrap(part)
        self.index_scores, self.index_loss = wrap(index_scores), wrap(index_loss)
        self._fp8_activation, self._fp4_rows = wrap(fake.fp8_activation), wrap(fake.fp4)
        self.sinkhorn = sinkhorn(sinkhorn_kind)

    def fp8_activation(self, x: Tensor, group: int = 128, channels: int | None = None) -> Tensor:
        """As fake.fp8_activation; always called with two dimensions."""
        return self._fp8_activation(x.reshape(-1, x.shape[-1]), group, channels).view(x.shape)

    def fp4_rows(self, x: Tensor) -> Tensor:
        """As fake.fp4; always called with two dimensions."""
        return self._fp4_rows(x.reshape(-1, x.shape[-1])).view(x.shape)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As the function; always called with two dimensions, so that one compiled version serves every rank."""
        return self._rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, C] or [B, S, H, C]; cos and sin [S, R2]. Always called with four dimensions."""
        four = x if x.dim() == 4 else x[:, :, None]
        return self._rope(four, cos[:, None], sin[:, None]).view(x.shape)

    def plain(self) -> Fused:
        """The same functions, not compiled."""
        return Fused(sinkhorn_kind=self.sinkhorn_kind)
