"""`v4 doctor`: machine, versions, backends, and the implementation every op would use, with the reasons of those refused.

Imports nothing but the standard library, torch and this project's ops, so that it can report what is missing.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ops.contract import CONTRACTS
from ops.registry import NoImplementation, bind, chain_of, load_backend, unavailable

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "pyyaml", "tqdm", "transformers", "triton", "torch_npu")


def machine() -> dict[str, Any]:
    """System, processor count, memory in bytes and accelerators that torch sees."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "devices": devices,
        "python": platform.python_version(),
        "v4_ops": os.environ.get("V4_OPS", ""),
    }


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters, None when absent; nothing is imported."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            # the package's own number lacks the build (+cu130), which decides what runs
            found[package] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def backend_state(name: str) -> dict[str, Any]:
    """{name, available, reason, device, soc, versions} of one backend."""
    try:
        probe, why = load_backend(name).probe(), unavailable(name)
    except ImportError as error:
        absent: dict[str, Any] = {"device": None, "soc": None, "versions": {}}
        return {"name": name, "available": False, "reason": f"can not be imported: {error}", **absent}
    if why is not None:
        return {"name": name, "available": False, "reason": why, "device": probe.device, "soc": None, "versions": dict(probe.versions)}
    found = {"device": probe.device, "soc": probe.soc, "versions": dict(probe.versions)}
    return {"name": name, "available": True, "reason": "", **found}


def op_rows(backend: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per op: {op, used, notes}; `used` is empty when the backend, with the one in front of or behind it, can not run it."""
    rows = []
    chain = chain_of(backend, strict=True)
    for op in sorted(CONTRACTS):
        try:
            choice = next(c for c in bind(chain, dtype=dtype, only=[op]).choices if c.op == op)
            rows.append(choice.as_dict())
        except NoImplementation as error:
            reasons = (line.split(maxsplit=1) for line in str(error).splitlines()[1 : 1 + len(chain)])
            rows.append({"op": op, "used": [], "notes": dict(reasons)})
    return rows


def report(backend: str | None, dtype: str) -> dict[str, Any]:
    """{machine, versions, backends, ops, ok}; `ops` maps backend to rows. ok: every op runs on every backend looked at.

    ValueError for an unknown backend.
    """
    known = importlib.import_module("backends").NAMES
    states = [backend_state(name) for name in ([backend] if backend else known)]
    ops = {s["name"]: op_rows(s["name"], getattr(torch, dtype)) for s in states if s["available"]}
    complete = all(row["used"] for rows in ops.values() for row in rows)
    ok = bool(ops) and complete and (backend is None or states[0]["available"])
    return {"machine": machine(), "versions": versions(), "dtype": dtype, "backends": states, "ops": ops, "ok": ok}


def _note(row: dict[str, Any], backend: str) -> str:
    note = row["notes"].get(backend, "")
    return note if row["used"] in ([], [backend]) else f"{note} ({' -> '.join(row['used'])})"


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    m = found["machine"]
    memory = f"{m['memory_bytes'] / 2**30:.1f} GiB" if m["memory_bytes"] else "memory unknown"
    lines = [
        f"machine   {m['system']}, {m['cpus']} CPUs ({m['threads']} threads), {memory}",
        f"devices   {', '.join(m['devices']) or 'none seen by torch'}",
        f"python    {m['python']} ({sys.executable})",
        "packages  " + ", ".join(f"{name} {v or 'absent'}" for name, v in found["versions"].items()),
    ]
    if m["v4_ops"]:
        lines.append(f"V4_OPS    {m['v4_ops']}")
    lines.append("")
    for state in found["backends"]:
        lines.append(f"backend {state['name']:<16s} {'available' if state['available'] else 'not available: ' + state['reason']}")
    width = max((len(op) for op in CONTRACTS), default=2)
    for name, rows in found["ops"].items():
        bad = sum(not row["used"] for row in rows)
        lines += ["", f"ops on {' -> '.join(chain_of(name, strict=True))}, {found['dtype']}: {len(rows) - bad} of {len(rows)} implemented"]
        lines += [f"  {row['op']:<{width}s}  {'ok' if row['used'] else 'MISSING'}  {_note(row, name)}" for row in rows]
    lines += ["", "every op has an implementation" if found["ok"] else "something is missing: see the reasons above"]
    return "\n".join(lines)
