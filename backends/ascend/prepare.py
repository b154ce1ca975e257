"""Weights as the vendor's ops want them, once after loading: values stay the same, types and layouts in memory change.

Shapes: experts E, hidden D, groups G, inputs K, outputs N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _inputs_first(weight_GNK: Tensor) -> Tensor:
    """The same [G, N, K], lying in memory as [G, K, N]."""
    return weight_GNK.transpose(1, 2).contiguous().transpose(1, 2)


RECIPES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    ".gate.weight": (torch.Tensor.float, "logits are an fp32 product: the weight [E, D] is widened once instead of in every call"),
    ".gate.tid2eid": (lambda table: table.to(torch.int32), "npu_moe_gating_top_k takes the table as int32"),
    ".attn.wo_a": (_inputs_first, "npu_transpose_batchmatmul takes [G, K, N]"),
    ".compressor.norm.weight": (torch.Tensor.float, "custom.compressor takes its norm weight in fp32"),
}
"""Ending of a parameter's name -> what is done with it, and why."""


def _lay_behind(owner: nn.Module, name: str, last_owner: nn.Module, last_name: str) -> None:
    """Move a parameter [E, ...] and another [...] into one memory, the second behind the first."""
    first, last = getattr(owner, name).detach(), getattr(last_owner, last_name).detach()
    both = first.new_empty(first.shape[0] + 1, *first.shape[1:])
    both[:-1].copy_(first)
    both[-1].copy_(last)
    setattr(owner, name, nn.Parameter(both[:-1], requires_grad=False))
    setattr(last_owner, last_name, nn.Parameter(both[-1], requires_grad=False))


def prepare(model: nn.Module) -> None:
    """Replace the parameters that RECIPES names, in place of the old ones, one at a time; INT8 shared experts go behind the routed ones."""
    for module in model.modules():
        routed, shared = getattr(module, "experts", None), getattr(module, "shared_experts", None)
        if routed is None or shared is None or routed.w13.dtype != torch.int8:
            continue
        if shared.w13.weight.dtype == torch.int8 and shared.w13.weight.shape == routed.w13.shape[1:]:
            _lay_behind(routed, "w13", shared.w13, "weight")
    for name, parameter in list(model.named_parameters()):
        change = next((recipe for ending, (recipe, _) in RECIPES.items() if name.endswith(ending)), None)
        if change is None:
            continue
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner) if owner else model, last, nn.Parameter(change(parameter.detach()), requires_grad=False))
