"""Runs `v4 eval`; the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def missed(found: dict[str, Any], least: float) -> list[str]:
    """What of a report lies below `least`, in words."""
    if found["kind"] == "needle":
        return [f"accuracy below {least:.0%} at {row['length']} tokens" for row in found["lengths"] if row["accuracy"] < least]
    complaints = [f"fewer than {least:.0%} of drafts accepted"] if found["accepted"] < least else []
    return complaints + (["speculative text that is not the greedy one"] if found["differences"] else [])


def run(args: argparse.Namespace) -> int:
    """The verb; 1 when `--least` is not reached."""
    from tools.eval import calls, drafts, greedy, needle, perplexity

    if getattr(args, "picture", None):
        # missing, it is better missed before the run than after it
        import matplotlib  # noqa: F401
    kind: Any = {"needle": needle, "perplexity": perplexity, "drafts": drafts, "greedy": greedy, "tools": calls}[args.kind]
    for plant in args.plant or ():
        print(f"v4 eval: planted fault {plant}", file=sys.stderr)
    found = kind.report(args)
    if args.save:
        Path(args.save).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1) if args.json else kind.text(found))
    if getattr(args, "picture", None):
        needle.draw(found["lengths"], args.picture)
    if found["kind"] == "greedy" and found["wrong"]:
        print(f"v4 eval: {len(found['wrong'])} calls are wrong", file=sys.stderr)
        return 1
    least = getattr(args, "least", None)
    complaints = missed(found, least) if least is not None else []
    for line in complaints:
        print(f"v4 eval: {line}", file=sys.stderr)
    return 1 if complaints else 0
