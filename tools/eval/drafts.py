"""Speculative decoding of stories: drafts accepted by place, whether the text is the greedy one, and tokens per second with and without."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tqdm import tqdm

from tools.eval.model import interval, open_model, settings
from tools.eval.perplexity import held_out
from tools.nano.batches import Encoder
from v4.generate import GenerateResult


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Place of the first unlike token of two texts (the shorter one's length where it only ends sooner), None for equal texts."""
    unlike = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unlike, None if len(a) == len(b) else min(len(a), len(b)))


def by_place(results: list[GenerateResult], drafts: int) -> list[dict[str, Any]]:
    """Per place of a draft (1: the token after next): how often all drafts up to it were accepted, of all steps."""
    runs = [n for result in results for n in result.accepted_runs]
    if not runs:
        raise ValueError("nothing was drafted: --new-tokens must be at least 2")
    found = []
    for place in range(1, drafts + 1):
        accepted = sum(n >= place for n in runs)
        reached = sum(n >= place - 1 for n in runs)
        low, high = interval(accepted, len(runs))
        found.append(
            {"place": place, "steps": len(runs), "accepted": accepted, "share": accepted / len(runs), "low": low, "high": high,
             "share_of_reached": accepted / reached if reached else None}
        )  # fmt: skip
    return found


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, acceptance by place, differences from the greedy text, and both speeds. ValueError for wrong options."""
    if args.drafts < 1 or args.new_tokens < 2 or args.length < 32:
        raise ValueError(
            f"--drafts {args.drafts}, --new-tokens {args.new_tokens}, --length {args.length}: expected at least 1, 2 and 32"
        )
    subject = open_model(args, mtp=True)
    encoder = Encoder(subject.tokenizer)
    plain: list[GenerateResult] = []
    drafted: list[GenerateResult] = []
    differences = []
    for n in tqdm(range(args.trials), unit="story", disable=not sys.stderr.isatty()):
        ids = held_out(encoder, args.seed, n, args.length)
        if not n:
            # what the first call of each kind sets up belongs to neither
            for speculative in (0, args.drafts):
                subject.model.generate(ids, 4, speculative=speculative, stop=())
        for speculative, results in ((0, plain), (args.drafts, drafted)):
            results.append(subject.model.generate(ids, args.new_tokens, speculative=speculative, stop=()))
        if (at := first_difference(plain[-1].tokens, drafted[-1].tokens)) is not None:
            differences.append({"trial": n, "token": at, "greedy": plain[-1].tokens[at], "speculative": drafted[-1].tokens[at]})
    subject.check()
    rates = [sum(len(r.tokens) - 1 for r in results) / sum(r.decode_seconds for r in results) for results in (plain, drafted)]
    places = by_place(drafted, args.drafts)
    return {
        **settings(args), "batch_invariant": args.batch_invariant, "drafts": args.drafts, "length": args.length, "new_tokens": args.new_tokens,
        "accepted": sum(r.accepted for r in drafted) / sum(r.drafted for r in drafted), "by_place": places,
        "tokens_per_step": 1 + sum(p["share"] for p in places),
        "identical": args.trials - len(differences), "differences": differences,
        "tokens_per_second": {"greedy": rates[0], "speculative": rates[1], "ratio": rates[1] / rates[0]},
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"draft {p['place']}: accepted in {p['share']:.1%} of {p['steps']} steps (95 % interval {p['low']:.1%} to {p['high']:.1%})"
        for p in found["by_place"]
    ]
    speed = found["tokens_per_second"]
    lines.append(f"{found['identical']} of {found['trials']} speculative texts are the greedy ones")
    lines += [f"  story {d['trial']} departs at token {d['token']}" for d in found["differences"]]
    lines.append(f"{speed['greedy']:.1f} tokens/s greedy, {speed['speculative']:.1f} speculative: {speed['ratio']:.2f}x")
    return "\n".join(lines)
