"""Tool calls: share of replies that the strict parser accepts and that call a tool, and of those that call the right one rightly."""

from __future__ import annotations

import argparse
import json
import sys
from random import Random
from typing import Any

from tqdm import tqdm

from tools.eval.model import interval, open_model, settings
from tools.nano.documents import own_texts, tool_request
from v4.completion import ParseError
from v4.encoding import encode
from v4.parsing import parse

MOST_TOKENS = 200


def judge(reply: str, expected: dict[str, Any]) -> tuple[bool, bool]:
    """(well-formed with at least one call, the expected call and no other)."""
    try:
        calls = parse(reply, mode="chat").tool_calls
    except ParseError:
        return False, False
    function = expected["tool_calls"][0]["function"]
    wanted = (function["name"], json.loads(function["arguments"]))
    try:
        found = [(c.name, json.loads(c.arguments)) for c in calls]
    except ValueError:
        return False, False
    return bool(found), found == [wanted]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, and the shares with their 95 % intervals. ValueError for wrong options."""
    subject = open_model(args)
    texts = subject.model.prompt_texts or own_texts()
    well = right = 0
    for n in tqdm(range(args.trials), unit="reply", disable=not sys.stderr.isatty()):
        messages, expected = tool_request(Random(f"tools:{args.seed}:{n}"))
        result = subject.model.generate(subject.tokenizer.encode(encode(messages, texts=texts)), MOST_TOKENS)
        good, exact = judge(subject.tokenizer.decode(result.tokens), expected)
        well, right = well + good, right + exact
    subject.check()
    return {
        **settings(args), "well_formed": well / args.trials, "well_formed_interval": interval(well, args.trials),
        "right": right / args.trials, "right_interval": interval(right, args.trials),
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    return "\n".join(
        f"{name:<12s} {found[key]:.1%}   95 % interval {found[f'{key}_interval'][0]:.1%} to {found[f'{key}_interval'][1]:.1%}"
        for name, key in (("well-formed", "well_formed"), ("right call", "right"))
    )
