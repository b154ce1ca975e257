"""Which stored tensor fills which part of which parameter: the name map between the hub's tensors and the model's parameters.

E experts, I expert width, D hidden.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from v4.checkpoint import TORCH_TYPES, Checkpoint
from v4.errors import CheckpointError
from v4.shards import StoredTensor
from v4.tensors import BLOCK

_EXPERTS = re.compile(r"(.*\.ffn\.experts)\.(w13|w2|s13|s2)")
_SHARED = re.compile(r"(.*\.ffn\.shared_experts)\.w13\.(weight|scale)")


@dataclass(frozen=True)
class Piece:
    """One stored tensor and the part of a parameter it fills: first the expert, then a row range (None: all of it)."""

    parameter: str
    source: StoredTensor
    how: str
    expert: int | None
    rows: tuple[int, int] | None
    scale: StoredTensor | None = None

    def target(self, whole: Tensor) -> Tensor:
        """The part of the whole parameter that this piece fills, as a view of the stored number of dimensions."""
        part = whole if self.expert is None else whole[self.expert]
        part = part if self.rows is None else part[self.rows[0] : self.rows[1]]
        # grouped parameters are stored as one matrix
        return part if part.dim() == len(self.source.shape) else part.flatten(0, -2)

    @property
    def bytes(self) -> int:
        """Stored bytes read for it."""
        return self.source.bytes + (self.scale.bytes if self.scale else 0)


def _sources(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None, tuple[int, int] | None]]:
    """Stored names that fill a parameter, with expert number and row range."""
    if m := _EXPERTS.fullmatch(name):
        kind, parts = ("weight" if m[2][0] == "w" else "scale"), (("w1", "w3") if m[2].endswith("13") else ("w2",))
        rows = shape[1] // len(parts)
        for e in range(shape[0]):
            for j, part in enumerate(parts):
                yield f"{m[1]}.{e}.{part}.{kind}", e, (j * rows, (j + 1) * rows)
    elif m := _SHARED.fullmatch(name):
        rows = shape[0] // 2
        for j, part in enumerate(("w1", "w3")):
            yield f"{m[1]}.{part}.{m[2]}", None, (j * rows, (j + 1) * rows)
    else:
        yield (f"{name}.weight" if name.endswith(".attn.wo_a") else name), None, None


def _way(stored: StoredTensor, scale: StoredTensor | None, parameter: str, wanted: torch.dtype) -> str:
    """How a stored tensor becomes a parameter of type `wanted`: read, cast, fp8, fp4 or int8 (codes with a scale per row)."""
    found = TORCH_TYPES[stored.dtype]
    if found is wanted or (found is torch.int8 and wanted is torch.uint8):
        return "read"
    if stored.dtype in ("I8", "F8_E4M3") and wanted.is_floating_point and wanted.itemsize > 1:
        if stored.dtype == "F8_E4M3":
            return "fp8"
        return "fp4" if scale is None or scale.dtype == "F8_E8M0" else "int8"
    number = found.is_floating_point and found.itemsize > 1 and wanted.is_floating_point and wanted.itemsize > 1
    if number or (stored.dtype in ("I32", "I64") and wanted in (torch.int32, torch.int64)):
        return "cast"
    hint = f"The model keeps {parameter} as {wanted}; build it for weights as they are stored"
    raise CheckpointError(
        "wrong dtype",
        file=stored.file,
        tensor=stored.name,
        found=stored.dtype,
        expected=f"a tensor that becomes {wanted}",
        hint=hint,
    )


def _check_stackable(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """w1 and w3 under common 128-row blocks: the second half must start on a block of its own."""
    for name in parameters:
        if (m := _SHARED.fullmatch(name)) and m[2] == "scale":
            stored = checkpoint.tensors.get(f"{m[1]}.w1.weight")
            if stored is not None and parameters[name].dim() == 2 and stored.shape[0] % BLOCK:
                raise ValueError(
                    f"{name}: found an expert width of {stored.shape[0]}, expected a multiple of {BLOCK} to keep w1 and w3 packed in one "
                    "matrix; load with dense weights (numerics='exact')"
                )


def place(parameters: Mapping[str, Tensor], checkpoint: Checkpoint, ignored: Collection[str]) -> list[Piece]:
    """Which stored tensor fills what, in file order.

    CheckpointError for a stored type or shape that can not become the parameter's; ValueError for parameters that are not filled
    completely, and for tensors used twice or not at all that are not `ignored`.
    """
    _check_stackable(parameters, checkpoint)
    pieces: list[Piece] = []
    used: Counter[str] = Counter()
    unfilled = []
    for name, parameter in parameters.items():
        covered = 0
        for source, expert, rows in _sources(name, tuple(parameter.shape)):
            stored = None if source in ignored else checkpoint.tensors.get(source)
            if stored is None:
                continue
            beside = checkpoint.tensors.get(source[: -len("weight")] + "scale") if source.endswith(".weight") else None
            how = _way(stored, beside, name, parameter.dtype)
            scale = beside if how in ("fp4", "fp8", "int8") else None
            piece = Piece(name, stored, how, expert, rows, scale)
            found = (*stored.shape[:-1], stored.shape[-1] * (2 if how == "fp4" else 1))
            if (shape := tuple(piece.target(parameter).shape)) != found:
                wanted = f"{list(shape)} for {name}"
                raise CheckpointError("wrong shape", file=stored.file, tensor=source, found=str(list(found)), expected=wanted)
            covered += prod(found)
            pieces.append(piece)
            used.update([source] if scale is None else [source, scale.name])
        if covered != parameter.numel():
            unfilled.append(name)
    twice = [n for n, count in used.items() if count > 1]
    unused = [n for n in checkpoint.tensors if n not in used and n not in ignored]
    for names, what in (
        (unfilled, "parameters without a stored tensor"),
        (twice, "stored tensors used twice"),
        (unused, "stored tensors without a parameter"),
    ):
        if names:
            raise ValueError(
                f"{checkpoint.path}: found {len(names)} {what}, expected none: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
            )
    order = {file: i for i, file in enumerate(checkpoint.files)}
    return sorted(pieces, key=lambda p: (order[p.source.file], p.source.begin))
