"""`python -m backends.ascend` compiles the torch half of this project's own CANN ops; exit code 0 when it is there, 2 when it can not be built."""

from __future__ import annotations

import argparse
import sys

from backends.ascend.own_build import BuildError, build


def main(argv: list[str] | None = None) -> int:
    """Build and say where the library is; returns the exit code."""
    argparse.ArgumentParser(prog="python -m backends.ascend", description=__doc__).parse_args(argv)
    try:
        print(f"torch half of the own ops: {build()}")
    except BuildError as error:
        print(f"torch half of the own ops: not built, {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
