"""DeepSeek-V4: one device-agnostic model graph over op contracts.

m = v4.load("build/nano", backend="cpu", dtype=torch.float32)
m.logits([0, 5, 7])
"""

import os

# torch would load every vendor extension it finds while it is imported, and a broken one would stop it; the backend of that vendor loads its own
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

from v4.api import LoadedModel, load

__all__ = ["LoadedModel", "load"]
