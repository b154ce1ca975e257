"""Building stand-ins for the CANN libraries that the installed torch_npu is linked with. No file of CANN is used.

The libraries lie in the user's cache under a name that changes with the wheel, the sources here and the machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path

from tools.npu_standin.wheel import StandInError, Wants, examine, version

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-w", "-O1", "-fPIC", "-pthread")
# what would pretend to have computed something: refused, so that nothing silently leaves poison behind
_REFUSED = re.compile(
    r"Hccl(AllReduce|AllGather|ReduceScatter|Reduce|Broadcast|Scatter|AlltoAll|Send|Recv|BatchSendRecv)|aclop(CompileAndExecute|Execute)"
    r"|aclmdlExecute|aclrtLaunch|rtKernelLaunch|_ZN3atb15CreateOperation"
)
_REFUSAL = 5
WORKSPACE = "GetWorkspaceSize"


def cache_directory() -> Path:
    """$V4_CACHE, else v4 below $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("V4_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v4"


def directory(without: Collection[str] = ()) -> Path:
    """Where the libraries for the installed wheel lie once they are built. StandInError without torch_npu."""
    known = hashlib.sha256("\0".join((platform.machine(), version(), sys.prefix, *FLAGS, *sorted(without))).encode())
    for source in (*sorted(SOURCES.iterdir()), Path(__file__), Path(__file__).with_name("wheel.py")):
        known.update(source.name.encode() + source.read_bytes())
    return cache_directory() / f"npu_standin-{known.hexdigest()[:16]}"


def gcc(*arguments: str, where: Path) -> None:
    """Run gcc in a directory. StandInError with its words when it fails."""
    done = subprocess.run(("gcc", *FLAGS, *arguments), cwd=where, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StandInError(f"gcc {' '.join(arguments)} failed in {where}:\n{done.stderr.strip()[-2000:]}")


def _defined(objects: Iterable[str], where: Path) -> set[str]:
    listing = subprocess.run(
        ("nm", "-g", "--defined-only", *objects), cwd=where, capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1] for line in listing.splitlines() if len(line.split()) == 3}


def _answers(names: Iterable[str]) -> str:
    """C source in which each name is a function that reports success, or refuses when it would have computed something."""
    return "".join(f"long {n}(void) {{ return {_REFUSAL if _REFUSED.match(n) else 0}; }}\n" for n in sorted(names))


def entries(names: Iterable[str]) -> str:
    """Assembly in which every first phase jumps to the trampoline with its name and every second phase only counts.

    What is neither refuses: a question to which nothing here has an answer.
    """
    lines, known = [".text"], set(names)
    for number, name in enumerate(sorted(known)):
        lines.append(f".globl {name}\n.type {name}, @function\n{name}:")
        if name.endswith(WORKSPACE):
            lines.append(f"leaq .Lname{number}(%rip), %r11\njmp standin_trampoline")
            lines.append(f'.section .rodata\n.Lname{number}: .string "{name.removesuffix(WORKSPACE)}"\n.text')
        else:
            lines.append(f"jmp {'standin_launch' if name + WORKSPACE in known else 'standin_unanswered'}@PLT")
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def _compile(wants: Wants, where: Path, progress: Callable[[str], None]) -> None:
    for source in SOURCES.iterdir():
        shutil.copy(source, where)
    progress("compiling descriptors and runtime")
    for compiled in ("acl.c", "opapi.c", "trampoline_x86_64.S"):
        gcc("-c", compiled, where=where)
    here = _defined(("acl.o", "opapi.o"), where)
    (where / "answers.c").write_text(_answers(wants.symbols - here), encoding="utf-8")
    (where / "entries.S").write_text(entries(wants.aclnn - here), encoding="utf-8")
    (where / "empty.c").write_text("", encoding="utf-8")
    progress(f"compiling {len(wants.symbols - here)} answers and {len(wants.aclnn - here)} aclnn entries")
    linked = ("-shared", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN")
    gcc(*linked, "-Wl,-soname,libascendcl.so", "-o", "libascendcl.so", "acl.o", "answers.c", where=where)
    for name in wants.libraries:
        if name != "libascendcl.so":  # dlsym on the handle of any of them must find the names
            gcc(*linked, f"-Wl,-soname,{name}", "-o", name, "empty.c", "libascendcl.so", where=where)
    opapi = ("opapi.o", "trampoline_x86_64.o", "entries.S")
    gcc(*linked, "-Wl,-soname,libopapi.so", "-o", "libopapi.so", *opapi, where=where)


def build(progress: Callable[[str], None] = lambda _: None, without: Collection[str] = ()) -> Path:
    """Build the libraries when they are not there yet; returns their directory. `without`: aclnn ops that the pretended package lacks.

    StandInError: no torch_npu, no compiler, another processor than x86-64, or a step that fails.
    """
    target = directory(without)
    if (target / "libopapi.so").is_file():
        return target
    if platform.machine() != "x86_64":
        raise StandInError(
            f"the stand-in's way into Python is written for x86_64; found {platform.machine()}: level l2 works everywhere"
        )
    if shutil.which("gcc") is None:
        raise StandInError("no gcc found; it builds the stand-in libraries: install it, for instance: apt install gcc")
    wants = examine(progress)
    gone = frozenset(name + end for name in without for end in ("", WORKSPACE))
    wants = replace(wants, aclnn=wants.aclnn - gone)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _compile(wants, Path(scratch), progress)
        built = Path(scratch) / "libraries"
        built.mkdir()
        for library in Path(scratch).glob("*.so"):
            library.rename(built / library.name)
        try:
            built.rename(target)
        except OSError:  # another process built the same meanwhile
            if not (target / "libopapi.so").is_file():
                raise
    progress(f"{len(wants.libraries) + 1} libraries in {target}")
    return target
