"""The table of launches in docs/performance.md is what its data say."""

from __future__ import annotations

import pytest

from tools.ascend_launches import KINDS, OURS, PAGE, theirs, with_table


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "python -m tools.ascend_launches --write"


@pytest.mark.parametrize("chip", OURS)
def test_kinds_differ_by_what_they_add(chip: str) -> None:
    window, chosen, heavy = (theirs(chip, kind)["vendor"] for kind in KINDS)
    # a compressor and its cache write are two; the indexer's six or eight come with CSA alone
    assert heavy == window + 2 and chosen - heavy in (6, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chip", OURS)
def test_ours_is_not_larger(chip: str, kind: str) -> None:
    """Neither in fused ops nor in all launches; OURS is counted again by test_standin_launches_modes.py."""
    here, there = OURS[chip][kind], theirs(chip, kind)
    assert here["vendor"] <= there["vendor"]
    assert sum(here.values()) <= sum(there.values())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(KeyError):
        theirs("a3", "MHA")
