"""The files of a checkpoint directory: index, shard headers, and every way in which they can contradict each other.

Nothing of the data is read. Headers are read here as well as by safetensors because its messages name neither sizes nor tensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from v4.errors import CheckpointError
from v4.tensors import ITEM_BYTES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_MAX_HEADER = 100_000_000
_AGAIN = "Download or copy the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: safetensors type name, shape, file name, and its bytes [begin, end) from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin


@dataclass
class Shards:
    """Tensors of a directory by name, its shard files in order, the index's total_size if it has one, and what is wrong."""

    path: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    total_size: int | None = None
    problems: list[CheckpointError] = field(default_factory=list)


class _Repeated(Exception):
    pass


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _Repeated(Counter(k for k, _ in pairs).most_common(1)[0][0])
    return values


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes.

    CheckpointError for a truncated file, trailing bytes, a header that is no JSON or repeats a name, unknown types, and offsets
    that leave holes, overlap or do not match type and shape.
    """
    file, size = path.name, path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or (length <= _MAX_HEADER and size < 8 + length):
            expected = "at least 8 bytes" if size < 8 else f"at least {8 + length} bytes, the length of the header"
            raise CheckpointError("truncated", file=file, found=f"{size} bytes", expected=expected, hint=_AGAIN)
        if length > _MAX_HEADER:
            raise CheckpointError(
                "damaged header", file=file, found=f"a header of {length} bytes", expected=f"at most {_MAX_HEADER}", hint=_AGAIN
            )
        text = f.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        entries = {k: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items() if k != "__metadata__"}
    except _Repeated as error:
        raise CheckpointError(
            "duplicate key", file=file, tensor=str(error), found="the name twice in the header", expected="every name once"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "damaged header",
            file=file,
            found=f"no safetensors header ({error})",
            expected="JSON with dtype, shape, data_offsets",
            hint=_AGAIN,
        ) from None
    tensors, at = [], 8 + length
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if dtype not in ITEM_BYTES:
            raise CheckpointError(
                "wrong dtype", file=file, tensor=name, found=f"unknown type {dtype}", expected=f"one of {', '.join(ITEM_BYTES)}"
            )
        needed = prod(shape) * ITEM_BYTES[dtype]
        if begin != at - 8 - length or end - begin != needed:
            raise CheckpointError(
                "damaged header",
                file=file,
                tensor=name,
                found=f"bytes {begin} to {end} of the data",
                expected=f"{at - 8 - length} to {at - 8 - length + needed} for {dtype} {list(shape)}",
                hint=_AGAIN,
            )
        tensors.append(StoredTensor(name, dtype, shape, file, at, at + needed))
        at += needed
    if size < at:
        cut = next(t for t in tensors if t.end > size)
        raise CheckpointError("truncated", file=file, tensor=cut.name, found=f"{size} bytes", expected=f"{at} bytes", hint=_AGAIN)
    if size > at:
        last = tensors[-1].name if tensors else None
        found = f"{size} bytes, {size - at} after the end of the last tensor"
        raise CheckpointError("trailing bytes", file=file, tensor=last, found=found, expected=f"{at} bytes", hint=_AGAIN)
    return tensors


def read_shards(path: Path) -> Shards:
    """Index and headers of a directory with model.safetensors.index.json, or a single model.safetensors.

    Problems are collected, not raised; only a directory without either file raises CheckpointError.
    """
    shards = Shards(path)
    if (path / INDEX).is_file():
        _read_indexed(shards)
    elif (path / SINGLE).is_file():
        shards.files = [SINGLE]
        shards.tensors = {t.name: t for t in _header(shards, SINGLE)}
    else:
        there = sorted(p.name for p in path.glob("*.safetensors"))
        found = (
            f"{len(there)} safetensors files without an index" if there else "neither" if path.is_dir() else "no such directory"
        )
        raise CheckpointError("missing index", file=INDEX, found=f"{found} in {path}", expected=f"{INDEX} or {SINGLE}")
    return shards


def _header(shards: Shards, file: str) -> list[StoredTensor]:
    try:
        return read_header(shards.path / file)
    except CheckpointError as error:
        shards.problems.append(error)
        return []


def _read_index(shards: Shards) -> dict[str, str]:
    try:
        index = json.loads((shards.path / INDEX).read_bytes(), object_pairs_hook=_unique)
        weight_map = dict(index["weight_map"])
        shards.total_size = (index.get("metadata") or {}).get("total_size")
    except _Repeated as error:
        problem = CheckpointError(
            "duplicate key", file=INDEX, tensor=str(error), found="the name twice", expected="every name once"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = CheckpointError(
            "damaged index", file=INDEX, found=f"no index ({error})", expected="JSON with weight_map", hint=_AGAIN
        )
    else:
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                problem = CheckpointError(
                    "damaged index", file=INDEX, tensor=name, found=f"file name {file!r}", expected="a name in this directory"
                )
                break
        else:
            return weight_map
    shards.problems.append(problem)
    return {}


def _read_indexed(shards: Shards) -> None:
    weight_map = _read_index(shards)
    names_of: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names_of.setdefault(file, []).append(name)
    total = Counter(m[2] for m in map(_NUMBERED.fullmatch, names_of) if m).most_common(1)
    broken: set[str] = set()
    found: dict[str, list[StoredTensor]] = {}
    for file in sorted(names_of):
        if not (shards.path / file).is_file():
            numbered = _NUMBERED.fullmatch(file)
            known = numbered is not None and numbered[2] == total[0][0] and 0 < int(numbered[1]) <= int(numbered[2])
            broken.add(file)
            shards.problems.append(
                CheckpointError(
                    "missing shard" if known else "index to absent file",
                    file=file,
                    tensor=names_of[file][0],
                    found=f"no such file in {shards.path}",
                    expected=f"the file with this and {len(names_of[file]) - 1} other tensors, as {INDEX} says",
                    hint=_AGAIN if known else f"Correct {INDEX} or add the file",
                )
            )
            continue
        before = len(shards.problems)
        found[file] = _header(shards, file)
        if len(shards.problems) > before:
            broken.add(file)
    shards.files = sorted(found)
    if weight_map:
        for extra in sorted(p.name for p in shards.path.glob("model*.safetensors")):
            if extra not in names_of and (extra == SINGLE or _NUMBERED.fullmatch(extra)):
                found[extra] = _header(shards, extra)
    _compare(shards, weight_map, found, broken)


def _compare(shards: Shards, weight_map: dict[str, str], found: dict[str, list[StoredTensor]], broken: set[str]) -> None:
    """Index against headers: names in two files, in another file than indexed, in no index, and indexed names that are absent."""
    holders: dict[str, list[StoredTensor]] = {}
    for tensors in found.values():
        for t in tensors:
            holders.setdefault(t.name, []).append(t)
    for name, copies in holders.items():
        wanted = weight_map.get(name)
        if len(copies) > 1:
            where = " and ".join(t.file for t in copies)
            odd = next((t.file for t in copies if t.file != wanted), copies[-1].file)
            shards.problems.append(
                CheckpointError(
                    "duplicate key",
                    file=odd,
                    tensor=name,
                    found=f"the tensor in {where}",
                    expected=f"only in {wanted or copies[0].file}",
                )
            )
        elif wanted is None:
            shards.problems.append(
                CheckpointError(
                    "tensor not in index", file=copies[0].file, tensor=name, found="no entry", expected=f"an entry in {INDEX}"
                )
            )
        elif copies[0].file != wanted:
            hint = "Two shards may have changed names"
            shards.problems.append(
                CheckpointError(
                    "tensor in another shard",
                    file=copies[0].file,
                    tensor=name,
                    found=f"it in {copies[0].file}",
                    expected=f"in {wanted}",
                    hint=hint,
                )
            )
        shards.tensors[name] = next((t for t in copies if t.file == wanted), copies[0])
    for name, file in weight_map.items():
        if name not in holders and file not in broken:
            shards.problems.append(
                CheckpointError(
                    "key not in its shard",
                    file=file,
                    tensor=name,
                    found="no such tensor in the file",
                    expected=f"it, as {INDEX} says",
                    hint=_AGAIN,
                )
            )
