"""NVIDIA GPUs: every op is plain torch on the device, nearly all of them the one that the cpu backend runs too."""

import torch

import backends.cpu
from backends.cuda import moe
from backends.cuda.graphs import Recorder as recorder
from backends.cuda.probe import memory_available, probe, unavailable
from ops.contract import CONTRACTS

__all__ = ["DEVICE", "PLAIN", "backends", "memory_available", "moe", "probe", "recorder", "unavailable"]

DEVICE = torch.device("cuda")
PLAIN = "plain torch"

for _contract in CONTRACTS.values():
    if "cuda" not in _contract.impls and (_plain := _contract.impls.get("cpu")) is not None:
        _contract.implement("cuda", note=PLAIN)(_plain.fn)
