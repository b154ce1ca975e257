"""What the documents tell a reader to type exists, links lead somewhere, and the documented JSON keys are the real ones."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tools.cli import parser
from tools.runconfig import RunConfig, read_run_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: Path) -> list[list[str]]:
    """Command lines of the fenced blocks, and inline ones in backticks, without comments and prompts."""
    text = page.read_text(encoding="utf-8")
    fenced = "\n".join(re.findall(r"```(?:bash|sh|shell|console)?\n(.*?)```", text, re.DOTALL))
    lines = re.sub(r"\\\n", " ", fenced).splitlines() + re.findall(r"`((?:make|v4|python -m) [^`]+)`", text)
    found = []
    for line in lines:
        words = line.split("#")[0].strip().removeprefix("$ ")
        if words.startswith(("make ", "v4 ", "python -m ")) and "..." not in words and "<" not in words:
            found.append(shlex.split(words.split(" | ")[0].split(" > ")[0]))
    return found


def complaint(words: list[str]) -> str | None:
    """Why a command can not be typed as written, or None."""
    if words[0] == "make":
        bad = [w for w in words[1:] if "=" not in w and w not in TARGETS]
        return f"no Makefile target {bad[0]}" if bad else None
    if words[0] == "python":
        missing = words[2].split(".")[0] in ("tools", "v4", "ops") and importlib.util.find_spec(words[2]) is None
        return f"no module {words[2]}" if missing else None
    # a verb without options is a mention of the verb: it must exist
    mentioned = not any(w.startswith("-") for w in words)
    try:
        parser().parse_args([*words[1:], "--help"] if mentioned else words[1:])
    except SystemExit as error:
        return f"the command line refuses it (exit code {error.code})" if error.code else None
    return None


def test_the_pages_that_every_reader_expects_exist() -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs/command-line.md"):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_can_be_typed(page: Path) -> None:
    wrong = [f"{' '.join(words)}: {why}" for words in commands(page) if (why := complaint(words))]
    assert not wrong, "\n".join(wrong)


def test_readme_shows_the_first_commands() -> None:
    shown = [" ".join(words[:2]) for words in commands(ROOT / "README.md")]
    assert {"make demo", "make test"} <= set(shown)


@pytest.mark.parametrize("words", ["make dmeo", "v4 generat x", "v4 plan --config flash", "python -m tools.bnch cpu"])
def test_a_wrong_command_is_found(words: str) -> None:
    assert complaint(shlex.split(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_example_run_files_are_accepted(file: Path) -> None:
    assert read_run_file(file).model


def test_run_file_keys_are_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    table = page[page.index("| run file key") : page.index("## JSON")]
    first_column = " ".join(line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|"))
    documented = set(re.findall(r"`(\w+)`", first_column))
    assert documented == set(RunConfig.__dataclass_fields__)


def test_make_targets_are_those_that_are_promised() -> None:
    assert {"setup", "demo", "test", "test-all", "lint", "bench"} <= TARGETS
