"""Generated parts of pages: what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` is written by a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def filled(page: str, name: str, body: str, where: str = "the page") -> str:
    """The page with `body` between the marks of `name`. ValueError when one is absent."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{where}: found no marks {begin} ... {end}; add them where the generated part belongs")
    return f"{head}{begin}\n\n{body.strip()}\n\n{end}{tail}"


def put(path: Path, name: str, body: str) -> None:
    """Write `body` between the marks of `name` in a file; a file that is not there is made. ValueError when it has no such marks."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"<!-- {name}: begin -->\n<!-- {name}: end -->\n"
    path.write_text(filled(page, name, body, str(path)), encoding="utf-8")


def command(argv: Sequence[str] | None, module: str, about: str | None, page: Path, name: str, table: Callable[[], str]) -> int:
    """The command line of a module that makes one table: prints it, or with --write puts it into its page. Returns 0."""
    options = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    options.add_argument("--write", action="store_true", help=f"put the table into {page.name}")
    if options.parse_args(argv).write:
        put(page, name, table())
    else:
        print(table())
    return 0
