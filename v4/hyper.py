"""Manifold-constrained hyper-connections: parameters of a sublayer or of the head, under the hub's flat names.

Shapes: n streams, D hidden, T tokens. A sublayer `p` owns p_fn [(2+n)n, nD], p_base [(2+n)n], p_scale [3]; the head owns
hc_head_fn [n, nD], hc_head_base [n], hc_head_scale [1]; all fp32 (specification section 3).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from v4.config import Config
from v4.linear import parameter


class HyperConnection:
    """The call of one hyper-connection over parameters registered on `owner` (kept flat so that names equal the hub's)."""

    def __init__(self, owner: nn.Module, name: str, ops: SimpleNamespace, config: Config, *, head: bool = False) -> None:
        n = config.hc_mult
        rows = n if head else (2 + n) * n
        self._owner = [owner]
        self._names = tuple(f"{name}_{part}" for part in ("fn", "scale", "base"))
        shapes = ((rows, n * config.hidden_size), (1 if head else 3,), (rows,))
        for key, shape in zip(self._names, shapes, strict=True):
            owner.register_parameter(key, parameter(shape, torch.float32))
        self._ops = ops
        self._eps = {"norm_eps": config.rms_norm_eps, "hc_eps": config.hc_eps}
        self._iters = config.hc_sinkhorn_iters

    def _weights(self) -> list[Tensor]:
        parameters = self._owner[0]._parameters
        return [parameters[name] for name in self._names]  # type: ignore[misc]

    def pre(self, streams_TnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sublayer input [T, D], post [T, n] and comb [T, n, n]."""
        return self._ops.hc_pre(streams_TnD, *self._weights(), iters=self._iters, **self._eps)

    def post(self, y_TD: Tensor, streams_TnD: Tensor, post_Tn: Tensor, comb_Tnn: Tensor) -> Tensor:
        """New streams [T, n, D]."""
        return self._ops.hc_post(y_TD, streams_TnD, post_Tn, comb_Tnn)

    def head(self, streams_TnD: Tensor) -> Tensor:
        """Collapse [T, n, D] -> [T, D]."""
        return self._ops.hc_head(streams_TnD, *self._weights(), **self._eps)
