"""The support table in README.md is the one that the registered implementations give."""

from __future__ import annotations

import pytest

from ops import CONTRACTS
from tools.support import MARK, README, cell, table, with_table


def test_readme_shows_the_current_table() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run python -m tools.support --write"


def test_every_op_has_a_row() -> None:
    rows = table().splitlines()[2:]
    assert [r.split(" | ")[0].strip("| ") for r in rows] == sorted(CONTRACTS)


def test_a_backend_without_an_op_shows_a_dash_or_the_parts() -> None:
    assert cell(CONTRACTS["linear"], "nowhere") == "-"
    assert cell(CONTRACTS["q_norm_rope"], "nowhere") == "composed of unit_rms_norm, rope"


def test_missing_marks_are_refused() -> None:
    with pytest.raises(ValueError, match="found no marks <!-- support table: begin -->"):
        with_table(f"no table <!-- {MARK}: begin -->")
