"""The training loop: deterministic by seed, resumable, with progress, a log of JSON lines and needle accuracy by length.

N tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from tools.nano import state
from tools.nano.batches import Batch, Batches, Encoder, stream
from tools.nano.export import export
from tools.nano.fused import Fused
from tools.nano.layers import Mode
from tools.nano.model import Nano
from tools.nano.optimiser import Optimiser
from tools.nano.probe import accuracy
from tools.nano.schedule import plans, rate, stage_of
from v4.config import Config
from v4.tokenizer import Tokenizer

LOG = "log.jsonl"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result (config to peak), and how and where it runs (the rest)."""

    config: str
    tokenizer: str
    out: str
    steps: int = 6000
    tokens: int = 32768
    longest: int = 4096
    seed: int = 0
    peak: float = 3e-3
    draft_weight: float = 0.3
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    sinkhorn: str = "torch"
    workers: int = 0
    save_every: float = 120.0
    budget: float | None = None
    probe_trials: int = 64
    resume: str | None = None


def losses(model: Nano, batch: Batch, draft_weight: float) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Total loss, its parts (next token, draft, index), and the experts' loads."""
    ids, weights = batch
    b, t = ids.shape
    out = model(ids)

    def cross_entropy(hidden: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        logits = model.logits(hidden.view(b, t, -1)[:, : t - ahead].flatten(0, 1))
        each = F.cross_entropy(logits, ids[:, ahead:].flatten(), reduction="none")
        w = weights[:, ahead:].flatten()
        return (each * w).sum() / w.sum(), (each * (w > 3)).sum() / (w > 3).sum().clamp(min=1)

    text, answers = cross_entropy(out.hidden, 1)
    index = torch.stack(out.index_losses).sum()
    total = text + index
    parts = {"loss": text, "answers": answers, "index": index}
    if out.mtp is not None:
        draft, _ = cross_entropy(out.mtp, 2)
        total = total + draft_weight * draft
        parts["draft"] = draft
    return total, parts, out.loads


class Trainer:
    """State of one run."""

    def __init__(self, s: Settings) -> None:
        self.s, self.out, self.device = s, Path(s.out), torch.device(s.device)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_float32_matmul_precision("high")
        mode = Mode(fused=Fused(compiled=s.compiled, sinkhorn_kind=s.sinkhorn))
        config = Config.from_file(Path(s.config))
        self.tokenizer = Tokenizer(s.tokenizer)
        if self.tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"{s.tokenizer}: {self.tokenizer.vocab_size} tokens, the model has {config.vocab_size}")
        self.encoder = Encoder(self.tokenizer)
        self.model = Nano(config, mode=mode, seed=s.seed, dtype=getattr(torch, s.dtype)).to(self.device).train()
        self.optimiser = Optimiser(self.model)
        self.step = 0
        if s.resume:
            self.step = state.load(Path(s.resume), self.model, self.optimiser, self._fixed())

    def _fixed(self) -> dict[str, Any]:
        return {k: getattr(self.s, k) for k in ("steps", "tokens", "longest", "seed", "peak", "draft_weight")}

    def save(self) -> None:
        """Write what a resumed run needs (tools/nano/state.py)."""
        state.save(self.out, self.model, self.optimiser, self.step, self._fixed())

    def log(self, entry: dict[str, Any]) -> None:
        """Append one JSON line."""
        with (self.out / LOG).open("a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")

    def probe(self, lengths: tuple[int, ...]) -> dict[str, float]:
        """Needle accuracy by length, as the stage runs the model."""
        found = {str(n): accuracy(self.model, self.encoder, n, self.s.probe_trials) for n in lengths}
        self.log({"step": self.step, "needle": found})
        tqdm.write(f"step {self.step} needle {found}")
        return found

    def train(self) -> bool:
        """Run to the last step or the end of the budget; True when all steps are done. State and checkpoint are written."""
        s, began = self.s, time.perf_counter()
        saved = logged = began
        sizes = plans(s.steps, s.tokens, s.longest)
        feed = stream(Batches(s.tokenizer, sizes, s.seed), self.step, s.workers)
        sums: dict[str, Tensor] = {}
        count = seen = 0
        bar = tqdm(total=s.steps, initial=self.step, desc="train", mininterval=5)
        for batch in feed:
            stage = stage_of(self.step, s.steps)
            stage.apply(self.model.mode)
            moved = Batch(*(x.to(self.device, non_blocking=True) for x in batch))
            total, parts, loads = losses(self.model, moved, s.draft_weight)
            total.backward()
            norm = self.optimiser.step(rate(self.step, s.steps, s.peak))
            self.model.balance(loads, 1e-3)
            for key, value in {**parts, "norm": norm}.items():
                sums[key] = sums[key] + value.detach() if key in sums else value.detach().clone()
            self.step, count, seen = self.step + 1, count + 1, seen + moved.ids_BT.numel()
            bar.update()
            now = time.perf_counter()
            if count == 50 or self.step == s.steps or now - logged > 20:
                means = {k: float(v) / count for k, v in sums.items()}
                if not all(abs(v) < 1e9 for v in means.values()):
                    raise ValueError(f"step {self.step}: training diverged: {means}; lower --peak")
                now = time.perf_counter()
                self.log({"step": self.step, "length": moved.ids_BT.shape[1], **means, "tokens_per_second": seen / (now - logged)})
                bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()})
                sums, count, seen, logged = {}, 0, 0, now
            if now - saved > s.save_every:
                self.save()
                self.probe(tuple(n for n in (256, 1024, 4096) if n <= max(256, stage.length)))
                logged = saved = time.perf_counter()
            if s.budget is not None and time.perf_counter() - began > s.budget:
                break
        bar.close()
        self.save()
        if self.step == s.steps:
            stage_of(s.steps, s.steps).apply(self.model.mode)
        self.probe(tuple(n for n in (256, 512, 1024, 2048, 4096, 8192) if n <= 2 * s.longest))
        export(self.model, self.out / "checkpoint", tokenizer=s.tokenizer)
        return self.step == s.steps
