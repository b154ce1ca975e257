"""`python -m backends.cpu_native` compiles the kernels; exit code 0 when they are there, 2 when they can not be built."""

from __future__ import annotations

import argparse
import sys

from backends.cpu_native.build import BuildError, build


def main(argv: list[str] | None = None) -> int:
    """Build and say where the library is; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m backends.cpu_native", description=__doc__)
    parser.add_argument(
        "--optional", action="store_true", help="exit 0 without a compiler too: the cpu backend then runs on torch alone"
    )
    args = parser.parse_args(argv)
    try:
        print(f"cpu_native: {build()}")
    except BuildError as error:
        print(f"cpu_native: not built, {error}\nThe cpu backend runs on torch alone.", file=sys.stderr)
        return 0 if args.optional else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
