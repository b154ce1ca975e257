"""Reading the arguments of an aclnn call: descriptors of libopapi (csrc/opapi.c) as tensors over the same bytes, lists and numbers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p

KINDS = {
    0: "none",
    1: "tensor",
    2: "tensor list",
    3: "scalar",
    4: "scalar list",
    5: "int array",
    6: "bool array",
    7: "float array",
}
LETTER_OF_KIND = {1: "t", 2: "T", 3: "S", 5: "I", 6: "B", 7: "F"}

# numbers of aclDataType; hif8 (34), the e8m0 and fp4 types travel as bytes where torch has no type or no kernels for it
DTYPES = {
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16, 9: torch.int64, 11: torch.float64,
    12: torch.bool, 27: torch.bfloat16, 34: torch.uint8, 35: torch.float8_e5m2, 36: torch.float8_e4m3fn, 37: torch.uint8, 40: torch.uint8,
    41: torch.uint8,
}  # fmt: skip
PACKED_FP4 = (40, 41)
BYTE_TYPES = (34, 37, 40, 41)
_TYPE = "_acl_type"


class _Head(ctypes.Structure):
    _fields_ = [("kind", _i64), ("before", _pointer), ("after", _pointer)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("head", _Head), ("dims", _i64), ("size", _i64 * 16), ("stride", _i64 * 16), ("dtype", _i64), ("offset", _i64), ("format", _i64),
        ("storage_dims", _i64), ("storage", _i64 * 16), ("data", _pointer),
    ]  # fmt: skip


class _Array(ctypes.Structure):
    _fields_ = [("head", _Head), ("n", _i64), ("items", _pointer)]


class _Scalar(ctypes.Structure):
    _fields_ = [("head", _Head), ("dtype", _i64), ("value", ctypes.c_uint8 * 16)]


class WrongLetter(TypeError):
    """An argument is not what the bridge's argument list says."""


def tensor_at(address: int) -> Tensor:
    """The tensor that a descriptor describes, over the same bytes. fp4 is described in elements and read as bytes of two."""
    result = _tensor_at(address)
    setattr(result, _TYPE, ctypes.cast(address, ctypes.POINTER(_Tensor)).contents.dtype)
    return result


def acl_type(tensor: Tensor) -> int:
    """The aclDataType with which a tensor of an aclnn call was described."""
    return int(getattr(tensor, _TYPE))


def _tensor_at(address: int) -> Tensor:
    t = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
    if t.dtype not in DTYPES:
        raise WrongLetter(f"tensor of aclDataType {t.dtype}, which the stand-in does not know")
    dtype, size, stride, offset = DTYPES[t.dtype], list(t.size[: t.dims]), list(t.stride[: t.dims]), t.offset
    if t.dtype in PACKED_FP4:
        size, stride, offset = _bytes_of_pairs(size, stride, offset)
    if 0 in size:
        return torch.empty(size, dtype=dtype)
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + offset
    held = (ctypes.c_char * (count * dtype.itemsize)).from_address(t.data)
    return torch.frombuffer(held, dtype=torch.uint8).view(dtype).as_strided(size, stride, offset)


def _bytes_of_pairs(size: list[int], stride: list[int], offset: int) -> tuple[list[int], list[int], int]:
    inner = max((i for i, (n, step) in enumerate(zip(size, stride, strict=True)) if step == 1 and n > 1), default=len(size) - 1)
    return (
        [n // 2 if i == inner else n for i, n in enumerate(size)],
        [step if i == inner else step // 2 for i, step in enumerate(stride)],
        offset // 2,
    )


def _array(address: int) -> _Array:
    return ctypes.cast(address, ctypes.POINTER(_Array)).contents


def _items(address: int, kind: Any) -> list[Any]:
    a = _array(address)
    return list(ctypes.cast(a.items, ctypes.POINTER(kind))[: a.n])


def _scalar_at(address: int) -> Any:
    s = ctypes.cast(address, ctypes.POINTER(_Scalar)).contents
    dtype = DTYPES[s.dtype]
    return torch.frombuffer(bytearray(s.value[: dtype.itemsize]), dtype=dtype)[0].item()


def _signed32(value: int) -> int:
    return int(ctypes.c_int32(value & 0xFFFFFFFF).value)


READERS: dict[str, tuple[int, Callable[[int], Any]]] = {
    "t": (1, tensor_at),
    "T": (2, lambda p: [tensor_at(q) for q in _items(p, _pointer)]),
    "S": (3, _scalar_at),
    "I": (5, lambda p: _items(p, _i64)),
    "B": (6, lambda p: [bool(v) for v in _items(p, ctypes.c_uint8)]),
    "F": (7, lambda p: _items(p, ctypes.c_float)),
    "i": (0, lambda v: v),
    "w": (0, _signed32),
    "b": (0, lambda v: bool(v & 0xFF)),
    "s": (0, lambda v: ctypes.string_at(v).decode() if v else None),
}
"""Argument letter -> (kind of descriptor, 0 for plain values; how to read it). Beside these: "d" double, "f" float."""


def real(letter: str, value: float) -> float:
    """A vector register as double ("d") or float ("f")."""
    return value if letter == "d" else float(struct.unpack("f", struct.pack("d", value)[:4])[0])
