"""These tests run Triton's kernels under its interpreter on a CPU, or on the device where there is one.

Without Triton they are left out, which the header says; `make test-cuda-cpu` has an environment with it.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

PRESENT = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if PRESENT else ["test_*.py"]

if PRESENT and not torch.cuda.is_available():
    # Triton decides when it is imported whether functions are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
    from backends.cuda_triton import interpreter

    interpreter.repair()


KNOWN = (
    "ignore:Conversion of an array with ndim > 0 to a scalar is deprecated:DeprecationWarning:triton.runtime.interpreter",
)
"""Warnings of Triton's interpreter at every value that a kernel uses as an index, tens of thousands in a run; the numpy that refuses it is ruled
out by constraints-cuda.txt."""


def pytest_configure(config: pytest.Config) -> None:
    """What is known is not shown; any other warning is."""
    for line in KNOWN:
        config.addinivalue_line("filterwarnings", line)


def pytest_report_header() -> str:
    how = "on the device" if torch.cuda.is_available() else "under Triton's interpreter"
    return f"tests/cuda: {how}" if PRESENT else "tests/cuda: left out, Triton is not installed (make test-cuda-cpu)"
