"""The verb `v4 compare`: everything that can be refused is, and the endpoint asked once, before weights are read."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import v4
from tools.compare import report as reports
from tools.compare.client import Client, base_url, key_from
from tools.compare.measure import Result, add_noise, measure, named_ids
from tools.compare.names import Names
from tools.compare.prompts import Prompt, Reader
from tools.compare.scoring import score
from tools.compare.ways import Answer, Asker, Way, choose, served_model
from tools.runconfig import RunConfig
from v4.config import Config
from v4.prompt_texts import PromptTexts
from v4.tokenizer import Tokenizer


def _settings(args: argparse.Namespace) -> RunConfig:
    given = {name: getattr(args, name) for name in ("model", "backend", "dtype", "numerics")}
    settings = RunConfig().override(given)
    if not Path(args.model).is_dir():
        raise ValueError(f"{args.model}: no such directory; expected a checkpoint")
    if args.top_logprobs < 1:
        raise ValueError(f"--top-logprobs: found {args.top_logprobs}, expected at least 1")
    if not (math.isfinite(args.threshold) and args.threshold > 0):
        raise ValueError(f"--threshold: found {args.threshold}, expected a number of nat above 0")
    if args.stride is not None and args.stride < 1:
        raise ValueError(f"--stride: found {args.stride}, expected at least 1")
    if args.way == "steps" and args.stride is None:
        raise ValueError("--way steps asks for one token at a time: say at which positions with --stride 16")
    return settings


def _load(settings: RunConfig, dtype: str) -> v4.LoadedModel:
    return v4.load(
        str(settings.model),
        backend=settings.backend,
        dtype=getattr(torch, dtype),
        numerics=settings.numerics,
        mtp=False,
        progress=sys.stderr.isatty(),
    )


def _bar(prompts: Sequence[Prompt], what: str) -> Any:
    return tqdm(prompts, desc=what, unit="prompt", delay=2, disable=not sys.stderr.isatty())


class Comparison:
    """One run: the endpoint and how it is asked, our settings, and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.settings = args, _settings(args)
        self.out = Path(args.out) if args.out else None
        reports.check_out(self.out, args.overwrite)
        directory = Path(args.model)
        self.config = Config.from_file(directory)
        tokenizer = Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None
        reader = Reader(
            tokenizer, PromptTexts.from_checkpoint(directory), self.config.vocab_size, self.config.max_position_embeddings
        )
        self.prompts = reader.read(Path(args.prompts) if args.prompts else None, args.limit)
        self.names = Names(tokenizer, self.config.vocab_size)
        client = Client(base_url(args.against), key_from(args.api_key_env), args.timeout, args.retries)
        name = served_model(client, args.name)
        self.asker = Asker(client, name, self.names, args.top_logprobs, args.stride)
        # the shortest prompt finds out how the endpoint is asked: a refusal then is about the way, not about the length
        self.probed = min(self.prompts, key=lambda prompt: len(prompt.ids))
        as_text = all(prompt.text is not None for prompt in self.prompts)
        self.way, self.probe = choose(self.asker, self.probed, args.way, text=as_text)
        self.results: list[Result] = []
        self.stopped: str | None = f"not finished, 0 of {len(self.prompts)} prompts done"
        self.kept = 0
        self.yardstick: str | None = None

    def _answer(self, prompt: Prompt, way: Way) -> Answer:
        return self.probe if prompt is self.probed else self.asker.ask(way, prompt)

    def report(self) -> dict[str, Any]:
        """The JSON form of what was found so far."""
        head = {
            "model": str(self.settings.model),
            "endpoint": self.asker.client.url,
            "name": self.asker.model,
            "way": str(self.way),
            "backend": self.settings.backend,
            "dtype": self.settings.dtype,
            "numerics": self.settings.numerics,
            "threshold": self.args.threshold,
            "yardstick": self.yardstick,
            "sliding_window": self.config.sliding_window,
        }
        return reports.as_dict(head, self.results, self.stopped)

    def _keep(self) -> None:
        # a run that found nothing leaves the report of before
        if self.out and self.results:
            reports.write(self.out, self.report())
            self.kept = len(self.results)

    def _one(self, model: v4.LoadedModel, prompt: Prompt) -> None:
        answer = self._answer(prompt, self.way)
        top = named_ids(answer, self.names)
        scores = score(model, prompt.ids, [list(row) for row in top])
        self.results.append(measure(prompt, answer, top, scores, self.names, self.args.threshold))
        done, total = len(self.results), len(self.prompts)
        self.stopped = None if done == total else f"not finished, {done} of {total} prompts done"
        self._keep()

    def compare(self) -> None:
        """Ask and score prompt after prompt; every result is kept in --out at once.

        `stopped` says until the end that this has not been reached, or why not: the endpoint, our model or the disk failed.
        """
        model = _load(self.settings, self.settings.dtype)
        for prompt in _bar(self.prompts, "compare"):
            try:
                self._one(model, prompt)
            except ValueError as error:
                self._stop(f"prompt {prompt.id} ({len(self.results)} of {len(self.prompts)} done)", error)
                return

    def _stop(self, where: str, error: ValueError) -> None:
        self.stopped = f"{where}: {self.asker.client.hide(str(error))}"
        with contextlib.suppress(ValueError):
            # when the disk is what failed, the file of before and the message have to do
            self._keep()

    def measure_noise(self) -> None:
        """Score the same prompts with our model in the other dtype (float32, or bfloat16 when that is the one compared)."""
        other = "bfloat16" if self.settings.dtype == "float32" else "float32"
        nothing: tuple[int, ...] = ()
        try:
            model = _load(self.settings, other)
            for prompt, result in zip(_bar(self.prompts, "yardstick"), self.results, strict=True):
                add_noise(result, [s.logprob for s in score(model, prompt.ids, [nothing] * len(prompt.ids))])
            self.yardstick = other
            self._keep()
        except ValueError as error:
            self._stop(f"the yardstick in {other}", error)


def run(args: argparse.Namespace) -> int:
    """The verb; returns the exit code: 0 within the threshold, 1 beyond it, 2 when a prompt or the yardstick failed on the way, or
    nothing was compared."""
    comparison = Comparison(args)
    comparison.compare()
    if args.yardstick and comparison.stopped is None:
        comparison.measure_noise()
    found = comparison.report()
    print(json.dumps(found, ensure_ascii=False, allow_nan=False) if args.json else reports.text(found, comparison.results))
    if comparison.stopped is not None:
        kept = f"; {comparison.kept} finished prompts are in {comparison.out}" if comparison.kept else ""
        print(f"v4 compare: stopped at {comparison.stopped}{kept}", file=sys.stderr)
        return 2
    within = found["summary"]["within"]
    if within is None:
        print(f"v4 compare: no verdict: {reports.NOTHING}", file=sys.stderr)
        return 2
    return 0 if within else 1
