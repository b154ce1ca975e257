"""Needle accuracy of the model in training: prompts with the answer, all of its tokens predicted at once.

Under greedy decoding an answer is right exactly when every one of its tokens is the largest logit after the right ones before it.
"""

from __future__ import annotations

from random import Random

import torch

from tools.nano.batches import Encoder
from tools.nano.model import Nano
from tools.nano.needle import prompt


@torch.no_grad()
def accuracy(model: Nano, encoder: Encoder, length: int, trials: int, seed: int = 1) -> float:
    """Share of needles found in contexts of about `length` tokens, depth drawn uniformly."""
    device = model.embed.weight.device
    right = 0
    was, fused = model.training, model.mode.fused
    model.eval()
    # other shapes than in training: compiling for them would take longer than running
    model.mode.fused = fused.plain()
    at_once = max(1, 16384 // length)
    cases = []
    for n in range(trials):
        r = Random(f"probe:{seed}:{length}:{n}")
        case = prompt(r, encoder, length, r.random())
        cases.append((case.ids, [*encoder(case.lead), *case.answer]))
    for start in range(0, trials, at_once):
        part = cases[start : start + at_once]
        longest = max(len(a) + len(b) for a, b in part)
        rows = [[*a, *b, *[0] * (longest - len(a) - len(b))] for a, b in part]
        hidden = model(torch.tensor(rows, device=device), draft=False).hidden.view(len(part), longest, -1)
        for h, (a, b) in zip(hidden, part, strict=True):
            found = model.logits(h[len(a) - 1 : len(a) + len(b) - 1]).argmax(-1).tolist()
            right += found[-3:] == b[-3:]
    model.train(was)
    model.mode.fused = fused
    return right / trials
