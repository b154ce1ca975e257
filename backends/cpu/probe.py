"""What this CPU offers; nothing here depends on the model."""

from __future__ import annotations

import torch

from ops.probe import Probe

DEVICE = torch.device("cpu")


def probe() -> Probe:
    """Probe of the CPU: no SoC, torch's version, the vector instruction set in use."""
    return Probe(
        device="cpu",
        versions={"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()},
        have=frozenset({"mkldnn"} if torch.backends.mkldnn.is_available() else ()),
    )


def memory_available() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        return None
    return None
