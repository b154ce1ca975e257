"""`python -m tools.npu_standin --soc a3 -- generate ...`: any v4 command on the stand-in; `build` and `doctor` look after the stand-in itself.

Exit codes are those of the v4 command; 2 when the stand-in can not do what was asked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tools import cli
from tools.npu_standin.chips import CHIPS
from tools.npu_standin.wheel import StandInError


def parser() -> argparse.ArgumentParser:
    """The command line of the stand-in."""
    top = argparse.ArgumentParser(
        prog="python -m tools.npu_standin", description="The ascend backend on a CPU: runs a v4 command, or looks after itself."
    )
    top.add_argument(
        "--soc", choices=[n for c in CHIPS for n in (c.alias, c.family)], default="a3", help="chip to pretend (default a3)"
    )
    top.add_argument(
        "--level",
        choices=("l2", "l3"),
        help="l2: vendor ops on CPU tensors; l3: device npu (default where torch_npu is installed)",
    )
    top.add_argument("--packages", metavar="LIST", help="namespaces beside torch_npu's, comma separated; '' for none")
    top.add_argument(
        "--lacking", metavar="LIST", default="", help="aclnn names that the pretended op package does not have, comma separated"
    )
    top.add_argument("--counts", action="store_true", help="print launches and host waits to stderr afterwards")
    top.add_argument("command", nargs="+", help="build, doctor (of the stand-in), or -- and a v4 command")
    return top


def _build() -> int:
    from tools.npu_standin import cann

    print(cann.build(lambda line: print(line, file=sys.stderr)))
    return cli.PASS


def _doctor() -> int:
    from tools.npu_standin import models, schemas
    from tools.npu_standin.install import has_wheel

    known = models.load()
    print(f"models    {len(known)} vendor ops")
    for space in schemas.FILES:
        names = {line.partition("(")[0] for line in schemas.lines(space)}
        print(f"schemas   {space}: {len(names)}, {len(names & set(known))} with a model")
    if not has_wheel():
        print("torch_npu absent: level l2 only, with schemas from text")
        return cli.PASS
    from tools.npu_standin import aclnn, cann, host, wheel

    where = cann.directory()
    aclnn.load()
    state = "built" if (where / "libopapi.so").is_file() else "not built yet (python -m tools.npu_standin build)"
    print(f"torch_npu {wheel.version()}; libraries {where}: {state}")
    print(f"bridges   {len(host.BRIDGES)} aclnn entry points lead to models")
    return cli.PASS


def _v4(args: argparse.Namespace) -> int:
    from tools.npu_standin import calls
    from tools.npu_standin.install import DEFAULT_PACKAGES, has_wheel, install

    packages = DEFAULT_PACKAGES if args.packages is None else tuple(filter(None, args.packages.split(",")))
    level = args.level or ("l3" if has_wheel() else "l2")
    found = install(args.soc, level, packages=packages, lacking=tuple(filter(None, args.lacking.split(","))))
    os.environ.setdefault("V4_ASCEND_SOC", found.chip.family)
    os.environ.setdefault("V4_ASCEND_DEVICE", found.device.type)
    print(f"stand-in of {found.chip.device}, level {level}: executed on a CPU, not on NPU hardware", file=sys.stderr)
    with calls.recording() as record:
        code = cli.main(args.command)
    if args.counts:
        for name, number in sorted(record.launches().items(), key=lambda item: -item[1]):
            print(f"{number:8d}  {name}", file=sys.stderr)
        for reason, number in sorted(record.waits.items(), key=lambda item: -item[1]):
            print(f"{number:8d}  host wait: {reason}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(given)
    own = {"build": _build, "doctor": _doctor}.get(args.command[0]) if "--" not in given else None
    try:
        return own() if own else _v4(args)
    except (StandInError, ValueError) as error:
        print(f"npu_standin: {error}", file=sys.stderr)
        return cli.COULD_NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
