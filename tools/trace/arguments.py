"""The command line of `v4 trace`; imports nothing but the standard library."""

from __future__ import annotations

from typing import Any

from tools import generation_arguments

LIMIT_MIB = 256


def _selection(p: Any, what: str) -> None:
    p.add_argument("--places", metavar="P,...", help=f"{what} these parts only: layers (3 or 0-5), head, mtp.0; default: all")
    p.add_argument("--only", metavar="OP,...", help=f"{what} these ops only; default: all")
    p.add_argument(
        "--steps", metavar="N,...", help=f"{what} these forward passes only (0 is the first of the prompt; 0-2,5); default: all"
    )


def _trace(p: Any) -> None:
    p.add_argument("--partial", action="store_true", help="accept a trace that was cut off, as far as it goes")
    p.add_argument("--checkpoint", metavar="DIR", help="the model's checkpoint, for a trace recorded with --no-weights")


def add(verbs: Any) -> None:
    """Add the verb to the sub-parsers of `v4`."""
    top = verbs.add_parser("trace", help="which op is wrong first: record a run, replay it elsewhere, find the first wrong call")
    actions = top.add_subparsers(dest="action", required=True)

    record = actions.add_parser(
        "record",
        help="generate, and write down every op call",
        description="Generate as `v4 generate` does and write every op call to a folder: checksums always, tensors of chosen calls.",
    )
    generation_arguments.add(record)
    record.add_argument("--out", required=True, metavar="DIR", help="folder of the trace")
    _selection(record, "keep the tensors of")
    record.add_argument("--no-tensors", action="store_true", help="checksums only")
    record.add_argument("--no-weights", action="store_true", help="leave parameters out; a replay then needs the checkpoint")
    record.add_argument(
        "--limit-mib",
        type=float,
        default=LIMIT_MIB,
        metavar="MIB",
        help=f"most tensors kept, in MiB; calls beyond it keep checksums only; default: {LIMIT_MIB}",
    )
    record.add_argument("--overwrite", action="store_true", help="replace a trace that is there")

    replay = actions.add_parser(
        "replay",
        help="run recorded calls on a backend of this machine and judge both",
        description="Judge what was recorded, and what a backend of this machine computes from the same inputs, call by call.",
    )
    replay.add_argument("trace", metavar="DIR")
    replay.add_argument("--backend", default="cpu", help="default: cpu")
    replay.add_argument("--strict", action="store_true", help="no fallback to plain torch")
    replay.add_argument("--ops", metavar="OP=BACKEND,...", help="backend of single ops")
    replay.add_argument(
        "--plant", action="append", metavar="OP:MUTANT[@PLACE][#STEP]", help="put a fault into the replay on purpose"
    )
    _selection(replay, "replay")
    _trace(replay)

    bisect = actions.add_parser(
        "bisect",
        help="name the first wrong call of a trace or of a run",
        description="Name the first call that is above its bound, or whose argument changed since it was computed: of a recorded trace "
        "(--trace), or of a run that is judged while it goes. Where every call is right by itself, ops are swapped one at a time.",
    )
    generation_arguments.add(bisect)
    bisect.add_argument("--trace", metavar="DIR", help="look at this trace instead of running the model")
    bisect.add_argument("--against", default="cpu", metavar="BACKEND", help="backend to swap ops with; default: cpu, plain torch")
    bisect.add_argument("--no-swap", action="store_true", help="do not swap ops when every call is right by itself")
    bisect.add_argument("--all", action="store_true", help="list every wrong call instead of stopping at the first")
    _selection(bisect, "judge")
    _trace(bisect)

    show = actions.add_parser("show", help="what a trace holds")
    show.add_argument("trace", metavar="DIR")
    show.add_argument("--partial", action="store_true", help="accept a trace that was cut off")
    for action in (record, replay, bisect, show):
        action.add_argument("--json", action="store_true", help="one JSON object instead of text")
