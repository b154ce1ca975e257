"""Greedy text after held-out stories, with every choice on the way judged; what `python -m tools.eval backends` compares.

S steps, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ops.trace import Recorder
from tools.eval.following import Watch, follow
from tools.eval.model import open_model, settings
from tools.eval.perplexity import held_out
from tools.nano.batches import Encoder


def followed_texts(path: str | None, prompts: list[list[int]]) -> list[list[int]] | None:
    """Texts of another run's report. ValueError when they continue other prompts."""
    if path is None:
        return None
    other = json.loads(Path(path).read_text(encoding="utf-8"))
    if other.get("kind") != "greedy" or other["prompts"] != prompts:
        raise ValueError(f"--follow {path}: continues other prompts; make it with the same --seed, --trials and --length")
    return other["tokens"]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, prompts, the greedy texts, and the calls that are wrong. ValueError for wrong options."""
    if args.length < 32 or args.new_tokens < 1:
        raise ValueError(f"--length {args.length}, --new-tokens {args.new_tokens}: expected at least 32 and 1")
    recorder = Recorder()
    subject = open_model(args, watch=recorder.scope)
    encoder = Encoder(subject.tokenizer)
    prompts = [held_out(encoder, args.seed, n, args.length) for n in range(args.trials)]
    others = followed_texts(args.follow, prompts)
    texts = []
    followed = []
    for n, ids in enumerate(tqdm(prompts, unit="text", disable=not sys.stderr.isatty())):
        texts.append(subject.model.generate(ids, args.new_tokens, stop=()).tokens)
        if not n:
            recorder.attach(subject.model.runner.model, subject.model.binding, Watch(False))
        followed.append(follow(subject.model, recorder, ids, others[n] if others else texts[-1], everything=args.judge == "all"))
        recorder.stop()
    subject.check()
    if args.tensors:
        saved = [{"logits": f.logits_SV, "choices": [vars(c) for c in f.choices]} for f in followed]
        torch.save(saved, args.tensors)
    return {
        **settings(args), "length": args.length, "new_tokens": args.new_tokens, "judge": args.judge, "prompts": prompts, "tokens": texts,
        "judged": sum(f.judged for f in followed), "wrong": [w for f in followed for w in f.wrong],
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{found['judged']} calls judged, {len(found['wrong'])} wrong", *found["wrong"][:10]]
    return "\n".join([*lines, *(",".join(map(str, ids)) for ids in found["tokens"])])
