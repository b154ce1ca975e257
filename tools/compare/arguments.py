"""Options of `v4 compare`. Imports nothing, so that the command line can be parsed where nothing is installed."""

from __future__ import annotations

from typing import Any

THRESHOLD = 0.5
WAYS = ("auto", "echo", "prompt-logprobs", "generate", "steps")


def add(verbs: Any) -> None:
    """Add the verb to the sub-parsers of `v4`."""
    p = verbs.add_parser(
        "compare",
        help="at which token another deployment departs from ours",
        description="Teacher-force prompts through an OpenAI-compatible endpoint and through our model; compare log-probabilities "
        "token by token. Exit codes: 0 within the threshold, 1 beyond it, 2 could not run (or the endpoint failed on the way).",
    )
    p.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory of our side")
    p.add_argument("--against", required=True, metavar="URL", help="endpoint, such as http://localhost:8000/v1")
    p.add_argument(
        "--prompts", metavar="FILE", help=".jsonl (text, messages or ids a line) or .txt (a text a line); default: built in"
    )
    p.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    p.add_argument("--name", metavar="MODEL", help="the model's name at the endpoint; default: the one that it lists")
    p.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the API key")
    p.add_argument(
        "--top-logprobs", type=int, default=5, metavar="N", help="likeliest tokens asked for at each position; default: 5"
    )
    p.add_argument(
        "--threshold", type=float, default=THRESHOLD, metavar="NAT", help=f"difference that counts; default: {THRESHOLD}"
    )
    p.add_argument("--yardstick", action="store_true", help="also how far our own float32 and bfloat16 lie apart")
    p.add_argument("--way", choices=WAYS, default="auto", help="how the endpoint is asked; default: the first way that works")
    p.add_argument("--stride", type=int, metavar="N", help="where only generation works: one request at every Nth token")
    p.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for one request; default: 120")
    p.add_argument("--retries", type=int, default=2, metavar="N", help="further tries of a failed request; default: 2")
    p.add_argument("--backend", help="default: cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="activation type; default: bfloat16")
    p.add_argument("--numerics", choices=("exact", "reference"), help="reference: with the official FP8/FP4 round trips")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    p.add_argument("--out", metavar="FILE", help="write the JSON object here, after every prompt")
    p.add_argument("--overwrite", action="store_true", help="let --out replace a file")
