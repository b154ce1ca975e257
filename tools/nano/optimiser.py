"""Muon for matrices inside layers, AdamW for everything else, as one object with one learning rate.

Muon: momentum, then the nearest orthogonal matrix by Newton-Schulz (five quintic steps), scaled so that an update has the
root mean square of AdamW's (0.2 * sqrt(max(rows, columns))); Liu et al., arXiv 2502.16982. Matrices of one shape go in one batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(g: Tensor) -> Tensor:
    """Nearly orthogonal matrices [..., N, K] with the singular vectors of g."""
    a, b, c = _COEFFICIENTS
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).to(torch.bfloat16 if g.device.type != "cpu" else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x if wide else x.mT).float()


def _uses_muon(name: str, p: nn.Parameter) -> bool:
    last = name.rsplit(".", 1)[-1]
    return p.dim() >= 2 and last not in ("fn", "ape") and ".gate." not in name and not name.startswith(("embed", "head"))


class Optimiser:
    """Both optimisers over a model's named parameters."""

    def __init__(self, model: nn.Module, *, decay: float = 0.05, momentum: float = 0.95) -> None:
        named = list(model.named_parameters())
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        rest: list[nn.Parameter] = []
        for name, p in named:
            if _uses_muon(name, p):
                self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
            else:
                rest.append(p)
        self.buffers = {shape: [torch.zeros_like(p) for p in ps] for shape, ps in self.groups.items()}
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].device.type != "cpu")
        self.parameters = [p for _, p in named]

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """One step at learning rate `rate`; gradients are clipped to norm 1 and cleared. Returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for shape, ps in self.groups.items():
            used = [i for i, p in enumerate(ps) if p.grad is not None]
            buffers = [self.buffers[shape][i] for i in used]
            gradients = [g for p in ps if (g := p.grad) is not None]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            ahead = torch._foreach_lerp(gradients, buffers, self.momentum)
            update = orthogonal(torch.cat([a.reshape(-1, *shape) for a in ahead])) * (0.2 * max(shape) ** 0.5)
            parts = update.split([ps[i].numel() // (shape[0] * shape[1]) for i in used])
            targets: list[Tensor] = [ps[i] for i in used]
            torch._foreach_mul_(targets, 1 - rate * self.decay)
            torch._foreach_add_(targets, [u.view(p.shape) for u, p in zip(parts, targets, strict=True)], alpha=-rate)
        for p in self.parameters:
            p.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on."""
        return {"adam": self.adam.state_dict(), "muon": self.buffers}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.adam.load_state_dict(state["adam"])
        for shape, buffers in state["muon"].items():
            for mine, saved in zip(self.buffers[shape], buffers, strict=True):
                mine.copy_(saved)
