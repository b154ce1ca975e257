"""Triton kernels compiled ahead of time for sm_90a on any machine: registers, spills, shared memory and matrix instructions.

`python -m tools.cuda_aot` prints the table; `--markdown PAGE` puts it between the marks of a page; `--check` compares it with the page
instead, and fails on a difference, on a spill that is not in ALLOWED_SPILLS and on more shared memory than a multiprocessor has.

The adapters are called on meta tensors of real widths, so what is compiled is what they would launch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.contract import CONTRACTS
from ops.registry import load_backend
from tools import marked
from tools.cuda_aot_calls import calls

MARK = "kernels"
SHARED_LIMIT = 227 * 1024
MATRIX = ("QGMMA", "HGMMA", "HMMA")
COPIES = ("UTMALDG", "LDGSTS")

ALLOWED_SPILLS: dict[str, int] = {
    # 64 rows a step: on an H100 faster by a quarter than 32 rows without spills (docs/performance.md)
    "sparse_attention, chosen entries, decode T=128": 72,
    "sparse_attention, chosen entries, prefill T=4096": 72,
    "sparse_attention, chosen entries, 128 heads, decode T=128": 72,
    "sparse_attention, chosen entries packed, decode T=128": 160,
    # two sums of 128 x 128; faster than 64 rows without spills (docs/performance.md)
    "grouped_experts_fp4, T=4096": 32,
    # 32 rows a step; the sums of 64 heads x 512 channels take half of the registers
    "sparse_attention, all entries, decode T=128": 16,
    # 64 rows a step and two stages: faster by a sixth (docs/performance.md)
    "sparse_attention, all entries, prefill T=4096": 120,
}
"""Call -> bytes of a thread's stack that are known."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel. `spills`: bytes of stack a thread; `matrix`, `copies`: kinds found in the machine code."""

    kernel: str
    call: str
    grid: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    matrix: str
    copies: str

    def markdown(self) -> str:
        """The table's row."""
        shared = f"{self.shared / 1024:.1f}"
        return (
            f"| {self.kernel} | {self.call} | {self.grid} | {self.warps} | {self.stages} | {self.registers} | {self.spills} | {shared} | "
            f"{self.matrix} | {self.copies} |"
        )


class _Hopper:
    """What Triton asks a driver for when it compiles."""

    def get_current_target(self) -> Any:
        """The chip to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@contextmanager
def compiling(found: list[tuple[str, tuple[int, ...], Any]]) -> Iterator[None]:
    """Inside, a launch compiles its kernel for Hopper and launches nothing; (name, grid, compiled kernel) are appended to `found`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, grid, kernel))
        return kernel

    active = driver._active
    driver.set_active(_Hopper())
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = active


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def _kinds(code: str, names: Sequence[str]) -> str:
    return ", ".join(n for n in names if re.search(rf"\b{n}\b", code)) or "-"


def read(kernel: str, call: str, grid: tuple[int, ...], compiled: Any) -> Row:
    """Facts of one compiled kernel, from its machine code. ValueError when the disassembler's output has no usage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = _tool("cuobjdump", "-res-usage", str(path)), _tool("nvdisasm", str(path))
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"{kernel}: cuobjdump printed no resource usage: {usage.strip()}")
    facts = compiled.metadata
    return Row(
        kernel, call, " x ".join(map(str, grid)), facts.num_warps, facts.num_stages, int(match[1]), int(match[2]), facts.shared,
        _kinds(code, MATRIX), _kinds(code, COPIES),
    )  # fmt: skip


def table(ops: Sequence[str] = ()) -> list[Row]:
    """A row per kernel and call, in order; a kernel compiled before with the same facts is not repeated."""
    load_backend("cuda_triton")
    rows: list[Row] = []
    for call in calls():
        if ops and call.op not in ops:
            continue
        impl = CONTRACTS[call.op].impls["cuda_triton"]
        found: list[tuple[str, tuple[int, ...], Any]] = []
        if impl.when is None or not impl.when(*call.args, **call.kwargs):
            raise ValueError(f"{call.op}, {call.name}: the shape rule refuses it")
        with compiling(found):
            impl.fn(*call.args, **call.kwargs)
        for kernel, grid, compiled in found:
            rows.append(read(f"{impl.fn.__module__.rsplit('.', 1)[-1]}.{kernel}", f"{call.op}, {call.name}", grid, compiled))
            print(rows[-1].markdown(), file=sys.stderr, flush=True)
    return rows


def complaints(rows: Sequence[Row]) -> list[str]:
    """What is wrong with the rows by themselves."""
    found = []
    for r in rows:
        if r.spills > ALLOWED_SPILLS.get(r.call, 0):
            found.append(f"{r.kernel} ({r.call}): {r.spills} bytes of spills, allowed {ALLOWED_SPILLS.get(r.call, 0)}")
        if r.shared > SHARED_LIMIT:
            found.append(f"{r.kernel} ({r.call}): {r.shared} bytes of shared memory, a multiprocessor has {SHARED_LIMIT}")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table with the versions it was made with."""
    import triton

    lines = [
        f"Compiled for sm_90a with triton {triton.__version__}.",
        "",
        "| kernel | call | programs | warps | stages | registers | spilled bytes | shared KB | matrix instruction | asynchronous copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(r.markdown() for r in rows),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, compare; 0 when nothing is wrong, 1 otherwise, 2 without Triton."""
    options = argparse.ArgumentParser(prog="python -m tools.cuda_aot", description=__doc__)
    options.add_argument("--ops", default="", help="comma-separated; default: all")
    options.add_argument("--markdown", type=Path, help="the page that holds the table")
    options.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    args = options.parse_args(argv)
    if args.check and args.markdown is None:
        options.error("--check needs --markdown")
    try:
        rows = table([op for op in args.ops.split(",") if op])
    except ModuleNotFoundError as error:
        print(f"tools.cuda_aot: {error}; pip install -e .[cuda]", file=sys.stderr)
        return 2
    page, wrong = markdown(rows), complaints(rows)
    if args.check:
        text = args.markdown.read_text(encoding="utf-8")
        missing = [line for line in page.splitlines() if line not in text]
        wrong += [f"not in {args.markdown}: {line}" for line in missing]
    elif args.markdown:
        marked.put(args.markdown, MARK, page)
    else:
        print(page)
    for line in wrong:
        print(f"FAIL {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
