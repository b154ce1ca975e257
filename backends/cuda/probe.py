"""What the current CUDA device is."""

from __future__ import annotations

import torch

from ops.probe import Probe


def unavailable() -> str | None:
    """Why nothing can run on CUDA here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (install the CUDA build of torch)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)"
    return None


def probe() -> Probe:
    """Compute capability as the chip ("sm90") and versions; without a device a probe that has nothing.

    Where there is a device, one torch setting is switched for the process, since the contracts ask for it: sums of bf16 products are not
    split into parts that are added in bf16. Every binding probes first; `v4 doctor` on another machine leaves the setting alone.
    """
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "absent"}
    if unavailable() is not None:
        return Probe(device="cuda", versions=versions)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    major, minor = torch.cuda.get_device_capability()
    return Probe(device="cuda", soc=f"sm{major}{minor}", versions={**versions, "device": torch.cuda.get_device_name()})


def memory_available() -> int | None:
    """Free bytes on the current device."""
    free, _ = torch.cuda.mem_get_info()
    return int(free)
