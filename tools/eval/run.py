"""Runs `v4 eval`; the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """The verb; 1 when `--least` is not reached."""
    from tools.eval import calls, needle, perplexity

    if getattr(args, "picture", None):
        # missing, it is better missed before the run than after it
        import matplotlib  # noqa: F401
    kind = {"needle": needle, "perplexity": perplexity, "tools": calls}[args.kind]
    for plant in args.plant or ():
        print(f"v4 eval: planted fault {plant}", file=sys.stderr)
    found = kind.report(args)
    if args.save:
        Path(args.save).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1) if args.json else kind.text(found))
    if args.kind != "needle":
        return 0
    if args.picture:
        needle.draw(found, args.picture)
    low = [row["length"] for row in found["lengths"] if args.least is not None and row["accuracy"] < args.least]
    if low:
        print(f"v4 eval: accuracy below {args.least:.0%} at {', '.join(map(str, low))} tokens", file=sys.stderr)
    return 1 if low else 0
