"""Writing a trace: a folder with calls.jsonl (a header, a line per call, a closing line) and tensors-*.safetensors.

Tensors are stored once however often they are passed on, under a name made of their bytes; parameters under their own name.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ops.contract import CONTRACTS, tensors_bytes
from ops.registry import signature
from ops.trace.call import Call
from ops.trace.record import Selection, checksum, memory

FORMAT, VERSION = "v4-trace", 1
LINES = "calls.jsonl"
SHARD = 16 * 2**20
"""Bytes of tensors gathered before a file is written."""
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)


def contract_form(op: str) -> str:
    """What must agree for a recorded call of the op to mean the same: its version, its parameters and what it writes."""
    c = CONTRACTS[op]
    names = [f"{p.name}={p.default}" if p.default is not p.empty else p.name for p in signature(c).parameters.values()]
    return f"{c.version}: ({', '.join(names)})" + (f" writes {', '.join(c.mutates)}" if c.mutates else "")


def short(dtype: torch.dtype) -> str:
    """Name of a type without the module."""
    return str(dtype).removeprefix("torch.")


def _tensor_form(t: Tensor, **more: Any) -> dict[str, Any]:
    form: dict[str, Any] = {"dtype": short(t.dtype), "shape": list(t.shape)}
    if not t.is_contiguous():
        form["stride"] = list(t.stride())
    return form | more


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"type": short(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"trace: an argument of type {type(value).__name__} can not be recorded")


class Writer:
    """A sink that writes to a new folder. ValueError when there is something in it already, unless `overwrite` and it is a trace.

    selection: calls whose tensors are kept. limit: bytes of tensors at most; calls that would pass it are noted without tensors.
    weights: whether parameters of kept calls are stored too (replay needs the checkpoint otherwise).
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        *,
        selection: Selection,
        limit: int,
        weights: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.selection, self.limit, self.weights = folder, selection, limit, weights
        _make_room(folder, overwrite)
        self._lines = (folder / LINES).open("w", encoding="utf-8")
        self._calls = self._kept = self._left_out = self._bytes = self._gathered = 0
        self._pending: dict[str, Tensor] = {}
        self._stored: set[str] = set()
        self._heads: dict[tuple[Any, ...], str] = {}
        self._constants: dict[tuple[type, Any], str] = {}
        self._sums: dict[str, str] = {}
        self._files: dict[str, int] = {}
        contracts = {op: contract_form(op) for op in CONTRACTS}
        self._write({"format": FORMAT, "version": VERSION, **header, "weights": weights, "contracts": contracts})

    @property
    def bytes(self) -> int:
        """Bytes of tensors kept so far."""
        return self._bytes

    def wants(self, place: str, op: str, step: int) -> bool:
        """Whether the selection has the call and there is still room."""
        return self._bytes < self.limit and self.selection(place, op, step)

    def line(self, call: Call) -> None:
        """Shapes and checksums of arguments and results."""
        self._calls += 1
        given = ",".join(
            f'"{n}":{self._noted(v, call.sums[n]) if isinstance(v, Tensor) else self._constant(v)}'
            for n, v in call.arguments.items()
        )
        found = ",".join(self._noted(t, c) for t, c in zip(call.outputs, call.output_sums, strict=True))
        links = ",".join(f'"{n}":[{link.number},{link.output}]' for n, link in call.links.items())
        # put together by hand, from names that need no escape: this line is what recording costs
        self._lines.write(
            f'{{"n":{call.number},"step":{call.step},"place":"{call.place}","op":"{call.op}","count":{call.count},'
            f'"impl":{self._constant(call.impl)},"from":{{{links}}},"in":{{{given}}},"out":[{found}]}}\n'
        )

    def _noted(self, t: Tensor, total: int) -> str:
        key = (t.dtype, t.shape) if t.is_contiguous() else (t.dtype, t.shape, t.stride())
        if (head := self._heads.get(key)) is None:
            head = self._heads[key] = _JSON.encode(_tensor_form(t))[:-1]
        return f'{head},"crc":"{total:08x}"}}'

    def _constant(self, value: Any) -> str:
        key = (type(value), value)
        if (text := self._constants.get(key)) is None:
            text = self._constants[key] = _JSON.encode(_plain(value))
        return text

    def kept(self, call: Call, parameters: Mapping[str, str]) -> None:
        """The call's line, and its tensors unless they would pass the limit."""
        if self._bytes + tensors_bytes(*self._to_store(call, parameters)) > self.limit:
            self._left_out += 1
            call.arguments = {n: v for n, v in call.arguments.items() if not isinstance(v, Tensor) or n in call.sums}
            self.line(call)
            return
        self._kept += 1
        arguments = {
            n: self._parameter(v, parameters[n]) if n in parameters else self._stored_form(v, call.known_sum(n))
            for n, v in call.arguments.items()
        }
        self._call(
            call,
            arguments,
            [self._stored_form(t, total) for t, total in zip(call.outputs, call.output_sums, strict=True)],
            written={n: self._stored_form(t) for n, t in call.written.items()},
            kept=True,
        )
        if self._gathered >= SHARD:
            self._flush()

    def _to_store(self, call: Call, parameters: Mapping[str, str]) -> list[Any]:
        given = [v for n, v in call.arguments.items() if n not in parameters]
        weights = [call.arguments[n] for n, p in parameters.items() if self.weights and f"parameter:{p}" not in self._stored]
        return [*given, *weights, *call.outputs, *call.written.values()]

    @staticmethod
    def check(folder: Path, overwrite: bool) -> None:
        """ValueError when a trace could not be written to `folder`, or would replace one without `overwrite`."""
        _own_files(folder, overwrite)

    def close(self, *, tokens: Sequence[int] = (), failed: str | None = None) -> dict[str, Any]:
        """Write what is gathered and the closing line: what was generated, or the error that ended the run early. Returns that line."""
        self._flush()
        end = {
            "calls": self._calls,
            "kept": self._kept,
            "left_out": self._left_out,
            "tensor_bytes": self._bytes,
            "files": self._files,
            "parameters": self._sums,
            "tokens": list(tokens),
            "failed": failed,
        }
        self._write({"end": end})
        self._lines.close()
        return end

    def _write(self, value: Mapping[str, Any]) -> None:
        self._lines.write(_JSON.encode(value) + "\n")

    def _call(self, call: Call, arguments: Mapping[str, Any], outputs: list[Any], **more: Any) -> None:
        self._calls += 1
        head = {"n": call.number, "step": call.step, "place": call.place, "op": call.op, "count": call.count, "impl": call.impl}
        links = {name: [link.number, link.output] for name, link in call.links.items()}
        self._write({**head, "from": links, "in": arguments, "out": outputs, **more})

    def _stored_form(self, value: Any, total: int | None = None) -> Any:
        if not isinstance(value, Tensor):
            return _plain(value)
        data = memory(value)
        digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:20]
        key = f"{digest}-{short(value.dtype)}-{'x'.join(map(str, value.shape))}"
        self._store(key, value)
        return _tensor_form(value, crc=f"{zlib.crc32(data) if total is None else total:08x}", key=key)

    def _parameter(self, value: Tensor, name: str) -> dict[str, Any]:
        if name not in self._sums:
            self._sums[name] = f"{checksum(value):08x}"
        if self.weights:
            self._store(f"parameter:{name}", value)
        return _tensor_form(value, parameter=name)

    def _store(self, key: str, value: Tensor) -> None:
        if key in self._stored:
            return
        self._stored.add(key)
        self._pending[key] = value.detach().cpu().contiguous()
        self._bytes += tensors_bytes(value)
        self._gathered += tensors_bytes(value)

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.folder / f"tensors-{len(self._files) + 1:05d}.safetensors"
        # parts of a larger storage can not be saved by themselves
        save_file({k: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for k, t in self._pending.items()}, path)
        self._files[path.name] = path.stat().st_size
        self._pending, self._gathered = {}, 0


def _own_files(folder: Path, overwrite: bool) -> list[str]:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder to write a trace to")
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    own = [n for n in found if n == LINES or (n.startswith("tensors-") and n.endswith(".safetensors"))]
    if found and (not overwrite or own != found):
        what = "a trace is there" if own == found else f"found {', '.join(n for n in found if n not in own)} in it"
        raise ValueError(f"{folder}: {what}; give another folder" + ("" if own != found else ", or --overwrite"))
    return own


def _make_room(folder: Path, overwrite: bool) -> None:
    for name in _own_files(folder, overwrite):
        (folder / name).unlink()
    folder.mkdir(parents=True, exist_ok=True)
