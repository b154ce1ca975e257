"""Every contract in chunked torch on the CPU: correct on any machine, with memory bounded for million-token caches."""

from backends.cpu import attention, cache, comm, compress, hyper, indexer, linear, moe, moe_layer, norm, quant, rope, sample
from backends.cpu.probe import DEVICE, memory_available, probe

__all__ = [
    "DEVICE",
    "attention",
    "cache",
    "comm",
    "compress",
    "hyper",
    "indexer",
    "linear",
    "memory_available",
    "moe",
    "moe_layer",
    "norm",
    "probe",
]
__all__ += ["quant", "rope", "sample"]
