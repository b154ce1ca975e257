"""Names of the backends. Each is imported only when a binding asks for it."""

import os

# torch would load every vendor extension it finds while it is imported, and a broken one would stop it; the backend of that vendor loads its own
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

NAMES = ("cpu", "cpu_invariant", "cpu_native", "cuda", "cuda_triton", "ascend")
IN_FRONT = {"cpu": "cpu_native", "cuda": "cuda_triton"}
"""Backend -> the one that takes part of its calls, faster; both are one choice to the user."""
