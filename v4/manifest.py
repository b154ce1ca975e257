"""Checksums of a checkpoint: SHA-256 of every file, and a CRC-32 of every tensor that tells which one a damaged file has lost.

checksums.json: {"sha256": {file: hex digits}, "crc32": {tensor: hex digits}}.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from v4.errors import CheckpointError
from v4.shards import read_header

MANIFEST = "checksums.json"
_READ = 1 << 22


def file_sha256(path: Path, bar: tqdm | None = None) -> str:
    """SHA-256 of a file as hex digits; `bar` advances by bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        while part := f.read(_READ):
            digest.update(part)
            if bar is not None:
                bar.update(len(part))
    return digest.hexdigest()


def tensor_crc32(tensor: Tensor) -> str:
    """CRC-32 of a tensor's stored bytes as 8 hex digits."""
    return f"{zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data):08x}"


def verify_files(path: Path, *, progress: bool = False) -> list[CheckpointError]:
    """Hold every file against checksums.json; nothing to find when there is no such file.

    A shard that differs is searched for the damaged tensors by their CRC-32; its header is to blame when all of them agree.
    """
    if not (path / MANIFEST).is_file():
        return []
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sums, crc = dict(manifest["sha256"]), dict(manifest.get("crc32", {}))
    except (ValueError, KeyError, TypeError) as error:
        return [
            CheckpointError(
                "damaged manifest", file=MANIFEST, found=f"no manifest ({error})", expected="JSON with sha256: {file: hex digits}"
            )
        ]
    present = {name: path / name for name in sums if (path / name).is_file()}
    size = sum(p.stat().st_size for p in present.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="checksums", disable=not progress) as bar, ThreadPoolExecutor() as pool:
        found = dict(zip(present, pool.map(lambda p: file_sha256(p, bar), present.values()), strict=True))
    findings = []
    for name, expected in sums.items():
        if name not in found:
            findings.append(
                CheckpointError("missing file", file=name, found="no such file", expected=f"a file with SHA-256 {expected}")
            )
        elif found[name] != expected:
            findings += _locate(path, name, found[name], expected, crc)
    return findings


def _locate(path: Path, name: str, found: str, expected: str, crc: dict[str, str]) -> list[CheckpointError]:
    hint = "Download or copy the file again"
    whole = CheckpointError("checksum", file=name, found=f"SHA-256 {found}", expected=f"SHA-256 {expected}", hint=hint)
    if not name.endswith(".safetensors"):
        return [whole]
    try:
        stored = read_header(path / name)
    except CheckpointError:
        return [whole]
    bad = []
    with (path / name).open("rb") as f:
        for t in stored:
            f.seek(t.begin)
            now, was = f"CRC-32 {zlib.crc32(f.read(t.bytes)):08x}", f"CRC-32 {crc.get(t.name)}"
            if t.name in crc and now != was:
                bad.append(CheckpointError("checksum", file=name, tensor=t.name, found=now, expected=was, hint=hint))
    return bad or [whole]
