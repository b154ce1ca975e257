"""The ten mistakes that implementations of this model make (end of the specification): each has a named check that notices it.

`test_check` runs every check on the healthy model; `test_trap` plants a fault in the bound ops or the graph, and the same
check has to exceed its allowance tenfold, so that it does not notice by a hair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

pytest.importorskip("transformers", minversion="5.23")

from tests import trap_checks as checks
from tests import trap_faults as faults
from tests.trap_faults import Plant, in_op

FIRM = 10
CHECKS = [
    checks.logits_equal_transformers,
    checks.freshly_loaded_logits_equal_transformers,
    checks.mtp_logits_equal_transformers,
    checks.comb_is_the_matrix_of_section_16,
    checks.indexer_follows_the_formula,
    checks.experts_follow_the_formula,
]


class Trap(NamedTuple):
    """A mistake: its number in the specification's list, its name, how it is made, and the check that has to notice."""

    number: int
    name: str
    plant: Plant
    check: Callable[[], float]


LOGITS = checks.logits_equal_transformers
TRAPS = [
    Trap(1, "comb contracted over its second index", in_op("hc_post", faults.transposed), LOGITS),
    Trap(1, "comb ends row-normalised", in_op("hc_pre", faults.rows_last), checks.comb_is_the_matrix_of_section_16),
    Trap(2, "theta 10000 in CSA and HCA layers", faults.tables(True, False), LOGITS),
    Trap(2, "theta 160000 and YaRN in window layers", faults.tables(False, True), LOGITS),
    Trap(2, "YaRN amplitude 1.277", faults.amplitude, LOGITS),
    Trap(
        3,
        "half-split rotation",
        faults.together(in_op("rope", faults.half_split), in_op("q_norm_rope", faults.half_split)),
        LOGITS,
    ),
    Trap(3, "no inverse rotation of the output", in_op("rope", faults.no_inverse), LOGITS),
    Trap(4, "CSA halves swapped", in_op("compress", faults.halves_swapped), LOGITS),
    Trap(4, "ape halves swapped", in_op("compress", faults.bias_halves_swapped), LOGITS),
    Trap(5, "CSA entry visible from t//4", in_op("index_topk", faults.late_csa), LOGITS),
    Trap(5, "HCA entry visible from t//128", in_op("sparse_attention", faults.late_hca), LOGITS),
    Trap(5, "entry rotated at its last token", in_op("compress", faults.turned_at_the_last_token), LOGITS),
    Trap(6, "no per-head q norm", in_op("q_norm_rope", faults.no_q_norm), LOGITS),
    Trap(6, "weighted per-head q norm", in_op("q_norm_rope", faults.weighted_q_norm), LOGITS),
    Trap(7, "symmetric clamp in routed experts", in_op("moe_mlp", faults.symmetric_routed), LOGITS),
    Trap(7, "symmetric clamp in the shared expert", in_op("clamped_swiglu", faults.symmetric_shared), LOGITS),
    Trap(7, "no clamp in the shared expert", in_op("clamped_swiglu", faults.unclamped), LOGITS),
    Trap(
        7,
        "routing weight after w2",
        in_op("grouped_experts_fp4", faults.weight_after_w2, "reference"),
        checks.experts_follow_the_formula,
    ),
    Trap(8, "Hadamard on queries only", in_op("hadamard", faults.queries_only, "reference"), checks.indexer_follows_the_formula),
    Trap(8, "Hadamard on keys only", in_op("hadamard", faults.keys_only, "reference"), checks.indexer_follows_the_formula),
    Trap(8, "FP4 groups of 16", in_op("roundtrip_fp4", faults.groups_of_16, "reference"), checks.indexer_follows_the_formula),
    Trap(8, "entry 0 in place of sentinels", in_op("index_topk", faults.no_sentinels), LOGITS),
    Trap(
        8,
        "entry 0 in place of sentinels, indexer",
        in_op("index_topk", faults.no_sentinels, "reference"),
        checks.indexer_follows_the_formula,
    ),
    Trap(9, "separate softmaxes", in_op("sparse_attention", faults.two_softmaxes), LOGITS),
    Trap(9, "sink scaled", in_op("sparse_attention", faults.scaled_sink), LOGITS),
    Trap(9, "sink left out", in_op("sparse_attention", faults.no_sink), LOGITS),
    Trap(10, "E8M0 scales read as numbers", faults.scales_as_numbers, checks.freshly_loaded_logits_equal_transformers),
    Trap(10, "high nibble first", faults.high_nibble_first, checks.freshly_loaded_logits_equal_transformers),
    Trap(10, "hash layers weight their experts equally", in_op("gate_hash", faults.equal_hash_weights), LOGITS),
    Trap(10, "hash layers choose by score", in_op("gate_hash", faults.hash_experts_by_score), LOGITS),
    Trap(10, "MTP takes the collapsed state", faults.collapsed_mtp_input, checks.mtp_logits_equal_transformers),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check(check: Callable[[], float]) -> None:
    assert check() <= 1


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: f"{t.number}-{t.name.replace(' ', '-')}")
def test_trap(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.plant(monkeypatch)
    assert trap.check() > FIRM, f"trap {trap.number} ({trap.name}) is planted, and {trap.check.__name__} does not notice"


def test_every_number_has_a_trap() -> None:
    assert {t.number for t in TRAPS} == set(range(1, 11))
