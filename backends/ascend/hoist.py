"""Copies that are made once and used by every layer of a step: host metadata on the device, tables in the vendor's layout.

A model calls an op once per layer with the same tables and lengths. Making the device copy for each call would cost a transfer per
layer, so it is kept for as long as what it was made from is the same.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_KEPT = 64


class ByValue:
    """Results of a function of small host tensors, found again by content: a copy is compared, so a change in place is seen.

    Tensors that lie on a device are never compared (that would wait for the device): for them the function is called each time.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._found: OrderedDict[tuple[object, ...], tuple[tuple[Tensor, ...], object]] = OrderedDict()

    def __call__(self, key: tuple[object, ...], tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """make() for these tensors and this key (which must name everything else that the result depends on)."""
        if any(t.device.type != "cpu" for t in tensors):
            return make()
        full = (*key, *(t.shape for t in tensors), *(t.dtype for t in tensors))
        known = self._found.get(full)
        if known is not None and all(map(torch.equal, known[0], tensors)):
            return known[1]  # type: ignore[return-value]
        made = make()
        self._found[full] = (tuple(t.clone() for t in tensors), made)
        self._found.move_to_end(full)
        if len(self._found) > self._kept:
            self._found.popitem(last=False)
        return made


class ByIdentity:
    """Results of a function of one tensor, kept while that tensor object lives and has not been written (as far as torch counts writes)."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[weakref.ref[Tensor], int, object]] = {}

    def __call__(self, tensor: Tensor, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """make() for this tensor and this key; the tensor must not be changed under torch.inference_mode, which counts no writes."""
        full = (id(tensor), *key)
        version = 0 if tensor.is_inference() else tensor._version
        known = self._found.get(full)
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]  # type: ignore[return-value]
        made = make()

        def forget(_: object, full: tuple[object, ...] = full) -> None:
            self._found.pop(full, None)

        self._found[full] = (weakref.ref(tensor, forget), version, made)
        return made


_HOST = ByValue()


def on_device(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, copied once for all calls that pass equal content; a tensor that is there already as it is."""
    if tensor.device == device:
        return tensor
    return _HOST((name, device), (tensor,), lambda: tensor.to(device, non_blocking=True))
