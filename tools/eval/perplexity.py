"""Bits per byte of held-out stories under the model, beside a 5-gram model trained on stories of the same grammar.

T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from tools.eval.model import open_model, settings
from tools.eval.ngram import Ngram
from tools.nano.batches import Encoder
from tools.nano.documents import story


def held_out(encoder: Encoder, seed: int, number: int, length: int) -> list[int]:
    """Ids of one held-out text of `length` tokens, from a seed that no training batch uses."""
    ids, _ = encoder.document(story(Random(f"held-out:{seed}:{number}"), 2 * length))
    return ids[:length]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, bits per byte and perplexity of both models, and by how much the model's bits are fewer. ValueError for wrong options."""
    if args.length < 32 or args.ngram_tokens < 1000:
        raise ValueError(f"--length {args.length}, --ngram-tokens {args.ngram_tokens}: expected at least 32 and 1000")
    subject = open_model(args)
    encoder = Encoder(subject.tokenizer)
    ngram, seen, number = Ngram(subject.model.config.vocab_size), 0, 0
    show = not sys.stderr.isatty()
    with tqdm(total=args.ngram_tokens, unit="tok", unit_scale=True, desc="5-gram", disable=show) as bar:
        while seen < args.ngram_tokens:
            ids, _ = encoder.document(story(Random(f"ngram:{args.seed}:{number}"), 1000))
            ngram.learn(ids)
            seen, number = seen + len(ids), number + 1
            bar.update(len(ids))
    model_bits = ngram_bits = 0.0
    tokens = size = 0
    for n in tqdm(range(args.trials), unit="text", disable=show):
        ids = held_out(encoder, args.seed, n, args.length)
        logits_TV = subject.model.logits(ids)
        nats = torch.nn.functional.cross_entropy(logits_TV[:-1].float(), torch.tensor(ids[1:], device=logits_TV.device), reduction="sum")
        model_bits += float(nats) / math.log(2)
        ngram_bits += ngram.bits(ids)
        tokens, size = tokens + len(ids) - 1, size + len(subject.tokenizer.decode(ids[1:]).encode())
    subject.check()
    return {
        **settings(args), "tokens": tokens, "bytes": size,
        "bits_per_byte": model_bits / size, "perplexity": 2 ** (model_bits / tokens),
        "ngram_bits_per_byte": ngram_bits / size, "ngram_perplexity": 2 ** (ngram_bits / tokens), "ngram_tokens": seen,
        "fewer": 1 - model_bits / ngram_bits,
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The report for people."""
    return (
        f"model   {found['bits_per_byte']:.4f} bits per byte, perplexity {found['perplexity']:.3f} per token\n"
        f"5-gram  {found['ngram_bits_per_byte']:.4f} bits per byte, perplexity {found['ngram_perplexity']:.3f} per token, "
        f"from {found['ngram_tokens']:,} tokens\n"
        f"the model needs {found['fewer']:.1%} fewer bits, over {found['tokens']:,} tokens of held-out text"
    )
