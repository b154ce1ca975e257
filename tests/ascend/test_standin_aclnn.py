"""Below torch_npu's host code: what reaches the kernel is what was passed, and what comes back is what the model gives for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ascend.vendor_calls import VendorCall, all_calls
from tools.npu_standin import models
from tools.npu_standin.calls import recording
from tools.npu_standin.host import BRIDGES
from tools.npu_standin.install import StandIn
from tools.npu_standin.package import OWN_KERNELS

pytestmark = [pytest.mark.standin, pytest.mark.wheel, pytest.mark.device]
CALLS = all_calls()


def _at(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_at(v, device) for v in value] if isinstance(value, list) else value


def _op(name: str) -> Any:
    space, _, op = name.partition("::")
    return getattr(getattr(torch.ops, space), op)


def _bits(t: torch.Tensor) -> tuple[Any, ...]:
    # the wheel's Meta calls scales of routed codes e8m0, its host code allocates them as bytes
    dtype = torch.uint8 if t.dtype == torch.float8_e8m0fnu else t.dtype
    return dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()


def _results(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


@pytest.mark.parametrize("call", CALLS, ids=[c.id for c in CALLS])
def test_the_device_answers_as_the_model(call: VendorCall, standin: StandIn) -> None:
    if standin.chip.family not in call.socs:
        pytest.skip(f"documented for {', '.join(call.socs)}")
    wanted = _results(models.MODELS[call.op](*(_at(a, torch.device("cpu")) for a in call.args), **call.kwargs))
    fresh = next(c for c in all_calls() if c.id == call.id)  # an op may write into its operands
    args = [_at(a, standin.device) for a in fresh.args]
    with recording() as record:
        found = _results(_op(call.op)(*args, **{k: _at(v, standin.device) for k, v in fresh.kwargs.items()}))
    launched = record.launches("vendor")
    assert launched.total() == 1 and (not call.aclnn or launched[call.aclnn] == 1), launched
    for number, (got, want) in enumerate(zip(found, wanted, strict=False)):
        if want is None or number in call.undefined:
            continue
        assert _bits(got.cpu()) == _bits(want), f"output {number}"


def test_ranks_exchange_rows_through_the_host_code(standin: StandIn) -> None:
    """Two ranks as threads: every token comes back as itself times the sum of its weights."""
    ranks, tokens, experts, k = 2, 4, 8, 2
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(tokens, 256, generator=g).bfloat16() for _ in range(ranks)]
    ids = [torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)]).int() for _ in range(ranks)]
    weights = [torch.rand(tokens, k, generator=g) for _ in range(ranks)]
    ep = {"group_ep": "ranks", "ep_world_size": ranks, "moe_expert_num": experts}

    def rank(r: int) -> torch.Tensor:
        x, chosen, scales = (t[r].npu() for t in (rows, ids, weights))
        moved, _, assist, _, counts, _, _ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
            x, chosen, ep_rank_id=r, quant_mode=0, **ep
        )
        y = torch.ops.npu.npu_moe_distribute_combine_v2(moved, chosen, assist, counts, scales, ep_rank_id=r, **ep)
        return y.cpu()

    with recording() as record, ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(rank, range(ranks)))
    assert record.launches("vendor") == {"aclnnMoeDistributeDispatchV4": ranks, "aclnnMoeDistributeCombineV4": ranks}
    for y, x, w in zip(found, rows, weights, strict=True):
        torch.testing.assert_close(y.float(), x.float() * w.sum(1, keepdim=True), rtol=2**-7, atol=2**-7)


def test_another_mode_of_quantisation_reaches_another_entry(standin: StandIn) -> None:
    with pytest.raises(RuntimeError, match=r"aclnnDynamicQuantV4(.|\n)*Refused: npu_dynamic_quant: found quant_mode 'pertensor'"):
        torch.ops.npu.npu_dynamic_quant(torch.ones(2, 16, device="npu", dtype=torch.bfloat16), quant_mode="pertensor")


def test_every_bridge_is_called(standin: StandIn) -> None:
    """A bridge without a call would be an argument list that nobody has compared with the host code."""
    elsewhere = {"aclnnDynamicQuantV4", "aclnnMoeDistributeDispatchV4", "aclnnMoeDistributeCombineV4"}
    elsewhere |= set(OWN_KERNELS)  # called in a process of their own, test_own_op_device.py
    grouped = {"aclnnGroupedMatmulV4", "aclnnGroupedMatmulV5"}  # which one the host takes depends on what was called before
    assert set(BRIDGES) == {c.aclnn for c in CALLS if c.aclnn} | elsewhere | grouped


def test_a_wrong_argument_list_is_recognised(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gamma = torch.ones(2, 16, device="npu"), torch.ones(16, device="npu")
    right = BRIDGES["aclnnRmsNorm"]
    for wrong in (right.arguments[:-1], (*right.arguments, ("more", "i")), (("x", "I"), *right.arguments[1:])):
        monkeypatch.setitem(BRIDGES, "aclnnRmsNorm", replace(right, arguments=wrong))
        with pytest.raises(RuntimeError, match=r"WrongLetter: aclnnRmsNorm: .* hold t t t t"):
            torch.ops.npu.npu_rms_norm(x, gamma, epsilon=1e-6)


def test_a_model_that_disagrees_with_the_host_is_refused(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "npu::npu_swiglu", lambda x, dim: x)
    with pytest.raises(RuntimeError, match=r"the model gives torch.float32 \[2, 16\], the host allocated torch.float32 \[2, 8\]"):
        torch.ops.npu.npu_swiglu(torch.ones(2, 16, device="npu"), -1)


def test_the_refusal_of_a_model_is_the_error_that_is_raised(standin: StandIn) -> None:
    with pytest.raises(RuntimeError, match=r"Refused: npu_scatter_nd_update_: found indices -1"):
        torch.ops.npu.npu_scatter_nd_update_(
            torch.ones(4, 2, device="npu"), torch.tensor([[-1]], device="npu"), torch.ones(1, 2, device="npu")
        )


def test_the_host_code_checks_its_arguments(standin: StandIn) -> None:
    with recording() as record, pytest.raises(RuntimeError, match="bias"):
        torch.ops.npu.npu_moe_gating_top_k(torch.empty(8, 256, device="npu"), 6, bias=torch.empty(7, device="npu"), norm_type=2)
    assert not record.launches("vendor")


def test_an_entry_without_a_bridge_says_what_was_passed(standin: StandIn) -> None:
    with pytest.raises(
        RuntimeError, match=r"aclnnCast has no bridge to a model of its op; integer registers and stack hold t 0x22 t"
    ):
        torch.ops.npu.npu_dtype_cast(torch.ones(2, 16, device="npu", dtype=torch.bfloat16), 290)
