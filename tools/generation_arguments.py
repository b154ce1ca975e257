"""Options that say what is to be generated and how: of `v4 generate`, and of the verbs that watch such a run. Imports nothing."""

from __future__ import annotations

from typing import Any


def add(p: Any) -> None:
    """Add the options to a parser."""
    source = p.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", help="one user message, put into the model's chat format (see --raw)")
    source.add_argument("--chat", metavar="FILE", help="JSON: OpenAI messages, or {messages, tools, response_format}")
    source.add_argument("--ids", metavar="N,N,...", help="token ids, for checkpoints without a tokenizer")
    p.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without the chat format")
    p.add_argument("--thinking", action="store_true", help="thinking mode")
    p.add_argument("--effort", help="thinking level of the checkpoint's release; implies --thinking")
    p.add_argument("--config", metavar="RUN.yaml", help="run file; options given here win over it")
    p.add_argument("--model", metavar="DIR", help="checkpoint directory")
    p.add_argument("--backend", help="default: cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="activation type; default: bfloat16")
    p.add_argument("--numerics", choices=("exact", "reference", "stored"),
                   help="reference: with the official FP8/FP4 round trips; stored: products as the weights are stored")  # fmt: skip
    p.add_argument("--max-new-tokens", type=int, metavar="N")
    p.add_argument("--temperature", type=float, help="0 (default): greedy")
    p.add_argument("--top-p", type=float)
    p.add_argument("--top-k", type=int)
    p.add_argument("--seed", type=int)
    p.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    p.add_argument("--ops", metavar="OP=BACKEND,...", help="backend of single ops")
    p.add_argument("--batch-invariant", action="store_true", default=None, help="results do not depend on what else runs")
    p.add_argument("--checked", action="store_true", default=None, help="hold every op call to its contract and to the vendor's limits; slow")
    p.add_argument("--strict", action="store_true", default=None, help="no fallback to plain torch")
    p.add_argument("--speculative", action="store_true", default=None, help="draft with the MTP block; same tokens")
    p.add_argument("--cuda-graph", action="store_true", default=None, help="record decoding steps as CUDA graphs and replay them; same tokens")
    p.add_argument(
        "--plant", action="append", metavar="OP:MUTANT[@PLACE][#STEP]", help="put a fault in on purpose (see v4 parity)"
    )
