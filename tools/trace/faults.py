"""Faults planted one at a time in a model of twelve layers, each to be named by `v4 trace bisect`: op, layer and step.

`python -m tools.trace.faults --markdown docs/parity.md` writes the table there; exit code 0 when every fault was named exactly, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ops.mutants import Plant
from tools import marked
from tools.cli import parser
from tools.trace import bisect
from v4.config import Config
from v4.make import make

FAULTS = (
    "rms_norm:cast_before_weight@layers.0#3",
    "q_norm_rope:cos_sin_swapped@layers.0#4",
    "sparse_attention:window_short@layers.1#3",
    "rope:inverse_ignored@layers.1#1",
    "gate_hash:next_token@layers.2#0",
    "compress:overlap_stale@layers.2#0",
    "sparse_attention:sink_scaled@layers.3#0",
    "clamped_swiglu:scaled@layers.3#0",
    "sparse_attention:index_of_token_before@layers.4#0",
    "linear:truncated@layers.5#0",
    "sparse_attention:entry_late@layers.5#0",
    "compress:ape_chunk_relative@layers.6#9",
    "index_topk:scores_bf16@layers.6#0",
    "compress:state_not_stored@layers.7#2",
    "grouped_linear:one_element@layers.7#1",
    "hc_pre:comb_transposed@layers.8#5",
    "index_topk:one_short@layers.8#2",
    "gate_topk:bias_in_weights@layers.9#1",
    "moe_mlp:rows_swapped@layers.10#0",
    "rms_norm:weight_of_next_channel@layers.10#9",
    "hc_post:comb_bf16@layers.11#0",
    "sparse_attention:p_fp8@layers.11#0",
    "hc_head:factor_2@head#2",
    "linear:nan@head#1",
)
"""OP:MUTANT@PLACE#COUNT, in the order of the layers; COUNT is the number of the op's calls there."""
MARK = "planted faults"
PROMPT, NEW = 140, 5
"""Tokens: a prompt that completes an HCA entry and lets the indexer choose, and enough steps to complete CSA entries."""


def checkpoint(folder: Path) -> Path:
    """The twelve-layer model (configs/twelve.json, seed 0), in the hub's format."""
    made = folder / "twelve"
    if not (made / "config.json").is_file():
        make(Config.from_file(Path(__file__).resolve().parents[2] / "configs" / "twelve.json"), made, 0)
    return made


def prompt() -> str:
    """Token ids of the prompt, as the command line takes them."""
    ids = torch.randint(0, 512, (PROMPT,), generator=torch.Generator().manual_seed(0))
    return ",".join(map(str, ids.tolist()))


def command(model: Path, *options: str) -> list[str]:
    """Arguments of a bisected run in bf16."""
    run = ["--model", str(model), "--ids", prompt(), "--max-new-tokens", str(NEW), "--dtype", "bfloat16"]
    return ["trace", "bisect", *run, *options]


def named(model: Path, fault: str) -> dict[str, Any]:
    """What bisect says of a planted fault: its first finding, and the seconds it took."""
    began = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        found = bisect.execute(parser().parse_args(command(model, "--plant", fault, "--no-swap")))
    return {**(found["first"] or {}), "seconds": time.perf_counter() - began, "judged": found["judged"]}


def exactly(fault: str, first: dict[str, Any]) -> bool:
    """Whether the finding is the planted one."""
    p = Plant.parse(fault)
    return (first.get("op"), first.get("place"), first.get("count")) == (p.variant.op, p.place, p.step)


def _row(fault: str, first: dict[str, Any]) -> str:
    p = Plant.parse(fault)
    said = "nothing" if "op" not in first else f"`{first['op']}@{first['place']}#{first['count']}`, step {first['step']}"
    worst = "-" if first.get("worst") is None else f"{first['worst']:.3g}"
    return f"| `{fault}` | {p.variant.what} | {said} | {worst} | {first['judged']} | {'yes' if exactly(fault, first) else 'NO'} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Plant each fault, bisect, print the table."""
    options = argparse.ArgumentParser(prog="python -m tools.trace.faults", description=__doc__)
    options.add_argument("--fault", action="append", help="only this one (may be given more than once)")
    options.add_argument("--markdown", type=Path, help="put the table between the marks of this page too")
    args = options.parse_args(argv)
    torch.set_num_threads(1)
    faults = args.fault or FAULTS
    lines = ["| planted | what is wrong | named by bisect | error/bound | calls judged | exact |", "|---|---|---|---|---|---|"]
    right = 0
    with tempfile.TemporaryDirectory(prefix="v4-faults-") as folder:
        model = checkpoint(Path(folder))
        for fault in tqdm(faults, desc="faults", disable=not sys.stderr.isatty()):
            first = named(model, fault)
            right += exactly(fault, first)
            lines.append(_row(fault, first))
    lines.append(f"\n{right} of {len(faults)} named exactly: op, layer and step.")
    print("\n".join(lines))
    if args.markdown:
        marked.put(args.markdown, MARK, "\n".join(lines))
    return 0 if right == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
