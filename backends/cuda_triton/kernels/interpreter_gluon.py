"""Gluon kernels under Triton's interpreter, which does not know them: the same source, with what Gluon adds to Triton played on the CPU.

Layouts fall away. Copies into shared memory arrive when they are waited for, and their buffer holds NaN from the moment they begin; a product
begun has no value before it is waited for. So a tile read too early or overwritten too soon shows; what barriers between threads do does not.
"""

from __future__ import annotations

import types
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


class _Shared:
    """A buffer of shared memory, or several: [count,] rows, columns."""

    def __init__(self, shape: list[int], dtype: Any) -> None:
        self._parts = [_Shared(shape[1:], dtype) for _ in range(shape[0])] if len(shape) > 2 else []
        self._shape, self._dtype, self._transposed = shape, dtype, False
        if not self._parts:
            self._held = [self._nothing()]

    def _nothing(self) -> Any:
        return tl.full(tuple(self._shape), float("nan"), tl.float32).to(self._dtype)

    def index(self, part: Any) -> _Shared:
        """One of several."""
        return self._parts[int(part)]

    def permute(self, order: tuple[int, ...]) -> _Shared:
        """The same buffer, its dimensions swapped."""
        other = object.__new__(_Shared)
        other.__dict__.update(self.__dict__, _transposed=order == (1, 0))
        return other

    def spoil(self) -> None:
        """Nothing can be read until `put`."""
        self._held[0] = self._nothing()

    def put(self, value: Any) -> None:
        """A copy has arrived."""
        self._held[0] = value

    def store(self, value: Any) -> None:
        """Written by the program itself."""
        self.put(value)

    def value(self) -> Any:
        """What it holds."""
        return tl.trans(self._held[0]) if self._transposed else self._held[0]


class _Copies:
    """Copies begun: those of the group that is open, and groups that were closed and not waited for."""

    def __init__(self) -> None:
        self._open: list[tuple[_Shared, Any]] = []
        self._closed: list[list[tuple[_Shared, Any]]] = []

    def async_copy_global_to_shared(self, smem: _Shared, pointer: Any) -> None:
        """Begin one."""
        smem.spoil()
        self._open.append((smem, tl.load(pointer)))

    def commit_group(self) -> None:
        """Close the group."""
        self._closed.append(self._open)
        self._open = []

    def wait_group(self, num_outstanding: int) -> None:
        """All groups but the last few have arrived."""
        done = len(self._closed) - num_outstanding
        for smem, value in (copy for group in self._closed[: max(done, 0)] for copy in group):
            smem.put(value)
        self._closed = self._closed[max(done, 0) :]


class _Begun:
    """A product that was not waited for."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _product(a: Any, b: _Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    left = a.value() if isinstance(a, _Shared) else a
    found = tl.dot(left, b.value(), acc if use_acc else None)
    return _Begun(found) if is_async else found


def _wait(num_outstanding: int, deps: list[_Begun]) -> Any:
    found = tuple(d.value for d in deps)
    return found[0] if len(found) == 1 else found


def _no_layout(*parts: Any) -> None:
    return None


def _language() -> types.SimpleNamespace:
    # looked up when it is called: the interpreter replaces Triton's functions while a kernel runs
    def same(name: str, takes: int) -> Any:
        return lambda *args, **kwargs: getattr(tl, name)(*args[:takes], **kwargs)

    return types.SimpleNamespace(
        constexpr=tl.constexpr, tensor=tl.tensor, shared_memory_descriptor=_Shared, bfloat16=tl.bfloat16, float32=tl.float32, int32=tl.int32,
        int64=tl.int64, program_id=same("program_id", 1), arange=same("arange", 2), load=same("load", 1), store=same("store", 2),
        where=same("where", 3), maximum=same("maximum", 2), max=same("max", 1), sum=same("sum", 1), exp2=same("exp2", 1), cdiv=same("cdiv", 2),
        static_range=range,
        full=lambda shape, value, dtype, layout: tl.full(tuple(shape), value, dtype),
        zeros=lambda shape, dtype, layout: tl.zeros(tuple(shape), dtype), convert_layout=lambda value, layout: value,
        allocate_shared_memory=lambda dtype, shape, layout: _Shared(list(shape), dtype), thread_barrier=lambda: None, SliceLayout=_no_layout,
        BlockedLayout=_no_layout, NVMMADistributedLayout=_no_layout, NVMMASharedLayout=_no_layout, DotOperandLayout=_no_layout,
    )  # fmt: skip


def adapt(module: types.ModuleType) -> None:
    """Replace the Gluon functions of a module by interpreted ones. Calling it again changes nothing."""
    names = {
        "gl": _language(), "tl": tl, "async_copy": _Copies(), "fence_async_shared": lambda: None, "warpgroup_mma": _product,
        "warpgroup_mma_wait": _wait,
    }  # fmt: skip
    spoken = {**vars(module), **names}
    for name, fn in list(vars(module).items()):
        if isinstance(fn, triton.runtime.jit.JITFunction):
            spoken[name] = InterpretedFunction(types.FunctionType(fn.fn.__code__, spoken, name, fn.fn.__defaults__))
            # by name, and only as "constexpr", does the interpreter know what is constant
            known = spoken[name].rewrite().__annotations__
            known.update({k: "constexpr" for k, v in known.items() if str(v).endswith("constexpr")})
            setattr(module, name, spoken[name])
