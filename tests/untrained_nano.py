"""A small untrained model of the trained nano's kind, with its tokenizer, as a checkpoint."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests.test_nano_training import shaken, small
from tools.nano.export import export
from tools.nano.tokenizer import train, write


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="v4-untrained-nano-")


@functools.cache
def checkpoint() -> Path:
    """The checkpoint's directory, made on first use and removed when the interpreter ends."""
    out = Path(_folder().name)
    write(train(1024), out / "made.json")
    export(shaken(small(index_topk=8)), out / "checkpoint", tokenizer=out / "made.json")
    return out / "checkpoint"
