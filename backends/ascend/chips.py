"""Chip families, by the names that CANN's build uses.

910b: Atlas A2 (Ascend910B1 to B4). 910_93: Atlas A3 (Ascend910_93xx). 950: Ascend 950PR and 950DT.
"""

from __future__ import annotations

SOCS = ("910b", "910_93", "950")
ALIASES = {"a2": "910b", "a3": "910_93", "a5": "950"}
WITHOUT_FP8 = ("910b", "910_93")
"""Families whose cores have no FP8, FP4 or HiF8 arithmetic."""

_PREFIX = {"Ascend910B": "910b", "Ascend910_93": "910_93", "Ascend950": "950"}


def family(device_name: str) -> str:
    """Family of a device as the runtime names it, for instance "Ascend910_9391". ValueError for a chip this backend does not know."""
    for prefix, soc in _PREFIX.items():
        if device_name.startswith(prefix):
            return soc
    known = ", ".join(f"{p}*" for p in _PREFIX)
    raise ValueError(f"the device calls itself {device_name!r}; this backend knows {known}")
