"""Huawei Ascend: Atlas A2 and A3 (910B, 910_93) and Ascend 950, through the ops of torch_npu and of CANN's op packages.

Each file adapts one family of ops: layout and argument translation, always by keyword, within the documented limits. Every op has plain
torch on the same device behind its vendor ops, with the reason in its note. Nothing vendor-specific is imported before a probe.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

import backends.cpu
from backends.ascend import attention, cache, compress, gate, hyper, indexer, int8, linear, moe, moe_layer, mx, norm, rope
from backends.ascend.chips import SOCS
from backends.ascend.failures import explain_failure
from backends.ascend.limits import enforced
from backends.ascend.plain import register
from backends.ascend.prepare import prepare
from backends.ascend.probe import device_type, memory_available, probe, unavailable
from backends.ascend.storage import kinds, refusal
from ops.probe import Probe

__all__ = ["DEVICE", "SOCS", "attention", "backends", "cache", "checks", "compress", "explain_failure", "gate", "hyper", "indexer"]
__all__ += ["int8", "kinds", "linear", "memory_available", "moe", "moe_layer", "mx", "norm", "prepare", "probe", "refusal", "rope", "unavailable"]

if TYPE_CHECKING:
    DEVICE: torch.device

register()


def checks(found: Probe) -> AbstractContextManager[None]:
    """What --checked puts around every call: the documented limits of the vendor's ops, on the chip that was probed."""
    return enforced(found.soc)


def __getattr__(name: str) -> torch.device:
    # torch knows the device's name only once torch_npu has been imported, which probing does
    if name == "DEVICE":
        return torch.device(device_type())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
