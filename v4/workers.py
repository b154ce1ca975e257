"""Threads for work on many tensors at a time: each tensor is handled by one thread instead of every operation by all of them.

Files are read and weights unpacked in small blocks; splitting each of these operations over all cores costs more than it gains.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

COUNT = min(8, os.cpu_count() or 1)
"""Default number of threads."""


@contextmanager
def workers(count: int = COUNT) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads carry out torch operations alone; the caller's own number of threads is what it was afterwards."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        # the number set in a worker is also the one that threads made later would start with
        torch.set_num_threads(before)


def in_order(pool: ThreadPoolExecutor, call: Callable[[T], R], items: Iterable[T], ahead: int = 2 * COUNT) -> Iterator[R]:
    """Results of `call` in the order of `items`, at most `ahead` of them computed before they are taken."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(call, item))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
