"""Options of `v4 eval`. Imports nothing."""

from __future__ import annotations

from typing import Any


def _common(p: Any, trials: int) -> None:
    p.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory with a tokenizer")
    p.add_argument("--backend", default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="activation type")
    p.add_argument("--numerics", choices=("exact", "reference", "stored"), default="exact", help="as v4 generate")
    p.add_argument("--ops", metavar="OP=BACKEND,...", help="backend of single ops")
    p.add_argument("--strict", action="store_true", help="no fallback to plain torch")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--trials", type=int, default=trials, metavar="N", help=f"default: {trials}")
    p.add_argument(
        "--plant", action="append", metavar="OP:MUTANT[@PLACE][#STEP]",
        help="put a fault in on purpose; index_topk:random replaces the indexer's choice by random entries",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="one JSON object instead of text")
    p.add_argument("--save", metavar="FILE", help="write the JSON object to a file as well")


def add(verbs: Any) -> None:
    """Add the verb and its three kinds to the command line."""
    top = verbs.add_parser("eval", help="needle retrieval, perplexity and tool calls of a trained model")
    kinds = top.add_subparsers(dest="kind", required=True)
    p = kinds.add_parser("needle", help="share of planted facts found, by context length and depth")
    _common(p, 200)
    p.add_argument("--lengths", default="512,1024,2048,4096", metavar="N,N,...", help="context lengths in tokens")
    p.add_argument("--depths", type=int, default=10, metavar="N", help="depths per length, evenly spaced from start to end")
    p.add_argument("--picture", metavar="PNG", help="draw the heat map (needs matplotlib)")
    p.add_argument("--least", type=float, metavar="SHARE", help="exit code 1 when the accuracy of any length is lower")
    p = kinds.add_parser("perplexity", help="bits per byte of held-out story text, beside a 5-gram model of the same data")
    _common(p, 16)
    p.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of each text")
    p.add_argument("--ngram-tokens", type=int, default=1_000_000, metavar="N", help="training text of the 5-gram model")
    p = kinds.add_parser("drafts", help="accepted drafts on stories, and whether speculative text is the greedy one")
    _common(p, 16)
    p.add_argument("--drafts", type=int, default=1, metavar="N", help="tokens drafted per step; default: 1")
    p.add_argument("--length", type=int, default=128, metavar="N", help="tokens of story before the text begins; default: 128")
    p.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens written for each; default: 128")
    p.add_argument("--batch-invariant", action="store_true", help="a token's numbers do not depend on how many are computed at a time")
    p.add_argument("--least", type=float, metavar="SHARE", help="exit code 1 when fewer drafts are accepted, or any text is not the greedy one")
    p = kinds.add_parser("greedy", help="greedy text, and every choice on the way to it held against its certificate; for comparing backends")
    _common(p, 2)
    p.add_argument("--length", type=int, default=512, metavar="N", help="tokens of story before the text begins; default: 512")
    p.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens written for each; default: 64")
    p.add_argument("--follow", metavar="FILE", help="report of another run: its text is fed to this model besides, for comparison step by step")
    p.add_argument("--tensors", metavar="FILE", help="write logits and choices of the text that was followed")
    p.add_argument("--judge", choices=("choices", "all"), default="choices", help="ops whose calls are judged; default: choices")
    p = kinds.add_parser("tools", help="share of well-formed and of right tool calls")
    _common(p, 100)
