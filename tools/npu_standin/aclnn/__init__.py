"""Bridges from aclnn entry points, below torch_npu's host code, to the models of the ops that call them.

The argument lists are those that the wheel passes; the host refuses a list that does not fit.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin.descriptors import BYTE_TYPES, PACKED_FP4, acl_type
from tools.npu_standin.models import MODELS

ACL_CODES = 256
"""What torch_npu adds to an aclDataType where it takes one as an integer."""


def load() -> None:
    """Import every module of this package, which registers its bridges."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")


def model(name: str) -> Callable[..., Any]:
    """The model of an op. NotImplementedError when there is none."""
    if name not in MODELS:
        raise NotImplementedError(f"{name} has no model; models stand in tools/npu_standin/models")
    return MODELS[name]


def code(tensor: Tensor) -> int | torch.dtype:
    """The type of a tensor as an argument of torch_npu names it: a number for those that travel as bytes."""
    kind = acl_type(tensor)
    return ACL_CODES + kind if kind in BYTE_TYPES else tensor.dtype


def fp4_code(tensor: Tensor) -> int | None:
    """The number for a tensor that travels as bytes of two fp4 values, None for any other."""
    return ACL_CODES + acl_type(tensor) if acl_type(tensor) in PACKED_FP4 else None


def put(results: Any, *outputs: Tensor | None) -> None:
    """Write a model's results into the output tensors of an aclnn call. A shape or type that differs is a ValueError: model and host disagree."""
    found: Sequence[Any] = results if isinstance(results, (list, tuple)) else (results,)
    if len(found) < len(outputs):
        raise ValueError(f"the model returns {len(found)} results, the kernel has {len(outputs)} outputs")
    for number, (result, output) in enumerate(zip(found, outputs, strict=False)):
        if output is None or result is None:
            continue
        same_bytes = result.element_size() == output.element_size() == 1
        if result.shape != output.shape or not (result.dtype == output.dtype or same_bytes):
            raise ValueError(
                f"output {number}: the model gives {result.dtype} {list(result.shape)}, the host allocated {output.dtype} {list(output.shape)}"
            )
        output.copy_(result.view(output.dtype) if same_bytes else result)
