"""This project's own CANN ops: whether both halves are there. They are optional; nothing here builds or installs anything.

The torch half is a library that `python -m backends.ascend` compiles; the kernel half is an op package, built on a node with CANN
from csrc/op_host and csrc/op_kernel and found by torch_npu through ASCEND_CUSTOM_OPP_PATH.
"""

from __future__ import annotations

import functools

import torch

from backends.ascend.own_build import library_path

NAMESPACE = "v4_ascend"


@functools.cache
def _load() -> str | None:
    """Why the torch half is not there, or None once its ops are registered; torch_npu has been imported before."""
    library = library_path()
    if not library.is_file():
        return "the torch half is not built (python -m backends.ascend)"
    try:
        torch.ops.load_library(path=str(library))
    except OSError as error:
        return f"the torch half can not be loaded: {str(error).strip().splitlines()[0]}"
    return None


def _known(name: str) -> bool:
    return f"{NAMESPACE}::{name}" in torch._C._dispatch_get_all_op_names()


def missing(op: str) -> str | None:
    """Why an own op ("hc_head") can not be called, or None when its torch half is loaded and an op package has its kernel."""
    if not _known(op) and (why := _load()):
        return why
    installed = f"{op}_installed"
    # without the question the op was defined by whoever also answers it
    if _known(installed) and not getattr(getattr(torch.ops, NAMESPACE), installed)():
        return "no installed op package has its kernel (ASCEND_CUSTOM_OPP_PATH)"
    return None
