"""`python -m tools.nano demo`: the trained model writes a story, answers a question about a fact far back, and shows what ran."""

from __future__ import annotations

import argparse
import sys
import time
from random import Random

import torch
from tqdm import tqdm

import v4
from tools.nano.batches import Encoder
from tools.nano.needle import prompt
from v4.generate import GenerateResult
from v4.tokenizer import BOS, StreamDecoder, Tokenizer

OPENING = "\nAnna from Paris and Peter from Rome met at the"
CHUNK = 256
"""Tokens of a prefill call: the progress bar moves once in each."""


def _write(model: v4.LoadedModel, tokenizer: Tokenizer, ids: list[int], count: int, *, temperature: float, seed: int) -> GenerateResult:
    """Generate, and print text as it comes; the bar shows the prompt being read."""
    decoder = StreamDecoder(tokenizer, skip_special=True)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with tqdm(total=len(ids), unit="tok", desc="reading", leave=False) as bar:

        def on_token(token: int) -> None:
            bar.close()
            show(decoder.feed(token))

        def read(tokens: int) -> None:
            bar.update(tokens)

        result = model.generate(
            ids, count, temperature=temperature, seed=seed, chunk=CHUNK, on_token=on_token, progress=read
        )
    show(decoder.finish() + "\n")
    return result


def run(args: argparse.Namespace) -> int:
    """0 when the answer is the planted one, 1 when it is not. ValueError for a checkpoint without tokenizer or too short a context."""
    began = time.perf_counter()
    model = v4.load(args.model, dtype=getattr(torch, args.dtype), mtp=False)
    if model.tokenizer is None:
        raise ValueError(f"{args.model}: has no tokenizer.json; the demo writes text")
    tokenizer, encoder = model.tokenizer, Encoder(model.tokenizer)
    c = model.config
    print(f"{args.model}: {c.num_hidden_layers} layers, loaded in {time.perf_counter() - began:.1f} s")
    print(f"\nA story, from its first words:{OPENING}", end="", flush=True)
    told = _write(model, tokenizer, tokenizer.encode(BOS + OPENING), args.story_tokens, temperature=0.7, seed=args.seed)
    print(f"[{len(told.tokens)} tokens at {told.tokens_per_second:.0f} tokens/s]\n")

    case = prompt(Random(f"demo:{args.seed}"), encoder, args.context, args.depth)
    question = tokenizer.decode(case.ids, skip_special=True).rsplit("\n\n", 1)[1]
    print(f"{len(case.ids)} tokens of other stories and facts (window {c.sliding_window}), the answer {1 - args.depth:.0%} back. {question}")
    found = _write(model, tokenizer, case.ids, 32, temperature=0.0, seed=0)
    wanted = f"{case.lead}{case.text}."
    right = tokenizer.decode(found.tokens, skip_special=True).strip() == wanted
    print(
        f"[{'right' if right else f'wrong, expected: {wanted}'}; read {len(case.ids) / found.prefill_seconds:.0f} tokens/s, "
        f"{found.prefill_seconds:.1f} s; answered at {found.tokens_per_second:.0f} tokens/s]\n"
    )
    print(model.explain())
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return 0 if right else 1
