"""Names of the backends. Each is imported only when a binding asks for it."""

NAMES = ("cpu", "cpu_invariant", "cpu_native", "cuda", "cuda_triton")
IN_FRONT = {"cpu": "cpu_native", "cuda": "cuda_triton"}
"""Backend -> the one that takes part of its calls, faster; both are one choice to the user."""
