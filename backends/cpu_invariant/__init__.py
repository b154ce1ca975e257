"""The CPU backend in batch-invariant form: what a token gets is bitwise independent of what else is in flight.

Matrix libraries choose kernels and summation orders by the number of rows, so a row's last bits change with the batch. Here every
op that adds anything up runs the cpu backend on one token at a time, on fresh, contiguous copies of that token's rows and of the
cache blocks it sees. Its result is then a function of the token's own inputs and position alone: not of the number of tokens,
sequences or chunks, nor of places in the batch, slots or physical blocks. Ops that only copy, and ops whose every bit the
contract defines, are those of the cpu backend.

Guaranteed for equal machines, torch versions and numbers of threads; across those, the ops' error bounds hold as for any backend.
Slower than the cpu backend by about the number of tokens per call in matrix products; a single token pays for the copies only.
"""

from backends import cpu
from backends.cpu.probe import DEVICE, probe
from backends.cpu_invariant import compress, paged, rows

__all__ = ["DEVICE", "compress", "cpu", "paged", "probe", "rows"]
