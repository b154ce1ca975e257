"""The host-memory NPU: stand-in libraries loaded, and every aclnn call of torch_npu's host code led to the model of its op.

Strict: a call without a bridge fails, and so does a call whose arguments are not what the bridge says. What went wrong stands in the
RuntimeError that torch_npu raises.
"""

from __future__ import annotations

import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.npu_standin import calls
from tools.npu_standin.chips import Chip
from tools.npu_standin.descriptors import KINDS, LETTER_OF_KIND, READERS, WrongLetter, real
from tools.npu_standin.wheel import StandInError

OK, REFUSED = 0, 561000
INT_REGISTERS, MAX_ARGUMENTS = 6, 46
# the last two arguments of a first phase are out parameters on the caller's stack, beside each other
NEAR, STACK = 4096, 1 << 30
WAITS = ("stream synchronised", "device synchronised", "event synchronised", "copy to host", "copy to device")

_i64 = ctypes.c_int64
_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_i64), ctypes.POINTER(ctypes.c_double), ctypes.POINTER(_i64)
)


@dataclass(frozen=True)
class Bridge:
    """How one aclnn entry point is answered: names and letters of its arguments, outputs included, and the function that gets them."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    fn: Callable[..., None]


BRIDGES: dict[str, Bridge] = {}
_libraries: dict[str, ctypes.CDLL] = {}
_loaded_as: list[Chip] = []
last_error: list[BaseException] = []
"""The exception behind the most recent refusal (at most one)."""


def bridge(name: str, arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the answer to an aclnn entry point. `arguments`: "x:t gamma:t epsilon:d y:t", letters as in descriptors.READERS.

    ValueError for a second one of that name and for an unknown letter.
    """
    pairs = tuple((item.partition(":")[0], item.partition(":")[2]) for item in arguments.split())

    def add(fn: Callable[..., None]) -> Callable[..., None]:
        if name in BRIDGES:
            raise ValueError(f"{name} has two bridges")
        if unknown := [letter for _, letter in pairs if letter not in READERS and letter not in ("d", "f")]:
            raise ValueError(f"{name}: unknown letters {unknown}")
        BRIDGES[name] = Bridge(name, pairs, fn)
        return fn

    return add


class _Raw:
    """The arguments of one call as they lie in registers and on the stack."""

    def __init__(self, ints: Any, reals: Any, stack: Any) -> None:
        self.reals = list(reals[:8])
        self.ints = [*ints[:INT_REGISTERS], *stack[: MAX_ARGUMENTS - INT_REGISTERS]]
        self._stack = ctypes.addressof(stack.contents)

    def is_end(self, position: int) -> bool:
        """Whether the two out parameters of the first phase stand here."""
        a, b = self.ints[position : position + 2]
        return a != b and abs(a - b) < NEAR and 0 <= a - self._stack < STACK

    def end(self) -> int:
        """Number of integer arguments in front of the out parameters."""
        return next((i for i in range(MAX_ARGUMENTS - 1) if self.is_end(i)), -1)

    def kind(self, position: int) -> int:
        """Kind of the descriptor that an argument points at, 0 for anything else."""
        return int(_libraries["libopapi.so"].standin_kind(ctypes.c_void_p(self.ints[position] & (1 << 64) - 1)))


def _described(raw: _Raw) -> str:
    end = raw.end()
    found = [LETTER_OF_KIND.get(raw.kind(i)) or f"{raw.ints[i] & 0xFFFFFFFF:#x}" for i in range(max(end, 0))]
    return f"integer registers and stack hold {' '.join(found)}; vector registers {raw.reals[:4]}"


def _read(bridge: Bridge, raw: _Raw) -> dict[str, Any]:
    """Argument name -> value. WrongLetter when the argument list does not fit what was passed."""
    whole, floating = 0, 0
    values: dict[str, Any] = {}
    for name, letter in bridge.arguments:
        if letter in ("d", "f"):
            values[name] = real(letter, raw.reals[floating])
            floating += 1
            continue
        wanted, reader = READERS[letter]
        found = raw.kind(whole)
        if found != wanted and not (wanted and raw.ints[whole] == 0):
            raise WrongLetter(
                f"{bridge.name}: {name} is a {KINDS[found]}, the bridge expects a {KINDS[wanted]}; {_described(raw)}"
            )
        values[name] = (
            None
            if wanted and raw.ints[whole] == 0
            else reader(raw.ints[whole] & (1 << 64) - 1 if wanted or letter == "s" else raw.ints[whole])
        )
        whole += 1
    if not raw.is_end(whole):
        raise WrongLetter(
            f"{bridge.name}: {raw.end()} integer arguments were passed, the bridge lists {whole}; {_described(raw)}"
        )
    return values


def _answer(name: str, raw: _Raw) -> None:
    if name not in BRIDGES:
        raise NotImplementedError(f"{name} has no bridge to a model of its op; {_described(raw)}")
    values = _read(BRIDGES[name], raw)
    calls.note("vendor", name, values)
    BRIDGES[name].fn(**values)


@_CALL
def _on_call(name: bytes, ints: Any, reals: Any, stack: Any) -> int:
    try:
        _answer(name.decode(), _Raw(ints, reals, stack))
    except Exception as error:  # nothing may be raised through the C code in between; torch_npu raises with the message
        last_error[:] = [error]
        text = f"{type(error).__name__}: {error}"
        if os.environ.get("V4_STANDIN_TRACEBACK"):
            text += "\n" + "".join(traceback.format_exception(error))
        _libraries["libascendcl.so"].standin_message(text.encode())
        return REFUSED
    return OK


def runtime() -> ctypes.CDLL:
    """The stand-in of CANN's runtime that is loaded. KeyError before `load`."""
    return _libraries["libascendcl.so"]


def waits() -> Counter[str]:
    """How often the host waited for or copied from and to the device since the process began, by reason."""
    counter = _libraries["libascendcl.so"].standin_counter
    return Counter({reason: int(counter(i)) for i, reason in enumerate(WAITS)})


def launched() -> int:
    """Kernels launched since the process began: second phases of aclnn calls."""
    return int(_libraries["libopapi.so"].standin_launches())


def load(libraries: Path, chip: Chip) -> None:
    """Load the stand-in libraries as a node with this chip, then torch_npu. StandInError when the process already has another CANN or chip.

    One process, one chip: torch_npu asks for the device's name once.
    """
    import sys

    if _loaded_as:
        if _loaded_as[0] != chip:
            raise StandInError(
                f"this process already pretends to have a {_loaded_as[0].device}; start another process for {chip.device}"
            )
        return
    if "torch_npu" in sys.modules:
        raise StandInError("torch_npu was imported before the stand-in libraries were loaded; install the stand-in first")
    os.environ["V4_STANDIN_SOC"] = chip.device
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")  # refusals then come at the call
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    names = ["libascendcl.so", *sorted(p.name for p in libraries.glob("*.so") if p.name != "libascendcl.so")]
    for name in names:
        _libraries[name] = ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    opapi, runtime = _libraries["libopapi.so"], _libraries["libascendcl.so"]
    opapi.standin_kind.restype = _i64
    opapi.standin_launches.restype = runtime.standin_counter.restype = ctypes.c_long
    opapi.standin_on_call(_on_call)
    import torch_npu  # noqa: F401

    _loaded_as.append(chip)
    calls.add_meter(waits)
