"""Decode steps on the CPU in compiled C++: ops of up to a few fp32 tokens, whose cost is reading weights and cache once.

Stands in front of the cpu backend, which takes everything else, calls whose shapes do not agree included. torch's own products
read fp32 weights slower than memory gives them, and the many small calls of a step cost as much as the reading (docs/performance.md).
"""

from backends.cpu.probe import DEVICE, memory_available
from backends.cpu.probe import probe as _torch_probe
from backends.cpu_native import library, paged, products, streams
from ops.probe import Probe

__all__ = ["DEVICE", "memory_available", "paged", "probe", "products", "streams"]


def probe() -> Probe:
    """The CPU's probe, knowing besides whether the kernels have been compiled for this machine."""
    found = _torch_probe()
    have = found.have | {library.NEED} if library.available() else found.have
    return Probe(device=found.device, versions=found.versions, have=have)
