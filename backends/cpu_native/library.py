"""The compiled kernels as Python functions. Argument types follow csrc/: p pointer, l long, f float, i int."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from backends.cpu_native.build import library_path

FEW = 4
"""Tokens per call up to which these kernels are used: one reading of the weights serves them all."""

NEED = "compiled kernels (build them: python -m backends.cpu_native)"

_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}
_SIGNATURES = {
    "v4_linear": ("ppplllli", None),
    "v4_moe": ("pppppplllllfi", "i"),
    "v4_swiglu": ("pppllf", None),
    "v4_gate_topk": ("pppppllllf", None),
    "v4_gate_hash": ("pppppp" + "lllllf", "i"),
    "v4_hc_pre": ("ppppppp" + "lll" + "ffli", None),
    "v4_hc_head": ("ppppp" + "lll" + "ffi", None),
    "v4_hc_post": ("ppppp" + "lll", None),
    "v4_rms_norm": ("ppp" + "llf", None),
    "v4_rope": ("pppp" + "llllfif", None),
    "v4_insert": ("ppplll", "i"),
    "v4_attention": ("p" * 10 + "l" * 12 + "fi", "i"),
    "v4_index_scores": ("ppppp" + "lllllli", "i"),
    "v4_best": ("ppll", None),
    "v4_compress": ("p" * 12 + "l" * 10 + "fi", "i"),
}


def available() -> bool:
    """Whether the library for this machine has been built."""
    return library_path().is_file()


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


@functools.cache
def kernel(name: str) -> Any:
    """The C function with its types set. OSError when the library is not there."""
    fn = getattr(_library(), name)
    arguments, result = _SIGNATURES[name]
    fn.argtypes = [_TYPES[letter] for letter in arguments]
    fn.restype = _TYPES[result] if result else None
    return fn


def threads() -> int:
    """Threads that torch uses, which these kernels use too (they share its OpenMP)."""
    return torch.get_num_threads()
