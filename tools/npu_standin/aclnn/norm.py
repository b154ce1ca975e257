"""Normalisation and rotation."""

from __future__ import annotations

from torch import Tensor

from tools.npu_standin.aclnn import model, put
from tools.npu_standin.host import bridge


@bridge("aclnnRmsNorm", "x:t gamma:t epsilon:d y:t rstd:t")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    """npu_rms_norm."""
    put(model("npu::npu_rms_norm")(x, gamma, epsilon=epsilon), y, rstd)
