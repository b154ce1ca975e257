"""NVIDIA GPUs: so far every op is plain torch on the device, the one that the cpu backend runs too.

Importing this module switches one torch setting, for results that the contracts allow: sums of bf16 products are not split into parts
that are added in bf16.
"""

import torch

import backends.cpu
from backends.cuda.probe import memory_available, probe, unavailable
from ops.contract import CONTRACTS

__all__ = ["DEVICE", "PLAIN", "backends", "memory_available", "probe", "unavailable"]

DEVICE = torch.device("cuda")
PLAIN = "plain torch"

torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

for _contract in CONTRACTS.values():
    if (_plain := _contract.impls.get("cpu")) is not None:
        _contract.implement("cuda", note=PLAIN)(_plain.fn)
