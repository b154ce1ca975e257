"""NVIDIA GPUs with kernels of our own in Triton. Stands in front of the cuda backend, plain torch, which takes every other call.

Each implementation has a shape rule (`when`), so that shapes that do not agree go to torch, which refuses them.
"""

import importlib.util
from dataclasses import replace

import torch

from backends.cuda import replayed
from backends.cuda.probe import memory_available, unavailable
from backends.cuda.probe import probe as _device_probe
from backends.cuda_triton import attention, cache, compress, experts, hyper, indexer, moe, norm, packed
from backends.cuda_triton.launch import NEED
from ops.probe import Probe

__all__ = ["DEVICE", "attention", "cache", "compress", "experts", "hyper", "indexer", "memory_available", "moe", "norm", "packed", "probe"]
__all__ += ["replayed", "unavailable"]

DEVICE = torch.device("cuda")


def probe() -> Probe:
    """The device as the cuda backend sees it, knowing besides whether Triton is installed."""
    found = _device_probe()
    have = found.have | {NEED} if importlib.util.find_spec("triton") is not None else found.have
    return replace(found, have=have, hint=lambda names: "pip install triton, or use --backend cuda with ops: plain torch takes these calls")
