"""A graph without a GPU: what a step does is noted op by op and launch by launch, and replayed on the same tensors.

Python runs no more in a replay, as with a CUDA graph: a value that it read when the step was recorded stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from backends.cuda.graphs import Function
from ops.host_reads import HostReads, NotRecordable

SILENT = ("tolist", "numpy", "__array__", "item", "__bool__", "__int__", "__index__", "__float__", "tensor", "as_tensor", "from_numpy")
"""Functions of torch that read values or make tensors of them, and do not all pass through the dispatcher."""


class _Silent(TorchFunctionMode):
    """Notes calls of SILENT."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in SILENT:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(seen: Callable[[Any, tuple[Any, ...], dict[str, Any]], None], *, run: bool) -> Iterator[None]:
    """Inside, every launch of an interpreted kernel is told to `seen`; `run`: whether it runs as well."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            seen(self, args, kwargs)
            return plain(self, *args, **kwargs) if run else None

    InterpretedFunction.run = noted
    try:
        yield
    finally:
        InterpretedFunction.run = plain


def _storages(values: Any) -> set[int]:
    if isinstance(values, Tensor):
        return {values.untyped_storage()._cdata}
    if isinstance(values, (list, tuple)):
        return set().union(*map(_storages, values))
    return set().union(*map(_storages, values.values())) if isinstance(values, dict) else set()


class _Ops(TorchDispatchMode):
    """Notes ops; a replay runs them again and puts the values where the results of the recording are."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = _storages((args, kwargs))
        kept = [t if isinstance(t, Tensor) and not _storages(t) & given else None for t in (found if isinstance(found, (tuple, list)) else [found])]
        if func.overloadpacket.__name__.startswith("empty") or not (any(t is not None for t in kept) or func._schema.is_mutable):
            return found  # memory without values, or a view of what is there

        def again() -> None:
            new = func(*args, **kwargs)
            for old, value in zip(kept, new if isinstance(new, (tuple, list)) else [new], strict=True):
                if old is not None:
                    old.copy_(value)

        self.steps.append(again)
        return found


class Tape:
    """A capture (backends.cuda.graphs.Capture) on host tensors. `watch`: whether work that needs the host is refused.

    `launched`: kernels of the last recording.
    """

    def __init__(self, *, watch: bool = True) -> None:
        self.watch = watch
        self.launched = 0

    def __call__(self, function: Function, buffers: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        if self.watch:
            function(buffers)
            with launches(lambda *call: None, run=True), _Silent() as silent, HostReads() as reads:
                function(buffers)
            if reads.places or silent.found:
                raise NotRecordable([*reads.places, *silent.found])
        tape = _Ops()

        def launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.launched += 1
            tape.steps.append(lambda: kernel.run(*args, **kwargs))

        self.launched = 0
        with launches(launch, run=True), tape:
            result = function(buffers)

        def replay() -> Tensor:
            for step in tape.steps:
                step()
            return result

        return replay
