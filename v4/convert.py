"""Re-encoding a checkpoint for another kind of product, tensor by tensor: what is stored already as wanted is copied, bit for bit.

Memory is bounded by one shard. Shapes: N outputs, K inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4.checkpoint import TORCH_TYPES, Checkpoint
from v4.config import Config
from v4.packing import quantise_fp4, quantise_fp8, quantise_int8, unpack_fp4, unpack_fp8, unpack_int8
from v4.save import SaveReport, save
from v4.tensors import TensorSpec, checkpoint_tensors
from v4.verify import verify

REPORT = "quantisation.json"
KINDS = ("int8", "mx")
SHARD_BYTES = 4 << 30
_KEPT = ("tokenizer.json", "tokenizer_config.json", "encoding/encoding_v4.py")


@dataclass(frozen=True)
class Change:
    """How one weight was changed: its error against the source, as a share of the source's RMS and of its largest value."""

    name: str
    source: str
    target: str
    rms: float
    worst: float


@dataclass(frozen=True)
class Converted:
    """saved: what was written; changes: every weight that was re-encoded; copied: weights whose bits are those of the source."""

    saved: SaveReport
    changes: tuple[Change, ...]
    copied: int


def target_config(config: Config, kind: str) -> Config:
    """Configuration of the converted checkpoint. ValueError for an unknown kind."""
    if kind == "int8":
        return replace(config, expert_dtype="int8", weight_block_size=None)
    if kind == "mx":
        return replace(config, expert_dtype="fp4", weight_block_size=(128, 128), torch_dtype="bfloat16")
    raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")


def values(checkpoint: Checkpoint, name: str) -> Tensor:
    """A stored tensor as numbers: dequantised to fp32 where it has a scale, else as it is."""
    stored = checkpoint.get(name)
    scale_name = name.removesuffix("weight") + "scale"
    if not name.endswith(".weight") or scale_name not in checkpoint.tensors:
        return stored
    scale = checkpoint.get(scale_name)
    if scale.dtype != torch.float8_e8m0fnu:
        out = torch.empty(stored.shape)
        unpack_int8(stored, scale, out)
    elif stored.dtype == torch.float8_e4m3fn:
        out = torch.empty(stored.shape)
        unpack_fp8(stored, scale, out)
    else:
        out = torch.empty(stored.shape[0], 2 * stored.shape[1])
        unpack_fp4(stored, scale, out)
    return out


def _restored(spec: TensorSpec, stored: Tensor, scale: Tensor | None, shape: torch.Size) -> Tensor:
    """The numbers that a written weight stands for."""
    out = torch.empty(shape)
    if scale is None:
        return stored.float()
    if spec.dtype == "I8" and spec.codes == 1:
        unpack_int8(stored, scale, out)
    else:
        (unpack_fp8 if spec.dtype == "F8_E4M3" else unpack_fp4)(stored, scale, out)
    return out


def _encoder(spec: TensorSpec, scales: dict[str, TensorSpec]) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    if spec.dtype == "I8" and spec.codes == 1:
        kind = TORCH_TYPES[scales[spec.name.removesuffix("weight") + "scale"].dtype]
        return lambda w: quantise_int8(w, kind)
    if spec.dtype == "F8_E4M3":
        return quantise_fp8
    if spec.dtype == "I8":
        return lambda w: _as_int8(*quantise_fp4(w))
    return lambda w: (w.to(TORCH_TYPES[spec.dtype]), None)


def _as_int8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return packed.view(torch.int8), scale


class _Stream:
    """Tensors of the target in file order; what happened to each is noted."""

    def __init__(self, checkpoint: Checkpoint, config: Config) -> None:
        self.checkpoint = checkpoint
        specs = [s for s in checkpoint_tensors(config, "hub") if checkpoint.has_mtp or not s.name.startswith("mtp.")]
        self.scales = {s.name: s for s in specs if s.name.endswith(".scale")}
        self.specs = [s for s in specs if s.name not in self.scales]
        self.changes: list[Change] = []
        self.copied = 0

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in (*self.specs, *self.scales.values()))

    def _as_it_is(self, spec: TensorSpec) -> bool:
        found = self.checkpoint.tensors[spec.name]
        scale = spec.name.removesuffix("weight") + "scale"
        beside = self.checkpoint.tensors.get(scale) if spec.name.endswith(".weight") else None
        wanted = self.scales.get(scale) if spec.name.endswith(".weight") else None
        same_scale = (beside is None) == (wanted is None) and (beside is None or wanted is None or beside.dtype == wanted.dtype)
        return found.dtype == spec.dtype and found.shape == spec.shape and same_scale

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for spec in self.specs:
            scale_name = spec.name.removesuffix("weight") + "scale"
            if self._as_it_is(spec):
                self.copied += 1
                yield spec.name, self.checkpoint.get(spec.name)
                if spec.name.endswith(".weight") and scale_name in self.scales:
                    yield scale_name, self.checkpoint.get(scale_name)
                continue
            source = values(self.checkpoint, spec.name)
            if spec.dtype == "I64" or source.dtype in (torch.int32, torch.int64):
                yield spec.name, source.to(TORCH_TYPES[spec.dtype])
                continue
            stored, scale = _encoder(spec, self.scales)(source)
            self._note(spec, source, _restored(spec, stored, scale, source.shape))
            yield spec.name, stored
            if scale is not None:
                yield scale_name, scale

    def _note(self, spec: TensorSpec, source: Tensor, restored: Tensor) -> None:
        error, wide = (restored - source.float()).abs(), source.float().abs()
        rms = float(error.square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-38)) if source.numel() else 0.0
        worst = float(error.max() / wide.max().clamp_min(1e-38)) if source.numel() else 0.0
        kind = self.checkpoint.tensors[spec.name].dtype
        self.changes.append(Change(spec.name, kind, spec.dtype, rms, worst))


def convert(source: str | Path, out_dir: str | Path, kind: str, *, overwrite: bool = False, progress: bool = False) -> Converted:
    """Write `source` with its weights stored for `kind` of products, verify what was written, and say how far each weight moved.

    int8: every linear layer but wo_a as INT8 per output channel, experts with BF16 scales. mx: FP8 in 128 x 128 blocks and FP4 experts,
    both with E8M0 scales, as the hub has them: a hub checkpoint keeps its bits. ValueError for an unknown kind, the same directory, or
    one that is taken; CheckpointError for a damaged source; RuntimeError when what was written can not be read back.
    """
    source, out = Path(source), Path(out_dir)
    if source.resolve() == out.resolve():
        raise ValueError(f"{out}: found the source itself, expected another directory")
    checkpoint = Checkpoint(source)
    config = target_config(checkpoint.config, kind)
    stream = _Stream(checkpoint, config)
    files = {name: (source / name).read_bytes() for name in _KEPT if (source / name).is_file()}
    saved = save(
        stream, config, out, shard_bytes=SHARD_BYTES, extra_files=files, overwrite=overwrite, progress=progress, total_bytes=stream.bytes
    )  # fmt: skip
    (out / REPORT).write_text(json.dumps(report_of(stream.changes, stream.copied), indent=1) + "\n", encoding="utf-8")
    found = verify(out, progress=progress)
    if not found.ok:
        raise RuntimeError(f"{out}: what was written does not verify: {found.findings[0]}")
    return Converted(saved, tuple(stream.changes), stream.copied)


def report_of(changes: list[Change] | tuple[Change, ...], copied: int) -> dict[str, Any]:
    """{copied, changed, by_type: "F8_E4M3 -> I8" -> {tensors, rms, worst}, tensors}: mean RMS and worst error of each kind of change."""
    kinds: dict[str, list[Change]] = {}
    for change in changes:
        kinds.setdefault(f"{change.source} -> {change.target}", []).append(change)
    by_type = {
        kind: {"tensors": len(rows), "rms": sum(r.rms for r in rows) / len(rows), "worst": max(r.worst for r in rows)}
        for kind, rows in sorted(kinds.items())
    }
    return {"copied": copied, "changed": len(changes), "by_type": by_type, "tensors": [asdict(c) for c in changes]}
