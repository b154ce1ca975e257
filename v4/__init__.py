"""DeepSeek-V4: one device-agnostic model graph over op contracts.

m = v4.load("build/nano", backend="cpu", dtype=torch.float32)
m.logits([0, 5, 7])
"""

from v4.api import LoadedModel, load

__all__ = ["LoadedModel", "load"]
