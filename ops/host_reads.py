"""Where a computation makes the host wait for the device, or hands it a value of the host: what can not be replayed without the host.

A recorded step is replayed with the values in its tensors and nothing else. A value that Python read, a shape that follows from
values, and a tensor made on the host would stay what they were when the step was recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parent.parent
_OWN = tuple(str(_ROOT / package) for package in ("backends", "ops", "v4"))

READS = frozenset({
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount",
})  # fmt: skip
"""Ops of torch that read values, or whose shapes follow from values."""


class NotRecordable(ValueError):
    """A step that can not be replayed; the message lists the places that read or write host values."""

    def __init__(self, places: Sequence[str]) -> None:
        listing = "\n".join(f"  {place}" for place in dict.fromkeys(places))
        super().__init__(
            f"the step can not be recorded: the host reads or hands over values at {len(set(places))} places\n{listing}\n"
            "  These calls went to plain torch (see the table of ops); run without recording, or with shapes and types that kernels take."
        )


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _place() -> str:
    """The innermost line of this project outside this file, and its function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OWN) and name != __file__:
            return f"{Path(name).relative_to(_ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the project"


class HostReads(TorchDispatchMode):
    """Inside, `places` collects every op that reads values, has a shape that follows from them, or mixes tensors of host and device.

    On host tensors only the first two are seen, and of those not `tolist` and `numpy`, which do not pass through torch's dispatcher:
    use meta tensors (every read of one fails) or a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the op and note it if it is one of those."""
        name = func.overloadpacket.__name__
        given = list(_tensors((args, kwargs or {})))
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in _tensors(args[1:2]))
        by_count = name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor") and (kwargs or {}).get("output_size") is None
        if name in READS or by_mask or by_count:
            # before it runs: on a meta tensor it fails
            self.places.append(f"{_place()}: {name}")
            return func(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        if len({t.device.type for t in (*given, *_tensors(found))}) > 1:
            self.places.append(f"{_place()}: {name} between host and device")
        return found
