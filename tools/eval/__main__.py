"""`python -m tools.eval backends`: needle accuracy and greedy text on every backend and precision mode; exit code 1 where a departure is no near tie."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tools.eval", description=__doc__)
    p = top.add_subparsers(dest="verb", required=True).add_parser("backends", help="one table of all modes")
    p.add_argument("--model", type=Path, default=Path("models/nano"), metavar="DIR")
    p.add_argument("--out", type=Path, default=Path("build/backends"), metavar="DIR", help="reports of single modes; those there are not made again")
    p.add_argument("--modes", default="cpu-fp32,cpu-bf16,cpu-reference", metavar="M,...", help="cpu-fp32 is always run")
    p.add_argument("--ascend-python", metavar="FILE", help="interpreter of an environment with torch_npu (make test-ascend makes .venv-ascend)")
    p.add_argument("--cuda-python", metavar="FILE", help="interpreter of an environment with triton, on a machine with a GPU")
    p.add_argument("--lengths", default="1024")
    p.add_argument("--trials", type=int, default=200)
    p.add_argument("--texts", type=int, default=2, help="stories that are continued greedily")
    p.add_argument("--text-length", type=int, default=320)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--judge", choices=("choices", "all"), default="choices", help="ops whose calls are judged on the stories")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the comparison")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="put the table between the marks of this page")
    return top


def ok(found: dict[str, Any]) -> bool:
    """Whether every departure of every mode is a near tie and no call is wrong."""
    texts = [t for row in found["modes"] for t in row["texts"]]
    tokens = all(t["token"] is None or t["token"]["near"] for t in texts)
    choices = all(t[op]["near"] == t[op]["unlike"] for t in texts for op in ("index_topk", "gate_topk"))
    return tokens and choices and not any(row["wrong"] for row in found["modes"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    from tools import marked
    from tools.eval import backends

    args = parser().parse_args(argv)
    pythons = {"cpu": sys.executable, "ascend": args.ascend_python, "cuda": args.cuda_python}
    plan = backends.Plan(
        args.model, args.out, {k: v for k, v in pythons.items() if v}, args.lengths, args.trials, args.texts, args.text_length,
        args.new_tokens, args.judge,
    )  # fmt: skip
    try:
        found = backends.report(plan, args.modes.split(","))
    except ValueError as error:
        print(f"python -m tools.eval: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = backends.markdown(found["modes"])
    if args.markdown:
        marked.put(args.markdown, backends.MARK, page)
    print(page)
    return 0 if ok(found) else 1


if __name__ == "__main__":
    sys.exit(main())
