"""Lengths of a ragged batch as the vendor's ops want them: int32 tensors on the device, made once per step, and host numbers.

The contracts give cu_seqlens [B + 1] and start_pos [B] on the host. Every tensor here is int32 on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from backends.ascend.hoist import ByValue

_made = ByValue()
_tables = ByValue()


@dataclass(frozen=True)
class Lengths:
    """One call's batch: `cu` int32 [B + 1] and `first` int32 [B] as the contract has them, and the device of its tensors."""

    cu: Tensor
    first: Tensor
    device: torch.device

    @cached_property
    def _host(self) -> tuple[list[int], list[int]]:
        return self.cu.tolist(), self.first.tolist()

    def _on_device(self, name: str, make: Tensor) -> Tensor:
        return _made((name, self.device), (make,), lambda: make.to(self.device))

    @property
    def batch(self) -> int:
        """B."""
        return self.first.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens of the call."""
        return self._host[0][-1]

    @property
    def ends_host(self) -> list[int]:
        """Per sequence its length after the call; what a sequence without tokens in the call has stored counts too."""
        cu, first = self._host
        return [s + e - b for s, b, e in zip(first, cu, cu[1:], strict=False)]

    @property
    def longest(self) -> int:
        """Most tokens that one sequence has in the call."""
        cu, _ = self._host
        return max((e - b for b, e in zip(cu, cu[1:], strict=False)), default=0)

    def completed(self, ratio: int) -> int:
        """Entries that the call completes."""
        return sum(end // ratio - s // ratio for s, end in zip(self._host[1], self.ends_host, strict=True))

    @property
    def cu_seqlens(self) -> Tensor:
        """Offsets [B + 1]."""
        return self._on_device("cu", self.cu)

    @property
    def start(self) -> Tensor:
        """Position of each sequence's first token [B]."""
        return self._on_device("start", self.first)

    @property
    def counts(self) -> Tensor:
        """Tokens of each sequence [B]."""
        return self._on_device("counts", self.cu.diff())

    @property
    def ends(self) -> Tensor:
        """Uncompressed length of each sequence after the call [B]."""
        return self._on_device("ends", self.first + self.cu.diff())

    def compressed(self, ratio: int) -> Tensor:
        """Entries of each sequence after the call [B]."""
        return self._on_device("compressed", (self.first + self.cu.diff()).div(ratio, rounding_mode="floor"))

    def residual(self, ratio: int) -> Tensor:
        """Tokens of each sequence that belong to no entry yet [B]."""
        return self._on_device("residual", (self.first + self.cu.diff()).remainder(ratio))

    def there(self, name: str, table: Tensor) -> Tensor:
        """A block table on the device."""
        return _tables((name, self.device), (table,), lambda: table.to(self.device, torch.int32).contiguous())
