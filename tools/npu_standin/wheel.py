"""What the installed torch_npu asks of CANN, read from its files without importing it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# brought by the system, torch or Python
_PROVIDED = re.compile(r"(lib(torch|c10|stdc\+\+|m\.|gcc_s|pthread|c\.|dl\.|rt\.|python|shm)|ld-linux|linux-vdso)")
# names that torch_npu looks up with dlsym; they stand as text in its main library
_LOOKED_UP = re.compile(rb"(?<![ -~])((?:acl(?:rt|mdl|op|prof|sys|sk|nn)?[A-Z]|Hccl)[A-Za-z0-9_]+)\0")


class StandInError(RuntimeError):
    """The stand-in can not be built or loaded here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Wants:
    """`libraries`: sonames of CANN that the wheel is linked with. `symbols`: names to be defined. `aclnn`: its aclnn entry points."""

    version: str
    libraries: tuple[str, ...]
    symbols: frozenset[str]
    aclnn: frozenset[str]


def version() -> str:
    """Version of the installed torch_npu. StandInError when it is absent."""
    try:
        return distribution("torch_npu").version
    except PackageNotFoundError:
        message = "torch_npu is not installed in this environment; make test-ascend sets one up, and level l2 works without it"
        raise StandInError(message) from None


def _folder(package: str) -> Path:
    try:
        found = Path(str(distribution(package).locate_file(package)))
    except PackageNotFoundError:
        raise StandInError(f"{package} is not installed in this environment") from None
    if not found.is_dir():
        raise StandInError(
            f"{package}: found no folder {found}; expected the unpacked wheel (an editable installation has no libraries)"
        )
    return found


def _tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise StandInError(f"{command[0]} was not found; install gcc and binutils, for instance: apt install gcc binutils")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _symbols(library: Path, *, undefined: bool) -> Iterator[str]:
    """Names that a library defines, or those that it needs and are not weak."""
    for line in _tool("nm", "-D", str(library)).splitlines():
        kind, name = line.split()[-2:]
        if (kind == "U") if undefined else (kind not in "Uwv"):
            yield name.split("@")[0]


def _system_libraries() -> Iterator[Path]:
    for name in ("libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"):
        found = Path(_tool("gcc", f"-print-file-name={name}").strip())
        if found.is_file():
            yield found


def examine(progress: Callable[[str], None]) -> Wants:
    """Read every shared library of the wheel: what it is linked with, what it leaves undefined, what it looks up by name."""
    found_version, home, torch_home = version(), _folder("torch_npu"), _folder("torch")
    own = [p for p in sorted(home.rglob("*.so*")) if p.is_file() and not p.is_symlink()]
    main = home / "lib" / "libtorch_npu.so"
    if main not in own:
        raise StandInError(f"torch_npu {found_version}: found no {main}; is it a wheel for Linux?")
    defined: set[str] = set()
    for library in (*own, *sorted((torch_home / "lib").glob("*.so*")), *_system_libraries()):
        defined.update(_symbols(library, undefined=False))
    wanted: set[str] = set()
    needed: set[str] = set()
    for number, library in enumerate(own):
        progress(f"reading {library.name} ({number + 1} of {len(own)})")
        wanted.update(s for s in _symbols(library, undefined=True) if not s.startswith(("Py", "_Py")))
        needed.update(re.findall(r"\(NEEDED\).*\[(.+)\]", _tool("readelf", "-d", str(library))))
    names = {m.decode() for m in _LOOKED_UP.findall(main.read_bytes())}
    libraries = needed - {p.name for p in own}
    return Wants(
        found_version,
        tuple(sorted(n for n in libraries if not _PROVIDED.match(n))),
        frozenset((wanted - defined) | {n for n in names if not n.startswith("aclnn")}),
        frozenset(n for n in names if n.startswith("aclnn")),
    )
