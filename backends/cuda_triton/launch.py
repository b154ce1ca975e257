"""What adapters share: kernels imported on first use, and sizes of launches."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

NEED = "triton"
SOC = ("sm90",)
"""Chips for which the kernels have been compiled and measured."""

FLOATS = (torch.bfloat16, torch.float32)


@functools.cache
def kernels(family: str) -> ModuleType:
    """The module of kernels of a family. ImportError without Triton, which `needs` rules out when a model is bound."""
    return importlib.import_module(f"backends.cuda_triton.kernels.{family}")


def blocks(size: int, block: int) -> int:
    """Blocks of `block` that cover `size`."""
    return -(-size // block)


def power(size: int, least: int = 1) -> int:
    """The smallest power of two that is not below `size` or `least`."""
    return max(1 << max(size - 1, 0).bit_length(), least)


def warps(elements: int, most: int = 8) -> int:
    """Warps for a program of `elements`, 16 elements a thread, a power of two up to `most`."""
    return min(power(blocks(elements, 32 * 16)), most)
