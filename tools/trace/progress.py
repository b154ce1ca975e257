"""A counter on stderr for loops over recorded calls, where nothing but torch and safetensors may be installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_DELAY, _PAUSE = 2.0, 0.2


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, and on a terminal how many are done, once two seconds have passed."""
    began = last = time.monotonic()
    shown = False
    for i, item in enumerate(items):
        now = time.monotonic()
        if sys.stderr.isatty() and now - began > _DELAY and now - last > _PAUSE:
            print(f"\r{what}: {i} of {total}", end="", file=sys.stderr, flush=True)
            last, shown = now, True
        yield item
    if shown:
        print(f"\r{what}: {total} of {total}", file=sys.stderr)
