"""torch's own ops on the host-memory NPU: led to the CPU kernels, over the same bytes.

What a real device would refuse is refused here too: a CPU tensor among device tensors. What would make the host wait is counted: values that
leave the device and ops whose result's shape depends on values.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.npu_standin import calls

DEVICE = "npu"
# memory, views and copies stay torch_npu's own
NATIVE = frozenset(
    """
    empty empty_strided empty_like empty_permuted new_empty new_empty_strided _copy_from _copy_from_and_resize resize_ set_ as_strided view
    _reshape_alias is_pinned _pin_memory record_stream _local_scalar_dense is_set_to unfold alias view_as_real view_as_complex to detach
    linear_backward _has_compatible_shallow_copy_type
    """.split()  # noqa: SIM905
)
# shapes of their results depend on values, so the host has to look
DATA_DEPENDENT = frozenset(
    """
    nonzero nonzero_static masked_select _unique2 unique_dim unique_consecutive unique_dim_consecutive bincount equal repeat_interleave is_nonzero
    """.split()  # noqa: SIM905
)
# repeat_interleave by one number
KNOWN_LENGTH = frozenset(("self_int",))
COPIES = frozenset(("copy_", "_to_copy"))
# torch_npu moves host indices to the device by itself
INDEXED = frozenset(("index", "index_put_", "_index_put_impl_", "index_put"))


def over(t: Any) -> Any:
    """A CPU tensor over the bytes of a device tensor; anything else as it is."""
    if not isinstance(t, Tensor) or t.device.type != DEVICE:
        return t
    storage = t.untyped_storage()
    size = storage.nbytes()
    if size == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    held = (ctypes.c_char * size).from_address(storage.data_ptr())
    bytes_of = torch.frombuffer(held, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(bytes_of, t.storage_offset(), t.size(), t.stride())


def onto_device(t: Any) -> Any:
    """A device tensor with the shape, strides and values of a CPU tensor; anything else as it is."""
    if not isinstance(t, Tensor):
        return t
    result = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=DEVICE)
    if t.numel():
        over(result).copy_(t)
    return result


def mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    """`fn` applied to the tensors inside lists, tuples and dicts; the device "npu" becomes "cpu"."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(fn, v) for v in value)
    if isinstance(value, dict):
        return {k: mapped(fn, v) for k, v in value.items()}
    if isinstance(value, torch.device) and value.type == DEVICE:
        return torch.device("cpu")
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def refuse_strangers(name: str, values: Any) -> None:
    """RuntimeError for a CPU tensor (of one dimension or more) among the arguments of an op on the device, as there."""
    tensors = _tensors(values)
    if any(t.device.type == "cpu" and t.dim() for t in tensors):
        found = ", ".join(f"{t.device} {list(t.shape)}" for t in tensors)
        raise RuntimeError(f"{name}: expected all tensors on one device; found {found}")


def _strangers(name: str, tensors: list[Tensor]) -> None:
    if name in INDEXED and tensors[0].device.type == DEVICE and any(t.device.type == "cpu" and t.dim() for t in tensors):
        calls.note_wait(f"aten::{name} with host indices")
    else:
        refuse_strangers(f"aten::{name}", tensors)


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _copy_wait(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or DEVICE)
    source = args[1].device if name == "copy_" else args[0].device
    if target.type != source.type:
        calls.note_wait("copy to host" if source.type == DEVICE else "copy to device")


def _routed(op: Any) -> Callable[..., Any]:
    """The kernel of one aten op for device tensors."""
    schema = op._schema
    name = schema.name.removeprefix("aten::")
    written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    queued = os.environ.get("TASK_QUEUE_ENABLE") != "0"

    def call(*args: Any, **kwargs: Any) -> Any:
        if queued:
            import torch_npu

            torch_npu.npu.synchronize()  # models that wait in the queue must have written their bytes
        tensors = _tensors(args) + _tensors(kwargs)
        if name in COPIES:
            _copy_wait(name, args, kwargs)
        else:
            _strangers(name, tensors)
        if (name in DATA_DEPENDENT and op._overloadname not in KNOWN_LENGTH) or (
            name in INDEXED and any(t.dtype == torch.bool for t in tensors[1:])
        ):
            calls.note_wait(f"aten::{name}")
        calls.note("aten", f"aten::{name}")
        here, named = mapped(over, args), mapped(over, kwargs)
        result = op(*here, **named)
        if name == "_to_copy" and kwargs.get("device") is not None and torch.device(kwargs["device"]).type != DEVICE:
            return result
        if not written:
            return mapped(onto_device, result)
        there = [args[i] if i < len(args) else kwargs.get(n) for i, n in written]
        found = [here[i] if i < len(here) else named.get(n) for i, n in written]
        return _written_back(schema, list(zip(there, found, strict=True)))

    return call


def _written_back(schema: Any, pairs: list[tuple[Any, Any]]) -> Any:
    for target, found in pairs:
        if isinstance(target, Tensor) and (target.shape, target.stride()) != (
            found.shape,
            found.stride(),
        ):  # an out= that was resized
            target.resize_(found.shape)
            over(target).copy_(found)
    results = [target for target, _ in pairs]
    if len(results) > 1 and len(results) == len(schema.returns):
        return tuple(results)
    return results[0] if schema.returns else None


def _routable(name: str, overload: str) -> Any:
    """The op when torch_npu has a kernel of its own for it which is not a view; else None."""
    qualified = f"aten::{name}.{overload}".removesuffix(".")
    if not torch._C._dispatch_has_kernel(qualified) or not torch._C._dispatch_has_kernel_for_dispatch_key(
        qualified, "PrivateUse1"
    ):
        return None
    op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
    return None if op is None or _is_view(op) else op


def route() -> tuple[torch.library.Library, int]:
    """Replace torch_npu's kernels of aten ops. Returns the registration, which must be kept alive, and the number of ops."""
    library, count = torch.library.Library("aten", "IMPL"), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one warning per replaced kernel
        for schema in torch._C._jit_get_all_schemas():
            space, _, name = schema.name.partition("::")
            if space == "aten" and name not in NATIVE and (op := _routable(name, schema.overload_name)) is not None:
                library.impl(f"{name}.{schema.overload_name}".removesuffix("."), _routed(op), "PrivateUse1", allow_override=True)
                count += 1
    return library, count
