"""`python -m tools.nano tokenizer | train | speed | plot | demo | card`: makes the trained nano model from nothing but this repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.runconfig import CONFIGS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tools.nano", description="Train the nano model and export it.")
    verbs = top.add_subparsers(dest="verb", required=True)
    t = verbs.add_parser("tokenizer", help="train the byte-level BPE on the generated data")
    t.add_argument("--vocabulary", type=int, default=1024)
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--out", required=True, metavar="FILE")
    p = verbs.add_parser("train", help="train; writes state, log, and the checkpoint")
    p.add_argument("--config", default=str(CONFIGS / "nano_trained.json"), metavar="FILE")
    p.add_argument("--tokenizer", metavar="FILE", help="default: OUT/tokenizer.json, made first if it is not there")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--steps", type=int, default=6000)
    p.add_argument("--tokens", type=int, default=32768, help="tokens of a batch")
    p.add_argument("--longest", type=int, default=4096, help="cap on the context of every stage")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--peak", type=float, default=3e-3, help="largest learning rate")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of activations")
    p.add_argument("--compiled", action="store_true", help="compile the element-wise parts")
    p.add_argument("--sinkhorn", choices=("torch", "triton"), default="torch")
    p.add_argument("--workers", type=int, default=0, help="processes that make batches")
    p.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="stop after this time; --resume goes on")
    p.add_argument("--probe-trials", type=int, default=64)
    p.add_argument("--resume", metavar="FILE", help="state.pt of an earlier run")
    speed = verbs.add_parser("speed", help="time a few steps of every stage and say how many steps fit into a time")
    for name, default in (("config", str(CONFIGS / "nano_trained.json")), ("device", "cpu"), ("dtype", "float32"), ("sinkhorn", "torch")):
        speed.add_argument(f"--{name}", default=default)
    speed.add_argument("--tokens", type=int, default=32768)
    speed.add_argument("--seconds", type=float, default=500.0)
    speed.add_argument("--compiled", action="store_true")
    speed.add_argument("--profile", action="store_true", help="also print the costliest kernels of a step of every stage")
    plot = verbs.add_parser("plot", help="draw the log's losses and needle accuracy")
    plot.add_argument("--log", required=True, metavar="FILE")
    plot.add_argument("--out", required=True, metavar="PNG")
    demo = verbs.add_parser("demo", help="a story, an answer from far back, and the table of ops; exit code 1 for a wrong answer")
    demo.add_argument("--model", default="models/nano", metavar="DIR")
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="activation type")
    demo.add_argument("--context", type=int, default=4608, metavar="N", help="tokens of the question's context; default: 4608")
    demo.add_argument("--depth", type=float, default=0.2, help="where the answer lies: 0 is the start; default: 0.2")
    demo.add_argument("--story-tokens", type=int, default=96, metavar="N")
    demo.add_argument("--seed", type=int, default=0)
    card = verbs.add_parser("card", help="write README.md, the loss picture, the log and the evaluation into a checkpoint directory")
    card.add_argument("--model", type=Path, default=Path("models/nano"), metavar="DIR")
    card.add_argument("--evaluation", type=Path, nargs="+", required=True, metavar="JSON", help="reports that v4 eval --save wrote")
    card.add_argument("--log", type=Path, required=True, metavar="FILE", help="log.jsonl of the training run")
    card.add_argument("--command", required=True, help="the command that trained it")
    return top


def _tokenizer(vocabulary: int, seed: int, out: str) -> None:
    from tools.nano.tokenizer import train, write

    built = train(vocabulary, seed)
    write(built, out)
    print(f"{out}: {built.get_vocab_size()} tokens")


def _train(args: argparse.Namespace) -> int:
    from tools.nano.train import Settings, Trainer

    values = {k: v for k, v in vars(args).items() if k != "verb"}
    if args.tokenizer is None:
        made = Path(args.out) / "tokenizer.json"
        values["tokenizer"] = str(made)
        if not made.is_file():
            from v4.config import Config

            _tokenizer(Config.from_file(Path(args.config)).vocab_size, args.seed, str(made))
    done = Trainer(Settings(**values)).train()
    print("all steps done" if done else "stopped by --budget; --resume goes on")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        if args.verb == "tokenizer":
            _tokenizer(args.vocabulary, args.seed, args.out)
        elif args.verb == "plot":
            from tools.nano.plot import draw

            draw(args.log, args.out)
        elif args.verb == "card":
            from tools.nano import card

            card.write(args.model, args.evaluation, args.log, args.command)
        elif args.verb == "demo":
            from tools.nano import demo

            return demo.run(args)
        elif args.verb == "speed":
            from tools.nano.speed import report

            report(args)
        else:
            return _train(args)
    except ValueError as error:
        print(f"python -m tools.nano {args.verb}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
