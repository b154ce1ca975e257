"""The compiled kernels as a Python module: every function takes (look, the op's arguments in order), see csrc/binding.cpp."""

from __future__ import annotations

import functools
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType

from backends.cpu_native.build import library_path

FEW = 4
"""Tokens per call up to which these kernels are used: one reading of the weights serves them all."""

NEED = "compiled kernels (build them: python -m backends.cpu_native)"


def available() -> bool:
    """Whether the library for this machine, Python and torch has been built."""
    return library_path().is_file()


@functools.cache
def native() -> ModuleType:
    """The module. ImportError when the library is not there."""
    loader = ExtensionFileLoader("v4_cpu_native", str(library_path()))
    spec = spec_from_loader("v4_cpu_native", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return sys.modules.setdefault("v4_cpu_native", module)
