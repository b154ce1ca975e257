"""`v4 trace record`: generate, and write every op call to a folder."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ops.trace import NOTHING, Recorder, Writer
from tools import generate
from tools.doctor import machine, versions
from tools.trace import selection
from v4.config import Config


def places_of(config: Config) -> list[str]:
    """Every part of a model whose calls can be told apart."""
    mtp = [f"mtp.{i}" for i in range(config.num_nextn_predict_layers)]
    return [*(f"layers.{i}" for i in range(config.num_hidden_layers)), "head", *mtp]


def header_of(request: generate.Request, config: Config) -> dict[str, Any]:
    """The first line of the trace: everything about the run that is known before it starts."""
    s = request.settings
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["v4", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "config": json.loads(json.dumps(asdict(config))),
        "model": str(s.model),
        "backend": s.backend,
        "dtype": s.dtype,
        "numerics": s.numerics,
        "batch_invariant": s.batch_invariant,
        "speculative": s.speculative,
        "ids": request.ids,
        "plants": [str(p) for p in request.plants],
    }


def run(args: argparse.Namespace) -> int:
    """The action; returns the exit code. A run that fails leaves what was recorded, with the error in the closing line."""
    request = generate.prepare(args)
    config = Config.from_file(Path(str(request.settings.model)))
    if args.limit_mib <= 0:
        raise ValueError(f"--limit-mib: found {args.limit_mib}, expected a size above 0 (or --no-tensors)")
    chosen = selection.parse(args.places, args.only, args.steps, places_of(config))
    folder = Path(args.out)
    Writer.check(folder, args.overwrite)
    generate.announce(request, "trace record")
    recorder = Recorder()
    model = generate.load(request, recorder.scope)
    writer = Writer(
        folder,
        {**header_of(request, config), "ops": model.binding.table()},
        selection=NOTHING if args.no_tensors else chosen,
        limit=int(args.limit_mib * 2**20),
        weights=not args.no_weights,
        overwrite=args.overwrite,
    )
    recorder.attach(model.runner.model, model.binding, writer)
    try:
        report = generate.answer(request, model, (lambda piece: None) if args.json else generate.stream)
    except BaseException as error:
        writer.close(failed=f"{type(error).__name__}: {error}")
        raise
    end = writer.close(tokens=report["tokens"])
    size = sum(f.stat().st_size for f in folder.iterdir())
    found = {
        "trace": str(folder),
        "bytes": size,
        **{k: end[k] for k in ("calls", "kept", "left_out", "tensor_bytes")},
        "run": report,
    }
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(flush=True)
    left = f"; {end['left_out']} more would have passed --limit-mib {args.limit_mib:g}" if end["left_out"] else ""
    print(
        f"[{folder}: {end['calls']} calls, tensors of {end['kept']}{left}; {size / 1e6:.1f} MB; "
        f"{len(report['tokens'])} tokens at {report['tokens_per_second']:.1f}/s, torch {torch.__version__}]",
        file=sys.stderr,
    )
    return 0
