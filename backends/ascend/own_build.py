"""Compiling the torch half of this project's own CANN ops (csrc/torch_half) with the machine's C++ compiler, once per sources and versions.

`python -m backends.ascend` does it. Needs torch_npu's headers, no CANN. The kernel half
(csrc/op_host, csrc/op_kernel) is built on a node with CANN, see docs/ascend.md.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc") / "torch_half"
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared", "-pthread")
HEADERS = ("include", "include/third_party/acl/inc", "include/third_party/hccl/inc")


class BuildError(RuntimeError):
    """The torch half could not be compiled; the message says what was tried."""


def _cache() -> Path:
    if chosen := os.environ.get("V4_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v4"


def _torch_npu() -> str:
    try:
        return version("torch_npu")
    except PackageNotFoundError:
        return "absent"


def library_path() -> Path:
    """Where the library for these sources, this processor, Python, torch and torch_npu lies once it is built."""
    versions = (torch.__version__, _torch_npu(), str(sysconfig.get_config_var("SOABI")), sys.prefix)
    known = hashlib.sha256("\0".join((platform.machine(), *versions, *FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        known.update(source.name.encode() + source.read_bytes())
    return _cache() / f"ascend_own-{known.hexdigest()[:16]}.so"


def _linked() -> list[str]:
    """Include and link flags. BuildError without torch_npu or Python's headers."""
    # not imported: without CANN's libraries that fails, and headers are enough
    spec = find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise BuildError("torch_npu is not installed: its headers are needed")
    npu, home, python = Path(spec.origin).parent, Path(torch.__file__).parent, Path(sysconfig.get_paths()["include"])
    include = [python, home / "include", home / "include/torch/csrc/api/include", *(npu / h for h in HEADERS)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{home / 'lib'}", f"-L{npu / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_npu"]
    # libraries of CANN behind torch_npu are found by whoever loads it
    return [abi, *(f"-isystem{d}" for d in include), *libraries, "-Wl,--allow-shlib-undefined"]


def build() -> Path:
    """Compile when the library is not there yet; returns its path. BuildError without compiler or headers, or when it fails."""
    target = library_path()
    if target.is_file():
        return target
    cxx = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")))), None)
    if cxx is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++); install one, for instance: apt install g++")
    linked = _linked()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [cxx, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made), *linked]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
        made.replace(target)
    return target
