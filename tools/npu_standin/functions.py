"""The package cann_ops_transformer as a module: its functions that have no schema, backed by their models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tools.npu_standin import calls
from tools.npu_standin.models.cann_functions import FUNCTIONS

NAME = "cann_ops_transformer"


def _noted(name: str, model: Callable[..., Any], on_device: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.note("vendor", f"{NAME}.{name}", kwargs)
        if not on_device:
            return model(*args, **kwargs)
        from tools.npu_standin.aten import mapped, onto_device, over, refuse_strangers

        refuse_strangers(name, (args, kwargs))
        return mapped(onto_device, model(*mapped(over, args), **mapped(over, kwargs)))

    return call


def mount(level: str) -> None:
    """Make `import cann_ops_transformer` find a module whose `ops` has every modelled function."""
    package, ops = ModuleType(NAME), ModuleType(f"{NAME}.ops")
    for name, model in FUNCTIONS.items():
        setattr(ops, name, _noted(name, model, level == "l3"))
    package.ops = ops  # type: ignore[attr-defined]
    for module in (package, ops):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
