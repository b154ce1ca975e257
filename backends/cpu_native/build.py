"""Compiling the kernels of this backend with the machine's C++ compiler, once per sources, flags, processor, Python and torch.

The library lies in the user's cache directory under a name that changes with any of these, so that a library built for another
processor or another torch is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
# no -ffast-math: linked into a shared library it switches off denormals for the whole process
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-pthread", "-shared")


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says what was tried."""


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX, g++, c++ or clang++; None where there is none."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if found := shutil.which(name):
            return found
    return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except FileNotFoundError:
        pass
    return platform.processor()


def cache_directory() -> Path:
    """$V4_CACHE, else v4 below $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("V4_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v4"


def library_path() -> Path:
    """Where the library for these sources, flags, this processor, Python and torch lies once it is built."""
    versions = (torch.__version__, str(sysconfig.get_config_var("SOABI")))
    known = hashlib.sha256("\0".join((platform.machine(), _processor(), *versions, *FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        known.update(source.name.encode() + source.read_bytes())
    return cache_directory() / f"cpu_native-{known.hexdigest()[:16]}.so"


def _torch_flags() -> list[str]:
    """What a module that takes torch's tensors is compiled and linked with. BuildError without Python's headers."""
    python, home = Path(sysconfig.get_paths()["include"]), Path(torch.__file__).parent
    if not (python / "Python.h").is_file():
        raise BuildError(f"no Python.h in {python}; install Python's headers, for instance: apt install python3-dev")
    include = (python, home / "include", home / "include" / "torch" / "csrc" / "api" / "include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [abi, *(f"-isystem{d}" for d in include), f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]


def build() -> Path:
    """Compile when the library is not there yet; returns its path. BuildError without compiler or headers, or when it fails."""
    target = library_path()
    if target.is_file():
        return target
    if (cxx := compiler()) is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++); install one, for instance: apt install g++")
    torch_flags = _torch_flags()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [cxx, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made), *torch_flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
        made.replace(target)
    return target
