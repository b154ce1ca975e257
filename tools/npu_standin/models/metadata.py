"""The metadata tensors of the attention and indexer ops, int32 [1024].

What is in a real one is the vendor's secret; what is documented is that its arguments must equal those of the main call. So
a model writes the arguments' checksums there, and the model of the main op compares.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin.models import require, require_dtype, require_shape, undefined

SIZE = 1024


def _checksum(value: Any) -> int:
    plain = value.tolist() if isinstance(value, Tensor) else value
    return zlib.crc32(repr(plain).encode()) - 2**31


def written(facts: Mapping[str, Any]) -> Tensor:
    """Metadata for a call with these arguments."""
    result = undefined((SIZE,), torch.int32)
    result[: len(facts)] = torch.tensor([_checksum(v) for v in facts.values()], dtype=torch.int32)
    return result


def compare(op: str, metadata: Tensor | None, facts: Mapping[str, Any]) -> None:
    """Refuse a call without metadata, or with metadata made for other arguments (naming them)."""
    require(metadata is not None, op, "no metadata", f"metadata int32 [{SIZE}] of {op}_metadata with the arguments of this call")
    assert metadata is not None
    require_dtype(op, "metadata", metadata, torch.int32)
    require_shape(op, "metadata", metadata, SIZE)
    found = metadata[: len(facts)].tolist()
    wrong = [f"{name} = {_plain(v)}" for (name, v), f in zip(facts.items(), found, strict=True) if f != _checksum(v)]
    require(not wrong, op, f"metadata of another call: here {', '.join(wrong)}", "metadata made with equal arguments")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
