"""These tests run Triton's kernels under its interpreter on a CPU, or on the device where there is one. They need Triton."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported whether functions are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

if not torch.cuda.is_available():
    from backends.cuda_triton import interpreter

    interpreter.repair()
