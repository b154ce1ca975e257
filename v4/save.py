"""Writing checkpoints: a stream of named tensors becomes shards, index, configuration files and a checksum manifest.

Memory is bounded by one shard. The index is written last: a directory with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from v4.config import Config
from v4.manifest import MANIFEST, file_sha256, tensor_crc32
from v4.shards import INDEX, SINGLE
from v4.tensors import section


@dataclass(frozen=True)
class SaveReport:
    """What was written: directory, shard files, tensors, bytes of tensor data, seconds."""

    path: Path
    files: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float


def prepare(out_dir: str | Path, *, overwrite: bool = False) -> Path:
    """Create the directory. ValueError when it already holds a checkpoint, unless `overwrite`, which removes the old shards."""
    path = Path(out_dir)
    path.mkdir(parents=True, exist_ok=True)
    old = [
        p
        for p in path.iterdir()
        if p.name in (INDEX, MANIFEST, SINGLE) or re.fullmatch(r"(model-.*|part-\d+)\.safetensors", p.name)
    ]
    if old and not overwrite:
        raise ValueError(
            f"{path}: found {old[0].name}, expected a directory without a checkpoint; choose another one or pass overwrite=True"
        )
    for p in sorted(old, key=lambda p: p.name != INDEX):
        p.unlink()
    return path


def save(
    named_tensors: Iterable[tuple[str, Tensor]],
    config: Config,
    out_dir: str | Path,
    *,
    shard_bytes: int | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: bool = False,
    total_bytes: int | None = None,
) -> SaveReport:
    """Write tensors under their names as a checkpoint directory in the hub's layout.

    named_tensors: hub names and tensors in file order (packed FP4 as int8); consumed once, one shard at a time. A new shard
    starts with every section (embedding, each layer, head, each MTP block: the hub's layout) and where `shard_bytes` would be
    exceeded. Also written: config.json, generation_config.json, `extra_files` (relative name -> content), the index, and
    checksums.json (v4/manifest.py). On an error the unfinished shards are removed. ValueError for a name that comes twice, no
    tensors at all, an occupied directory, or an extra file outside of it.
    """
    began, path = time.perf_counter(), prepare(out_dir, overwrite=overwrite)
    for name in extra_files or {}:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"extra file {name!r}: expected a relative name inside the checkpoint directory")
    parts: list[tuple[Path, list[str]]] = []
    crc: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    size = total = 0
    bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="write", disable=not progress)

    def flush() -> None:
        nonlocal size
        if pending:
            part = path / f"part-{len(parts) + 1:05d}.safetensors"
            parts.append((part, list(pending)))
            save_file(pending, str(part), metadata={"format": "pt"})
            pending.clear()
            size = 0

    try:
        last = None
        for name, tensor in named_tensors:
            if name in crc:
                raise ValueError(f"{name}: found the name twice, expected every tensor once")
            n = tensor.numel() * tensor.element_size()
            if section(name) != last or (shard_bytes is not None and size + n > shard_bytes):
                flush()
            last = section(name)
            crc[name] = tensor_crc32(tensor)
            pending[name] = tensor.contiguous()
            size, total = size + n, total + n
            bar.update(n)
        flush()
        if not parts:
            raise ValueError("found no tensors to write, expected at least one")
        files = _finish(path, parts, crc, total, config, extra_files or {})
    except BaseException:
        for part, _ in parts:
            part.unlink(missing_ok=True)
        raise
    finally:
        bar.close()
    return SaveReport(path, files, len(crc), total, time.perf_counter() - began)


def _finish(
    path: Path,
    parts: list[tuple[Path, list[str]]],
    crc: dict[str, str],
    total: int,
    config: Config,
    extra_files: Mapping[str, bytes],
) -> tuple[str, ...]:
    files: list[str] = []
    weight_map: dict[str, str] = {}
    for i, (part, names) in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        part.replace(path / file)
        files.append(file)
        weight_map |= dict.fromkeys(names, file)
    texts = {
        "config.json": _json(config.to_dict()),
        "generation_config.json": _json(
            {
                "_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
                "do_sample": True, "temperature": 1.0, "top_p": 1.0,
            }
        ),
        **extra_files,
    }  # fmt: skip
    for name, content in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    for file in files:  # safetensors makes its files readable for the owner only
        (path / file).chmod((path / "config.json").stat().st_mode & 0o777)
    index = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    sha = {name: file_sha256(path / name) for name in (*files, *texts)}
    sha[INDEX] = hashlib.sha256(index).hexdigest()
    (path / MANIFEST).write_bytes(_json({"sha256": sha, "crc32": crc}))
    (path / INDEX).write_bytes(index)
    return tuple(files)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
