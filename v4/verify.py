"""Finding damage: checksums, headers and values of a whole checkpoint, collected instead of stopping at the first problem."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from v4.checkpoint import Checkpoint
from v4.config import ConfigError
from v4.errors import CheckpointError
from v4.load import check_values
from v4.manifest import MANIFEST, verify_files
from v4.shards import INDEX, StoredTensor

_CHUNK = 1 << 22
_EXPERT = re.compile(r".*\.experts\.\d+\.w[123]\.weight")


@dataclass(frozen=True)
class VerifyReport:
    """findings: what is wrong, empty when sound; files, tensors, bytes: what was looked at; manifest: are there checksums.

    Without a manifest a flipped data bit can go unnoticed.
    """

    path: Path
    findings: tuple[CheckpointError, ...]
    files: int
    tensors: int
    bytes: int
    manifest: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Stable keys: path, ok, findings (their `to_dict`), files, tensors, bytes, manifest, seconds."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "findings": [f.to_dict() for f in self.findings],
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "manifest": self.manifest,
            "seconds": self.seconds,
        }


def verify(path: str | Path, *, progress: bool = False) -> VerifyReport:
    """Look for damage in a checkpoint directory: headers and index, file checksums, and the values of every tensor.

    Values: scales that are NaN or outside 2^-40..2^40, NaN or infinity in floating tensors, expert numbers out of range, experts
    that are zero throughout. Never raises for damage; it is listed in the report.
    """
    began, path = time.perf_counter(), Path(path)
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = Checkpoint(path, refuse=False)
        findings = list(checkpoint.problems)
    except CheckpointError as error:
        findings = [error]
    except ConfigError as error:
        findings = [
            CheckpointError(
                "wrong config", file="config.json", found=str(error), expected="the configuration of a DeepSeek-V4 model"
            )
        ]
    if checkpoint and checkpoint.total_size not in (None, checkpoint.bytes) and not findings:
        findings.append(
            CheckpointError("wrong total_size", file=INDEX, found=str(checkpoint.total_size), expected=str(checkpoint.bytes))
        )
    reported = {f.file for f in findings}
    if path.is_dir():
        findings += [f for f in verify_files(path, progress=progress) if f.file not in reported]
    if checkpoint:
        findings += _values(
            checkpoint, {f.file for f in findings if f.kind in ("truncated", "trailing bytes", "damaged header")}, progress
        )
    return VerifyReport(
        path,
        tuple(findings),
        len(checkpoint.files) if checkpoint else 0,
        len(checkpoint.tensors) if checkpoint else 0,
        checkpoint.bytes if checkpoint else 0,
        (path / MANIFEST).is_file(),
        time.perf_counter() - began,
    )


def _values(checkpoint: Checkpoint, unreadable: set[str | None], progress: bool) -> Iterator[CheckpointError]:
    wanted = [t for t in checkpoint.tensors.values() if t.file not in unreadable and t.name not in checkpoint.ignored]
    with tqdm(total=sum(t.bytes for t in wanted), unit="B", unit_scale=True, desc="values", disable=not progress) as bar:
        for t in sorted(wanted, key=lambda t: (t.file, t.begin)):
            if problem := _check(t, checkpoint.get(t.name), checkpoint.config.n_routed_experts):
                yield problem
            bar.update(t.bytes)


def _check(stored: StoredTensor, tensor: Tensor, experts: int) -> CheckpointError | None:
    if problem := check_values(stored, tensor, experts):
        return problem
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        if not tensor.is_floating_point() or stored.dtype == "F8_E8M0":
            break
        # e4m3 has no infinity; its two NaN codes are all ones beside the sign
        bad = (part.view(torch.uint8) & 127) == 127 if stored.dtype == "F8_E4M3" else ~torch.isfinite(part)
        if count := int(bad.sum()):
            at = start + int(bad.nonzero()[0])
            found = f"{count} or more NaN or infinite values, the first at element {at}"
            return CheckpointError("not finite", file=stored.file, tensor=stored.name, found=found, expected="finite values")
    if _EXPERT.fullmatch(stored.name) and _all_zero(stored, flat):
        return CheckpointError(
            "all-zero expert", file=stored.file, tensor=stored.name, found="zero in every element", expected="trained weights"
        )
    return None


def _all_zero(stored: StoredTensor, flat: Tensor) -> bool:
    # the sign bit of a code does not matter: -0 is zero too
    codes = flat.view(torch.uint8) & {"I8": 0x77, "F8_E4M3": 0x7F}[stored.dtype] if stored.dtype in ("I8", "F8_E4M3") else flat
    return not bool(codes.any())
