"""Reading a trace: checked when it is opened, calls and tensors read when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ops.contract import CONTRACTS
from ops.trace.call import Call, Link
from ops.trace.record import checksum
from ops.trace.writer import FORMAT, LINES, VERSION, contract_form, short


class TraceError(ValueError):
    """A folder that is no trace, a damaged or unfinished one, or one of another contract version."""


_TYPES = {
    short(d): d
    for d in (
        torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu,
    )
}  # fmt: skip

_KEYS = {"n", "step", "place", "op", "count", "impl", "in", "out"}


class Trace:
    """A trace in a folder.

    header, end: the first and the closing line. partial: accept one whose closing line is missing, as after a crash. parameters:
    name -> tensor, for a trace recorded without weights. TraceError when the folder is no trace, is damaged, was not finished (unless
    `partial`), or was recorded with other contracts.
    """

    def __init__(self, folder: Path, *, partial: bool = False, parameters: Callable[[str], Tensor] | None = None) -> None:
        self.folder, self._parameters = folder, parameters
        path = folder / LINES
        if not path.is_file():
            raise TraceError(f"{folder}: no trace: {LINES} is missing (v4 trace record --out {folder} writes one)")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        self.header = self._header(path, lines)
        self.records: list[dict[str, Any]] = []
        self.end: dict[str, Any] | None = None
        self._parse(path, lines[1:], partial)
        self._by_number = {r["n"]: r for r in self.records}
        self._check_contracts()
        self._check_files()
        self._opened: dict[str, Any] = {}
        self._proven: set[str] = set()
        self._where: dict[str, Path] | None = None

    # ---- opening ----------------------------------------------------------------------------------------------------

    def _header(self, path: Path, lines: list[str]) -> dict[str, Any]:
        try:
            found = json.loads(lines[0]) if lines else None
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise TraceError(f"{path}: no trace: its first line is not a {FORMAT} header")
        if found.get("version") != VERSION:
            raise TraceError(f"{path}: trace format {found.get('version')}, expected {VERSION}; record it again")
        return found

    def _parse(self, path: Path, lines: list[str], partial: bool) -> None:
        for number, text in enumerate(lines, 2):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                if partial and number == len(lines) + 1:
                    break
                raise TraceError(f"{path}, line {number}: not JSON ({error}); the file is damaged or cut off") from None
            if isinstance(line, dict) and set(line) == {"end"}:
                self.end = line["end"]
                continue
            if not isinstance(line, dict) or not set(line) >= _KEYS or self.end is not None:
                raise TraceError(f"{path}, line {number}: not a recorded call")
            self.records.append(line)
        if self.end is None and not partial:
            raise TraceError(
                f"{path}: cut off after {len(self.records)} calls: the closing line is missing; record it again, or look at what is "
                "there with --partial"
            )
        if self.end is not None and self.end["calls"] != len(self.records):
            raise TraceError(f"{path}: found {len(self.records)} calls, the closing line counts {self.end['calls']}")

    def _check_contracts(self) -> None:
        recorded: Mapping[str, str] = self.header.get("contracts", {})
        for op in sorted({r["op"] for r in self.records}):
            if op not in CONTRACTS:
                raise TraceError(f"{self.folder}: calls of {op!r}, an op that this version does not have")
            if recorded.get(op) != (expected := contract_form(op)):
                raise TraceError(
                    f"{self.folder}: recorded with another contract of {op}: found {recorded.get(op)}, expected {expected}; record it again"
                )

    def _check_files(self) -> None:
        for name, size in (self.end or {}).get("files", {}).items():
            path = self.folder / name
            if not path.is_file():
                raise TraceError(f"{path}: missing; the trace has it with {size} bytes")
            if path.stat().st_size != size:
                raise TraceError(f"{path}: found {path.stat().st_size} bytes, expected {size}; copied in part?")

    # ---- calls ------------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Lines of the calls whose tensors were kept; of an unfinished trace those whose tensors had been written."""
        found = [r for r in self.records if r.get("kept")]
        return found if self.end is not None else [r for r in found if self._written(r)]

    def _written(self, record: Mapping[str, Any]) -> bool:
        forms = [*record["in"].values(), *record["out"], *record.get("written", {}).values()]
        stored = self._files()
        keys = [f["key"] for f in forms if isinstance(f, dict) and "key" in f]
        if self.header["weights"]:
            keys += [f"parameter:{f['parameter']}" for f in forms if isinstance(f, dict) and "parameter" in f]
        return all(k in stored for k in keys)

    def calls(self) -> Iterator[Call]:
        """The calls with their tensors, in the order they ran."""
        for record in self.kept:
            yield self.call(record)

    def call(self, record: Mapping[str, Any]) -> Call:
        """One call with its tensors. TraceError when a tensor is missing or damaged."""
        return Call(
            record["n"], record["step"], record["place"], record["op"], record["count"], record["impl"],
            {name: self._value(form) for name, form in record["in"].items()},
            [self._value(form) for form in record["out"]],
            {name: self._value(form) for name, form in record.get("written", {}).items()},
            links=self.links(record),
        )  # fmt: skip

    def bare(self, record: Mapping[str, Any]) -> Call:
        """One call without its tensors."""
        return Call(
            record["n"],
            record["step"],
            record["place"],
            record["op"],
            record["count"],
            record["impl"],
            {},
            links=self.links(record),
        )

    def links(self, record: Mapping[str, Any]) -> dict[str, Link]:
        """Where the call's arguments came from, and whether they are still what that call had returned."""
        found = {}
        for name, (number, output) in record.get("from", {}).items():
            source = self._by_number.get(number)
            if source is not None:
                intact = source["out"][output]["crc"] == record["in"][name]["crc"]
                found[name] = Link(number, output, intact)
        return found

    def where(self, number: int) -> str:
        """Op, place, number of the call there and step of a call, as `Call.where`."""
        r = self._by_number[number]
        return f"{r['op']}@{r['place']}#{r['count']} (step {r['step']})"

    def _value(self, form: Any) -> Any:
        if not isinstance(form, dict):
            return form
        if "type" in form:
            return _TYPES[form["type"]]
        if "parameter" in form:
            return self._parameter(form)
        found = self._tensor(form["key"])
        self._check(found, form, form["key"])
        if f"{checksum(found):08x}" != form["crc"]:
            raise TraceError(f"{self.folder}: tensor {form['key']} is damaged: its checksum is not {form['crc']}")
        return _strided(found, form.get("stride"))

    def _check(self, found: Tensor, form: Mapping[str, Any], name: str) -> None:
        if short(found.dtype) != form["dtype"] or list(found.shape) != form["shape"]:
            expected = f"{form['dtype']} {tuple(form['shape'])}"
            raise TraceError(f"{self.folder}: {name}: found {short(found.dtype)} {tuple(found.shape)}, expected {expected}")

    def _parameter(self, form: Mapping[str, Any]) -> Tensor:
        name = form["parameter"]
        if self.header["weights"]:
            found = self._tensor(f"parameter:{name}")
        elif self._parameters is None:
            raise TraceError(f"{self.folder}: recorded without weights: give the checkpoint with --checkpoint DIR")
        else:
            found = self._parameters(name)
        self._check(found, form, name)
        if name not in self._proven and self.end is not None:
            expected = self.end["parameters"].get(name)
            if f"{checksum(found):08x}" != expected:
                what = "it is damaged" if self.header["weights"] else "the checkpoint's are not the weights that were recorded"
                raise TraceError(f"{self.folder}: parameter {name}: its checksum is not {expected}: {what}")
            self._proven.add(name)
        return found

    def _files(self) -> Mapping[str, Path]:
        if self._where is None:
            self._where = {}
            for path in sorted(self.folder.glob("tensors-*.safetensors")):
                try:
                    self._opened[path.name] = safe_open(path, framework="pt")
                except SafetensorError as error:
                    raise TraceError(f"{path}: not a readable safetensors file: {error}") from None
                self._where |= dict.fromkeys(self._opened[path.name].keys(), path)
        return self._where

    def _tensor(self, key: str) -> Tensor:
        if (path := self._files().get(key)) is None:
            raise TraceError(f"{self.folder}: tensor {key} is in none of its files")
        return self._opened[path.name].get_tensor(key)


def _strided(t: Tensor, stride: list[int] | None) -> Tensor:
    """`t` laid out as it was, where that takes no more memory than its elements."""
    if stride is None:
        return t
    steps = sorted((s, n) for s, n in zip(stride, t.shape, strict=True) if n > 1)
    expected = 1
    for step, size in steps:
        if step != expected:
            return t
        expected *= size
    return torch.empty_strided(t.shape, stride, dtype=t.dtype).copy_(t)
