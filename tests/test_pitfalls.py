"""The inventory of pitfalls: every row of the documents has an entry, every test that an entry names exists, and the page shows them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ops.mutants import MUTANTS, Plant
from tools.npu_standin.chips import CHIPS
from tools.pitfalls import PAGE, ROOT, Check, Pitfall, inventory, table, with_table

ROWS = {"A": 14, "L": 9, "S": 25, "T": 10}
"""Entries per list: rows of the notes' section 10, its lessons (with one of sections 5 to 7), rows of the specification's section 13, its traps."""
NAMED = {
    "clamp dropped on 950": "clamp_dropped_on_950",
    "block id 29,077 and beyond": "test_block_numbers_beyond_29077",
    "H=7168": "seqused_left_null",
    "prompts of 3, 4, 5, 127, 128, 129 tokens": "test_a_state_that_the_prompt_did_not_leave_is_seen",
    "overlap state across chunks": "test_state_lost_between_chunks_is_seen",
    "overlap state across rollback": "test_state_saved_for_the_last_window_only_is_seen",
    "lengths in entries for tokens": "compressed_lengths_for_uncompressed",
    "lengths in tokens for entries": "mla_entries_in_tokens",
    "start_pos in entries": "start_pos_in_entries",
    "wo_a of Pro": "test_wo_a_of_pro_leaves_the_transposed_product",
    "near ties of experts": "gate_near_ties_by_bf16_logits",
    "near ties of entries": "index_near_ties_by_bf16_weights",
}
"""Pitfalls that must have a test of their own, and a part of its name."""
HAVE = {"transformers": ("tests/test_traps.py", "tests/test_pitfalls_graph.py"), "triton": ("tests/cuda/test_far_blocks.py",)}
"""Modules without which files are left out of a run."""
SOCS = tuple(c.family for c in CHIPS)


def checks() -> list[Check]:
    return [c for p in inventory() for c in p.tests]


@functools.cache
def collected(files: tuple[str, ...]) -> dict[tuple[str, str], set[str]]:
    """(file, function) -> cases, without the chip, as pytest collects them; slow ones too."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("V4_TEST_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[tuple[str, str], set[str]] = {}
    for line in done.stdout.splitlines():
        file, separator, rest = line.partition("::")
        if separator:
            function, _, case = rest.partition("[")
            parts = case.removesuffix("]")
            for soc in SOCS:
                parts = parts.removeprefix(f"{soc}-").removesuffix(f"-{soc}")
            found.setdefault((file, function), set()).add("" if parts in SOCS else parts)
    return found


def collectable(file: str) -> bool:
    return all(importlib.util.find_spec(module) or file not in files for module, files in HAVE.items())


def _meant(case: str, found: str) -> bool:
    return not case or found == case or found.startswith(f"{case}-") or found.endswith(f"-{case}")


def missing(entries: list[Check]) -> list[str]:
    """Tests that do not exist. Where a file can not be collected here, its functions are read from the source."""
    known = collected(tuple(sorted({c.file for c in checks() if collectable(c.file)})))
    gone = []
    for c in entries:
        if not (ROOT / c.file).is_file():
            gone.append(c.test)
        elif collectable(c.file):
            cases = known.get((c.file, c.function), set())
            if not any(_meant(c.case, found) for found in cases):
                gone.append(c.test)
        else:
            defined = {n.name for n in ast.walk(ast.parse((ROOT / c.file).read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)}
            if c.function not in defined:
                gone.append(c.test)
    return gone


def test_every_named_test_exists() -> None:
    assert not missing(checks())


@pytest.mark.parametrize("test", ["tests/test_config.py::test_trip", "tests/no.py::test_trap", "tests/test_traps.py::test_trap[11-another]"])
def test_a_test_that_does_not_exist_is_missed(test: str) -> None:
    assert missing([Check(test, "")]) == [test]


def test_every_mutant_exists() -> None:
    for p in inventory():
        for text in p.mutants:
            assert str(Plant.parse(text)) == text


def test_every_row_has_one_entry() -> None:
    ids = [p.id for p in inventory()]
    assert ids == [f"{letter}{i}" for letter, count in ROWS.items() for i in range(1, count + 1)]


def test_the_pitfalls_that_were_asked_for_by_name_have_tests() -> None:
    tests = " ".join(c.test for c in checks())
    assert [name for name, part in NAMED.items() if part not in tests] == []


def unproven(p: Pitfall) -> list[str]:
    """Places where the entry says the pitfall can be, without a test or mutant that reaches them."""
    files = [c.file for c in p.tests]
    ascend, other = (any(f.startswith("tests/ascend/") == here for f in files) for here in (True, False))
    cuda = bool(p.mutants) or any("cuda" in f for f in files)
    reached = {"ascend": ascend, "cpu": bool(p.mutants) or other, "cuda": cuda, "graph": other, "checkpoint": other, "tools": other}
    return [place for place in p.where if place != "nowhere" and not reached[place]]


def test_every_place_is_reached() -> None:
    assert {p.id: gone for p in inventory() if (gone := unproven(p))} == {}
    clamp = next(p for p in inventory() if p.id == "S1")
    assert unproven(replace(clamp, tests=(), mutants=())) == ["ascend", "cpu", "graph"]


def test_mutants_of_cuda_entries_meet_a_kernel() -> None:
    """An entry that can be in a CUDA kernel names a mutant of an op that has one."""
    from ops.contract import CONTRACTS
    from ops.registry import load_backend

    load_backend("cuda_triton")
    without = [p.id for p in inventory() if "cuda" in p.where and not any("cuda_triton" in CONTRACTS[m.partition(":")[0]].impls for m in p.mutants)]
    assert without == []


def test_no_test_stands_for_too_much() -> None:
    """A test that many entries name would be none of theirs in particular."""
    assert max(Counter(c.test for c in checks()).values()) <= 4


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "python -m tools.pitfalls --write"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{id: X1, row: r, pitfall: p, where: [moon], tests: [[a, b]]}", "where is 'moon'"),
        ("{id: X1, row: r, pitfall: p, where: [cpu]}", "has tests or mutants, or it is nowhere"),
        ("{id: X1, row: r, pitfall: p, where: [nowhere]}", "needs a reason"),
        ("{id: X1, row: r, where: [cpu], tests: [[a, b]]}", "pitfall missing"),
        ("{id: X1, row: r, pitfall: p, where: [cpu], test: [[a, b]]}", "unknown keys test"),
    ],
)
def test_an_entry_that_says_too_little_is_refused(change: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"document:\n- {change}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        inventory(file)


def test_cells_keep_their_columns() -> None:
    p = Pitfall("X1", "d", "r", "a | b", ("cpu",), ("rope:amplitude",), (Check("tests/x.py::test_y[z|w]", "p"),), "")
    assert table([p]).splitlines()[-1] == "| X1 | a \\| b | cpu | `x.py::test_y` z\\|w: p<br>mutants `rope:amplitude` |"
    assert "rope" in MUTANTS
