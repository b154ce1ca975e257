"""Every argument of every vendor call that differs from the vendor's default is left out in turn: each must be seen.

Source: specification section 13 (an optional kernel argument left null) and Ascend operator notes, whose defaults are often those of another
model. An argument counts as seen when the call is refused, or when the judge rejects the result.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends.ascend.limits import NAMESPACES
from ops.contract import Sample
from ops.experts_int8 import pack_int8
from ops.experts_quant import pack_fp4
from tests.ascend import wide
from tests.ascend.faults import BF16, CHIPS, NEWER, OLDER, Fault, call, judged, of, prepared
from tests.ascend.test_pitfalls_calls import attention, clamped_experts, compress, large_hash_table

HINTS = {
    "batch_size": "a size that the lengths tell as well",
    "max_seqlen_q": "a size that the lengths tell as well",
    "max_seqlen_kv": "a size that the lengths tell as well",
    "max_seqlen_ori_kv": "a size that the lengths tell as well",
    "max_seqlen_cmp_kv": "a size that the lengths tell as well",
    "tuning_config": "a hint for speed",
    "device": "where the metadata are made, on a host without devices the same",
}
"""Arguments whose loss changes no result of a documented model, and why."""
SAME = {
    "npu::npu_transpose_batchmatmul: perm_x2": (CHIPS, "without it the weight keeps its order, which is the one asked for"),
    "npu::npu_dynamic_quant: dst_type": (OLDER, "int8 is the only type there"),
    "custom::npu_dequant_swiglu_clamp_quant: activate_dim": (OLDER, "the last dimension is meant without it too"),
    "npu::npu_moe_finalize_routing: k": (CHIPS, "the routing weights tell it as well"),
    "custom::npu_swiglu_group_quant: group_index": (NEWER, "every row belongs to an expert, and without it every row counts"),
}
"""Arguments that mean the default, on the chips named, though they are written otherwise."""


def nothing(patch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    """No fault."""


def case(op: str, sample: Callable[[], Sample], name: str = "", socs: tuple[str, ...] = CHIPS) -> Fault:
    return Fault(name or op, op, nothing, sample, socs=socs)


ONE = ("910_93",)
"""For ops whose calls are the same on every chip."""
CASES = [
    case("hc_pre", of("hc_pre", "flash-unit"), socs=ONE),
    case("gate_topk", of("gate_topk", "many")),
    case("gate_hash", large_hash_table),
    case("grouped_linear", lambda: wide.grouped_linear_sample(BF16, 8)),
    case("clamped_swiglu", of("clamped_swiglu", "flash"), socs=OLDER),
    case("moe_dispatch", of("moe_dispatch", "many")),
    case("moe_mlp", of("moe_mlp", "many")),
    case("linear_int8", of("linear_int8", "flash-unit")),
    case("linear_fp8", of("linear_fp8", "flash-unit"), socs=NEWER),
    case("grouped_experts_int8", lambda: clamped_experts(pack_int8)),
    case("grouped_experts_fp4", lambda: clamped_experts(pack_fp4), socs=NEWER),
    case("linear_mx", of("linear_mx", "flash-unit"), socs=NEWER),
    case("moe_int8", of("moe_int8", "many"), socs=ONE),
    case("moe_mx", of("moe_mx", "many"), socs=NEWER),
    case("compress", compress(8), socs=ONE),
    case("sparse_attention", attention([(300, 1), (126, 2)]), "attention_window", ONE),
    case("sparse_attention", attention([(2600, 2)], ratio=4, topk=512), "attention_chosen", ONE),
    case("sparse_attention", attention([(250, 10)], ratio=128), "attention_all", ONE),
    case("sparse_attention", attention([(126, 2)], heads=128), "attention_window_pro", ONE),
    case("sparse_attention", attention([(4136, 2)], heads=128, ratio=4, topk=1024), "attention_chosen_pro", ONE),
    case("sparse_attention", attention([(250, 10)], heads=128, ratio=128), "attention_all_pro", ONE),
]


class Noted(TorchFunctionMode):
    """The vendor ops that are called, and per op the arguments that differ from the vendor's default."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: dict[str, set[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func if isinstance(func, torch._ops.OpOverloadPacket) else getattr(func, "overloadpacket", None)
        name = packet._qualified_op_name if packet is not None else ""
        if packet is not None and name.partition("::")[0] in NAMESPACES:
            defaults = {a.name: a.default_value for a in packet.default._schema.arguments if a.has_default_value()}
            passed = {k: v for k, v in (kwargs or {}).items() if k in defaults}
            self.chosen.setdefault(name, set()).update(k for k, v in passed.items() if isinstance(v, (Tensor, list)) or v != defaults[k])
        return func(*args, **(kwargs or {}))


def chosen(fault: Fault, soc: str) -> dict[str, set[str]]:
    with Noted() as mode:
        assert judged(fault, soc, torch.device("cpu"), False).ok
    return mode.chosen


def seen(fault: Fault, soc: str, vendor: str, argument: str) -> bool:
    without = call(vendor, lambda kwargs: {k: v for k, v in kwargs.items() if k != argument})
    try:
        return not judged(Fault(fault.name, fault.op, without, fault.sample), soc, torch.device("cpu"), True).ok
    except (ValueError, RuntimeError, TypeError):
        return True


def left_out(fault: Fault, soc: str) -> tuple[list[str], list[str]]:
    """Arguments whose loss is to be seen, as "vendor op: argument", and those of them whose loss is not."""
    prepared(fault)
    every = [(vendor, a) for vendor, arguments in chosen(fault, soc).items() for a in sorted(arguments) if a not in HINTS]
    meant = [(vendor, a) for vendor, a in every if soc not in SAME.get(f"{vendor}: {a}", ((), ""))[0]]
    return [f"{v}: {a}" for v, a in meant], [f"{v}: {a}" for v, a in meant if not seen(fault, soc, v, a)]


@pytest.mark.standin
@pytest.mark.parametrize("fault", CASES, ids=lambda f: f.name)
def test_an_argument_left_to_the_vendors_default_is_seen(fault: Fault, soc: str) -> None:
    if soc not in fault.socs or soc == "910b":
        pytest.skip(f"no vendor op serves {fault.op} on {soc}, or the same calls as on 910_93")
    tried, unseen = left_out(fault, soc)
    assert tried and not unseen


@pytest.mark.standin
def test_an_argument_that_nobody_checks_is_found(soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the reasons above, the arguments they are for would be reported."""
    monkeypatch.setattr("tests.ascend.test_pitfalls_defaults.SAME", {})
    fault = next(f for f in CASES if f.name == "grouped_linear")
    assert left_out(fault, soc)[1] == ["npu::npu_transpose_batchmatmul: perm_x2"]
