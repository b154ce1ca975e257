"""Compiling the kernels of this backend with the machine's own C++ compiler, once per sources, flags and processor.

The library lies in the user's cache directory under a name that changes with any of these, so that a library built for another
processor is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
# no -ffast-math: linked into a shared library it switches off denormals for the whole process
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp", "-shared")


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
    """Where the library for these sources, flags and this processor lies once it is built."""
    known = hashlib.sha256("\0".join((platform.machine(), _processor(), *FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        known.update(source.name.encode() + source.read_bytes())
    return cache_directory() / f"cpu_native-{known.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile when the library is not there yet; returns its path. BuildError without a compiler or when it fails."""
    target = library_path()
    if target.is_file():
        return target
    if (cxx := compiler()) is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++); install one, for instance: apt install g++")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [cxx, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
        made.replace(target)
    return target
