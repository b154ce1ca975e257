"""The verb `v4 trace`: exit code 0 when nothing is wrong, 1 when something is, 2 when it could not run."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Call the action asked for. Replaying imports neither the model nor what loading one needs."""
    if args.action == "record":
        from tools.trace import record

        return record.run(args)
    if args.action == "bisect":
        from tools.trace import bisect

        return bisect.run(args)
    from tools.trace import replay

    return replay.show(args) if args.action == "show" else replay.run(args)
