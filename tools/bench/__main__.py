"""`python -m tools.bench cpu | nano | trace | cuda`: exit code 0 after a complete run, 1 after wrong results, 2 when it could not run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tools import marked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    cpu = verbs.add_parser("cpu", help="the CPU backend beside transformers on the same weights")
    cpu.add_argument("--config", default="mini", help="name in configs/ (default: mini)")
    cpu.add_argument("--checkpoint", type=Path, help="checkpoint directory; default: build/bench-<config>, made when absent")
    cpu.add_argument("--sections", default="prefill,decode,long,ops,load", help="comma-separated")
    cpu.add_argument("--quick", action="store_true", help="small sizes, for a look")
    cpu.add_argument("--plot", type=Path, help="write the plot of op times against context here (needs matplotlib)")
    trace = verbs.add_parser("trace", help="what recording the demo's run costs, and how large the trace is")
    trace.add_argument(
        "--model", type=Path, default=Path("build/nano"), help="checkpoint directory; default: build/nano (make demo)"
    )
    trace.add_argument("--prompt", default="Hello! Who are you?")
    trace.add_argument("--tokens", type=int, default=48)
    trace.add_argument("--rounds", type=int, default=5)
    cuda = verbs.add_parser("cuda", help="the Triton kernels of the CUDA backend beside their floors and plain torch")
    cuda.add_argument("--ops", default="", help="comma-separated; default: every op with a kernel")
    cuda.add_argument("--dry-run", action="store_true", help="every path on the CPU, under Triton's interpreter, at tiny sizes")
    cuda.add_argument("--no-baselines", action="store_true", help="without torch eager and torch.compile")
    cuda.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further case is begun; default: none")
    cuda.add_argument("--render", type=Path, help="measure nothing: the tables of a report that --json wrote, perhaps elsewhere")
    nano = verbs.add_parser("nano", help="decode cost of the trained nano model from 1k to 1M tokens, beside transformers")
    nano.add_argument("--checkpoint", type=Path, default=Path("models/nano"), help="default: models/nano")
    nano.add_argument("--contexts", default="", metavar="N,...", help="tokens; default: powers of two from 1024 to 1048576")
    nano.add_argument("--rounds", type=int, default=7)
    nano.add_argument("--longest-step", type=float, default=10.0, metavar="SECONDS", help="of transformers, before it is given up")
    nano.add_argument("--plot", type=Path, help="write the plot here (needs matplotlib)")
    for verb in (cpu, nano, trace, cuda):
        verb.add_argument("--threads", type=int, help="default: what torch chooses")
        verb.add_argument("--json", type=Path, help="write the report here")
        verb.add_argument("--markdown", type=Path, help="put the tables between the marks of this page")
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _publish(args: argparse.Namespace, report: dict[str, Any], mark: str, page: str) -> None:
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        marked.put(args.markdown, mark, page)
    print(page)


def _trace(args: argparse.Namespace) -> int:
    from tools.bench import trace

    try:
        report = trace.measure(args.model, args.prompt, args.tokens, args.rounds, _say)
    except (ValueError, FileNotFoundError) as error:
        print(f"tools.bench: {error}", file=sys.stderr)
        return 2
    _publish(args, report, trace.MARK, trace.markdown(report))
    return 0


def _cuda(args: argparse.Namespace) -> int:
    if args.render:
        from tools.bench import cuda_table

        report = json.loads(args.render.read_text(encoding="utf-8"))
        _publish(args, report, cuda_table.MARK, cuda_table.markdown(report))
        return 1 if report["failed"] else 0
    if args.dry_run:
        # Triton decides when it is imported whether functions are interpreted
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is None:
        print("tools.bench: triton is not installed; pip install -e .[cuda]", file=sys.stderr)
        return 2
    from tools.bench import cuda, cuda_table

    try:
        report = cuda.run([op for op in args.ops.split(",") if op], args.dry_run, _say, not args.no_baselines, args.budget)
    except ValueError as error:
        print(f"tools.bench: {error}", file=sys.stderr)
        return 2
    _publish(args, report, cuda_table.MARK, cuda_table.markdown(report))
    return 1 if report["failed"] else 0


def _nano(args: argparse.Namespace) -> int:
    from tools.bench import nano

    try:
        contexts = [int(n) for n in args.contexts.split(",")] if args.contexts else nano.CONTEXTS
        report = nano.run(args.checkpoint, contexts, args.rounds, args.longest_step, _say)
    except (ValueError, FileNotFoundError) as error:
        print(f"tools.bench: {error}", file=sys.stderr)
        return 2
    if args.plot:
        nano.plot(report, args.plot)
    _publish(args, report, nano.MARK, nano.markdown(report))
    return 0


def _checkpoint(args: argparse.Namespace) -> Path:
    if args.checkpoint:
        return args.checkpoint
    from v4.config import Config
    from v4.make import make

    directory = Path("build") / f"bench-{args.config}"
    if not (directory / "config.json").is_file():
        make(Config.from_file(Path("configs") / f"{args.config}.json"), directory, 0, storage="f32")
    return directory


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.verb == "trace":
        return _trace(args)
    if args.verb == "cuda":
        return _cuda(args)
    for package, wanted in (("transformers", True), ("matplotlib", args.plot is not None)):
        if wanted and importlib.util.find_spec(package) is None:
            print(f"tools.bench: {package} is not installed; pip install -e .[test,dev]", file=sys.stderr)
            return 2
    if args.verb == "nano":
        return _nano(args)
    from tools.bench import cpu, plots, table

    sections = [s for s in args.sections.split(",") if s]
    if unknown := set(sections) - set(cpu.SECTIONS):
        print(f"tools.bench: unknown sections {sorted(unknown)}; known: {', '.join(cpu.SECTIONS)}", file=sys.stderr)
        return 2
    if args.plot and "ops" not in sections:
        print("tools.bench: --plot needs the section ops", file=sys.stderr)
        return 2
    try:
        report = cpu.run(
            _checkpoint(args),
            sections,
            cpu.QUICK if args.quick else cpu.Sizes(),
            _say,
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"tools.bench: {error}", file=sys.stderr)
        return 2
    if args.plot:
        plots.context_plot(report, args.plot)
    _publish(args, report, table.MARK, table.markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
