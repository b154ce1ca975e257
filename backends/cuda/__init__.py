"""NVIDIA GPUs: so far every op is plain torch on the device, the one that the cpu backend runs too.
"""

import torch

import backends.cpu
from backends.cuda.graphs import replayed
from backends.cuda.probe import memory_available, probe, unavailable
from ops.contract import CONTRACTS

__all__ = ["DEVICE", "PLAIN", "backends", "memory_available", "probe", "replayed", "unavailable"]

DEVICE = torch.device("cuda")
PLAIN = "plain torch"

for _contract in CONTRACTS.values():
    if (_plain := _contract.impls.get("cpu")) is not None:
        _contract.implement("cuda", note=PLAIN)(_plain.fn)
