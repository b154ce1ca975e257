"""Models of vendor ops: what the documents say an op does, traps included, in plain torch on CPU tensors.

One function per op of a schema, named `namespace::op` (`namespace::op.overload` for a named overload), with the
parameters of that schema. A model is written from the vendor's documents alone and knows nothing of the adapters that
call it. Outside the documented limits it raises Refused; memory that an op leaves undefined is poisoned.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MODELS: dict[str, Callable[..., Any]] = {}
"""Models by op name. Filled by `load()`; keys are `namespace::op`."""

SOCS = ("910b", "910_93", "950")
"""Chip families: A2, A3 and 950."""
OLDER = ("910b", "910_93")
"""Chips without fp8, fp4 and hif8: A2 and A3."""

POISON = 0xCD
_soc = "910_93"


class Refused(RuntimeError):
    """A call outside what the op's documents allow. The message says what was found and what is documented."""


def model(name: str, *, socs: tuple[str, ...] = SOCS) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the model of op `name` on chips `socs`; Refused on another chip. ValueError for a second model."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        if name in MODELS:
            raise ValueError(f"op {name} has two models")

        def call(*args: Any, **kwargs: Any) -> Any:
            if _soc not in socs:
                raise Refused(f"{name}: has no kernel for SoC {_soc}; documented for {', '.join(socs)}")
            return fn(*args, **kwargs)

        call.__name__, call.__doc__, call.__wrapped__ = fn.__name__, fn.__doc__, fn  # type: ignore[attr-defined]
        MODELS[name] = call
        return fn

    return add


def load() -> dict[str, Callable[..., Any]]:
    """Import every module of this package and return MODELS."""
    for found in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{found.name}")
    return MODELS


def soc() -> str:
    """The chip family that the models imitate: 910b, 910_93 or 950."""
    return _soc


def set_soc(name: str) -> None:
    """Imitate chip family `name` from now on. ValueError lists the known ones."""
    global _soc
    if name not in SOCS:
        raise ValueError(f"unknown SoC {name!r}; known: {', '.join(SOCS)}")
    _soc = name


def poison(tensor: Tensor) -> Tensor:
    """Fill a tensor (or a view of one) with the byte 0xCD, in place, and return it: memory an op has not written."""
    if tensor.numel():
        bits = torch.full((tensor.element_size(),), POISON, dtype=torch.uint8)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        tensor.copy_(bits.view(tensor.dtype).reshape(()).expand(tensor.shape))
    return tensor


def undefined(shape: tuple[int, ...] | list[int] | torch.Size, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of poison: what an output holds before the op writes it."""
    return poison(torch.empty(tuple(shape), dtype=dtype))


def require(condition: bool, op: str, found: object, documented: str) -> None:
    """Raise Refused unless `condition` holds."""
    if not condition:
        raise Refused(f"{op}: found {found}; documented: {documented}")


def require_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise Refused unless `tensor` has one of `dtypes`."""
    require(tensor.dtype in dtypes, op, f"{name} {tensor.dtype}", f"{name} " + " or ".join(str(d) for d in dtypes))


def require_shape(op: str, name: str, tensor: Tensor, *shape: int | None) -> None:
    """Raise Refused unless `tensor` has the shape; None matches any size."""
    fits = tensor.dim() == len(shape) and all(
        want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
    )
    wanted = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
    require(fits, op, f"{name} {list(tensor.shape)}", f"{name} {wanted}")


def needed(op: str, name: str, value: T | None) -> T:
    """`value`, or Refused when it is None: the op documents the argument as required."""
    require(value is not None, op, f"{name} None", f"{name} given")
    assert value is not None
    return value
