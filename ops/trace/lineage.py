"""Which earlier call made a tensor, and whether anything has written to it since.

Every call of a run can be right by itself and the run wrong: when kernels share memory that they should not, or one starts before
the other has ended, a result changes between the call that returned it and the call that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ops.trace.call import Link


@dataclass(frozen=True)
class _Result:
    storage: StorageWeakRef
    bytes: int
    number: int
    output: int
    checksum: int


class Lineage:
    """Remembers results by the memory they lie in, for as long as that memory is held by someone."""

    def __init__(self) -> None:
        self._results: dict[int, _Result] = {}

    def made(self, t: Tensor, number: int, output: int, checksum: int) -> None:
        """Note result `output` of call `number`."""
        if (size := t.nbytes) and t.is_contiguous():
            self._results[t.data_ptr()] = _Result(StorageWeakRef(t.untyped_storage()), size, number, output, checksum)

    def of(self, t: Tensor, checksum: int) -> Link | None:
        """The result that `t` is, or is a view of in whole; None when it is none that is known."""
        found = self._results.get(t.data_ptr())
        if found is None or not t.is_contiguous() or found.bytes != t.nbytes or found.storage.expired():
            return None
        return Link(found.number, found.output, found.checksum == checksum)

    def prune(self) -> None:
        """Forget results whose memory is gone."""
        self._results = {p: r for p, r in self._results.items() if not r.storage.expired()}
