"""What a machine can do, as data: a real probe looks, a made-up one binds a backend for chips that are absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Probe:
    """Facts that decide at binding time.

    `soc`: chip family, for instance "910b", "910_93", "950", "sm90"; None on a plain CPU. `have`: names known to be
    present (torch ops as "npu::npu_rms_norm", libraries as "triton"). `ask`: consulted for names not in `have`.
    `versions`: library versions for reports. `hint`: what to install for names that are missing.
    """

    device: str = "cpu"
    soc: str | None = None
    have: frozenset[str] = frozenset()
    versions: dict[str, str] = field(default_factory=dict)
    ask: Callable[[str], bool] | None = None
    hint: Callable[[Sequence[str]], str] | None = None

    def has(self, name: str) -> bool:
        """True when `name` is present on the probed machine."""
        return name in self.have or (self.ask is not None and self.ask(name))
