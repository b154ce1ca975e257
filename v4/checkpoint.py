"""Reading checkpoints: a directory is opened and every header held against the configuration before any data is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4.config import Config
from v4.errors import CheckpointError
from v4.shards import INDEX, SINGLE, StoredTensor, read_shards
from v4.tensors import TensorSpec, checkpoint_tensors

PLAIN = ("F32", "BF16", "F16")
_QUANTISED = ("F8_E4M3", "I8")

TORCH_TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""safetensors type name -> torch type."""


class Checkpoint:
    """A checkpoint directory, verified by its headers; data is read when asked for.

    path; config; tensors: hub name -> StoredTensor, ignored ones included; files: shard names in order; storage: "hub" when any
    weight is stored quantised, else the plain type "f32", "bf16" or "f16"; has_mtp: whether the MTP block of the configuration is
    stored; ignored: names that no model of this project reads; problems: what is wrong.

    A weight without .scale may be stored plainly in any checkpoint. In a plain checkpoint every tensor has the type of
    embed.weight or F32, and tables may be I32. `mtp.*` is ignored when the configuration is a DSpark variant (another drafter) or
    has no MTP block; a checkpoint without any `mtp.*` is complete without MTP (has_mtp False).

    Raises CheckpointError for the first problem unless `refuse` is False; ConfigError for a config.json that is no DeepSeek-V4.
    `config` replaces the directory's config.json.
    """

    def __init__(self, path: str | Path, *, config: Config | None = None, refuse: bool = True) -> None:
        self.path = Path(path)
        shards = read_shards(self.path)
        self.tensors, self.files, self.total_size = shards.tensors, shards.files, shards.total_size
        self.problems = shards.problems
        self.config = config or self._read_config()
        self.storage = self._storage()
        mtp = [n for n in self.tensors if n.startswith("mtp.")]
        wanted = self.config.num_nextn_predict_layers > 0 and not self.config.dspark
        self.has_mtp = wanted and bool(mtp)
        self.ignored: tuple[str, ...] = () if wanted else tuple(mtp)
        self._open_files: dict[str, Any] = {}
        if not self.problems:
            # with unreadable files every tensor of theirs would be reported as missing too
            self._compare_with_table()
        if refuse:
            self.refuse()

    def refuse(self) -> None:
        """Raise the first problem, if there is any."""
        if self.problems:
            first, others = self.problems[0], len(self.problems) - 1
            more = f" (and {others} more problems; `v4 checkpoint verify` lists them all)" if others else ""
            raise CheckpointError(
                first.kind,
                file=first.file,
                tensor=first.tensor,
                found=first.found,
                expected=first.expected,
                hint=first.hint + more,
            )

    @property
    def bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(t.bytes for t in self.tensors.values())

    def _read_config(self) -> Config:
        config = Config.from_file(self.path)
        raw = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        stated = "expert_dtype" in raw or "expert_dtype" in (raw.get("quantization_config") or {})
        first = self.tensors.get("layers.0.ffn.experts.0.w1.weight")
        if stated or first is None:
            return config
        # the first releases do not state it: the stored type decides
        kind = {"I8": "fp4", "F8_E4M3": "fp8", "BF16": "bf16", "F32": "fp32"}.get(first.dtype)
        return replace(config, expert_dtype=kind) if kind else config

    def _storage(self) -> str:
        if any(t.dtype in _QUANTISED for t in self.tensors.values()):
            return "hub"
        embed = self.tensors.get("embed.weight")
        return embed.dtype.lower() if embed and embed.dtype in PLAIN else "hub"

    def _compare_with_table(self) -> None:
        left = dict.fromkeys(n for n in self.tensors if not n.startswith("mtp.") or self.has_mtp)
        for spec in checkpoint_tensors(self.config, "hub"):
            if spec.name.startswith("mtp.") and not self.has_mtp:
                continue
            left.pop(spec.name, None)
            if problem := self._compare(spec):
                self.problems.append(problem)
        for name in left:
            t = self.tensors[name]
            hint = "config.json may belong to another model"
            self.problems.append(
                CheckpointError(
                    "unexpected tensor",
                    file=t.file,
                    tensor=name,
                    found=f"{t.dtype} {list(t.shape)}",
                    expected="no such tensor",
                    hint=hint,
                )
            )

    def _compare(self, spec: TensorSpec) -> CheckpointError | None:
        found = self.tensors.get(spec.name)
        is_scale = spec.name.endswith(".scale")
        if found is None:
            weight = self.tensors.get(spec.name[: -len("scale")] + "weight") if is_scale else None
            if weight is not None and weight.dtype in PLAIN:
                return None
            return CheckpointError(
                "missing tensor",
                file=INDEX if (self.path / INDEX).is_file() else SINGLE,
                tensor=spec.name,
                found="no such tensor",
                expected=f"{spec.dtype} {list(spec.shape)}",
                hint="The download may be incomplete, or config.json belongs to another model",
            )
        allowed, shape = self._allowed(spec, found)
        if found.dtype not in allowed:
            return CheckpointError(
                "wrong dtype", file=found.file, tensor=spec.name, found=found.dtype, expected=" or ".join(allowed)
            )
        if found.shape != shape:
            return CheckpointError(
                "wrong shape",
                file=found.file,
                tensor=spec.name,
                found=str(list(found.shape)),
                expected=str(list(shape)),
                hint=_swapped(spec, found, shape),
            )
        return None

    def _allowed(self, spec: TensorSpec, found: StoredTensor) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Types and shape under which the tensor may be stored here."""
        if spec.dtype in _QUANTISED and spec.name[: -len("weight")] + "scale" not in self.tensors and found.dtype in PLAIN:
            shape = (spec.shape[0], spec.shape[1] * spec.codes) if spec.dtype == "I8" else spec.shape
            return (PLAIN if self.storage == "hub" else self._plain()), shape
        if self.storage == "hub" or spec.dtype in (*_QUANTISED, "F8_E8M0"):
            return (spec.dtype,), spec.shape
        return (("I64", "I32") if spec.dtype == "I64" else self._plain()), spec.shape

    def _plain(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.storage.upper(), "F32")))

    def _stored(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                "missing tensor", tensor=name, found="no such tensor", expected=f"a name of {self.path}"
            ) from None

    def dtype_of(self, name: str) -> str:
        """safetensors type name of a tensor. CheckpointError for an unknown name (so in the methods below)."""
        return self._stored(name).dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Stored shape of a tensor."""
        return self._stored(name).shape

    def _file(self, file: str) -> Any:
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(str(self.path / file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    "damaged file", file=file, found=str(error), expected="a readable safetensors file"
                ) from None
        return self._open_files[file]

    def get(self, name: str) -> Tensor:
        """A tensor as stored, mapped from the file (read only: copy before writing). Packed FP4 is int8."""
        return self._file(self._stored(name).file).get_tensor(name)

    def get_slice(self, name: str, index: Sequence[slice]) -> Tensor:
        """The part of a tensor under one slice per dimension (fewer: the last ones whole); only that part is read."""
        stored = self._stored(name)
        if len(index) > len(stored.shape):
            raise ValueError(f"{name}: {len(index)} slices for {len(stored.shape)} dimensions {list(stored.shape)}")
        return self._file(stored.file).get_slice(name)[tuple(index)]


def _swapped(spec: TensorSpec, found: StoredTensor, expected: tuple[int, ...]) -> str:
    if ".experts." not in spec.name and ".shared_experts." not in spec.name:
        return "config.json may belong to another model"
    rows, columns = expected
    factor = 2 if found.dtype == "I8" else 1
    if found.shape == (columns * factor, rows // factor):
        return "This is the shape of the expert's other matrix: w2 and w1 or w3 seem swapped"
    return ""
