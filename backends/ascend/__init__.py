"""Huawei Ascend: Atlas A2 and A3 (910B, 910_93) and Ascend 950, through the ops of torch_npu and of CANN's op packages.

Each file adapts one family of ops: layout and argument translation, always by keyword, within the documented limits. Every op has plain
torch on the same device behind its vendor ops, with the reason in its note. Nothing vendor-specific is imported before a probe.
"""

from typing import TYPE_CHECKING

import torch

import backends.cpu
from backends.ascend import attention, cache, compress, gate, hyper, indexer, linear, moe, norm, rope
from backends.ascend.chips import SOCS
from backends.ascend.plain import register
from backends.ascend.probe import device_type, memory_available, probe, unavailable

__all__ = ["DEVICE", "SOCS", "attention", "backends", "cache", "compress", "gate", "hyper", "indexer", "linear", "memory_available"]
__all__ += ["moe", "norm", "probe", "rope", "unavailable"]

if TYPE_CHECKING:
    DEVICE: torch.device

register()


def __getattr__(name: str) -> torch.device:
    # torch knows the device's name only once torch_npu has been imported, which probing does
    if name == "DEVICE":
        return torch.device(device_type())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
