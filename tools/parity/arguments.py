"""The command line of `v4 parity`; imports nothing but the standard library."""

from __future__ import annotations

from typing import Any


def add(verbs: Any) -> None:
    """Add the verb to the sub-parsers of `v4`."""
    p = verbs.add_parser(
        "parity", help="judge backends op by op against float64", description="Judge every op of the backends against float64."
    )
    p.add_argument("--backend", action="append", metavar="NAME,...", help="default: every backend that can run here")
    p.add_argument("--against", metavar="NAME", help="judge this backend on the same cases too, to compare")
    p.add_argument("--op", action="append", metavar="OP,...", help="default: every op")
    p.add_argument("--dtype", action="append", metavar="TYPE,...", help="fp32, bf16, fp16; default: fp32,bf16")
    p.add_argument("--soc", action="append", metavar="CHIP,...", help="only these chips of backends that know several")
    p.add_argument(
        "--samples", type=int, default=1, metavar="N", help="at least N cases per op, backend, type and chip (whole seeds)"
    )
    p.add_argument("--min-cases", type=int, default=1, metavar="N", help="fail when fewer cases are judged in all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--sample", metavar="NAME", help="only the sample of this name, of one seed")
    p.add_argument("--plant", metavar="OP:MUTANT", help="put a fault into the backend, to see it found")
    p.add_argument(
        "--mutant-seeds", type=int, default=1, metavar="N", help="seeds on which the judge must reject every mutant; default 1"
    )
    p.add_argument(
        "--legal-seeds", type=int, default=1, metavar="N", help="seeds on which it must accept every legal variant; default 1"
    )
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the work; 0: one per core; default 1")
    p.add_argument("--threads", type=int, metavar="N", help="torch threads of each process; default 1")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="machine form, to FILE or instead of the text")
    p.add_argument("--html", metavar="FILE", help="one self-contained page")
    p.add_argument("--markdown", metavar="FILE", help="put the counts by op between the marks of this page")
    p.add_argument("--overwrite", action="store_true", help="replace files that are there")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
