"""This project's own CANN op, behind the torch half that backends/ascend/csrc/torch_half compiles to."""

from __future__ import annotations

from torch import Tensor

from tools.npu_standin.aclnn import model, put
from tools.npu_standin.host import bridge


@bridge("aclnnV4HcHead", "streams:t fn:t scale:t base:t norm_eps:d hc_eps:d y:t")
def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float, y: Tensor) -> None:
    """v4_ascend::hc_head."""
    put(model("v4_ascend::hc_head")(streams, fn, scale, base, norm_eps=norm_eps, hc_eps=hc_eps), y)
