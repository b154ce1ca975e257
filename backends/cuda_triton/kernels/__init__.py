"""Triton kernels, one file per family. They import Triton, so the adapters import them by name on first use."""
