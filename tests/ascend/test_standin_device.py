"""The host-memory device: torch's own ops, placement errors, host waits, fresh memory, and schemas as the wheel has them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tools.npu_standin import aten, host, schemas
from tools.npu_standin.calls import recording
from tools.npu_standin.install import StandIn

pytestmark = [pytest.mark.standin, pytest.mark.wheel, pytest.mark.device]

OPS: dict[str, Callable[..., object]] = {
    "matmul": lambda t: t @ t.T,
    "softmax": lambda t: t.softmax(-1),
    "topk": lambda t: t.topk(4, -1),
    "mask": lambda t: t[t > 0],
    "fp8": lambda t: t.to(torch.float8_e4m3fn).float(),
    "einsum": lambda t: torch.einsum("ij,kj->ik", t, t),
    "cat": lambda t: torch.cat([t, t], 0).transpose(0, 1).contiguous(),
    "index": lambda t: t.index_select(0, torch.tensor([2, 1], device=t.device)),
    "pad": lambda t: F.pad(t, (1, 2)).clamp_(-1, 1),
    "bincount": lambda t: torch.bincount(t.abs().int().flatten(), minlength=8),
    "scatter": lambda t: t.clone().scatter_(1, torch.zeros(6, 1, dtype=torch.long, device=t.device), 3.0),
    "into a view": lambda t: t.clone().narrow(0, 1, 2).copy_(t[:2]),
    "out": lambda t: torch.add(t, t, out=torch.empty_like(t)),
    "sort": lambda t: t.sort(dim=-1, descending=True, stable=True),
    "cumsum": lambda t: t.cumsum(0),
    "where": lambda t: torch.where(t > 0, t, torch.zeros((), device=t.device)),
    "layer": lambda t: F.layer_norm(t, (32,)),
    "complex": lambda t: torch.view_as_real(torch.view_as_complex(t.view(6, 16, 2)) * torch.view_as_complex(t.view(6, 16, 2))),
}


@pytest.mark.parametrize("name", OPS)
def test_torch_computes_on_the_device_what_it_computes_on_the_cpu(name: str, standin: StandIn) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    here, there = OPS[name](x), OPS[name](x.npu())
    for a, b in zip(*([r] if isinstance(r, torch.Tensor) else list(r) for r in (here, there)), strict=True):  # type: ignore[call-overload]
        assert b.device.type == "npu" and a.dtype == b.dtype and torch.equal(a, b.cpu())


def test_most_ops_are_led_to_the_cpu(standin: StandIn) -> None:
    library, count = aten.route()
    assert count > 900
    library._destroy()
    # what was replaced last is gone now, what install registered is not: the device still computes
    assert torch.equal((torch.ones(2).npu() + 1).cpu(), torch.full((2,), 2.0))


def test_a_host_tensor_among_device_tensors_is_refused(standin: StandIn) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"aten::add: expected all tensors on one device"):
        x.npu() + x
    cos = torch.ones(2, 1, 1, 64)
    with pytest.raises(RuntimeError, match=r"inplace_partial_rotary_mul: expected all tensors on one device"):
        torch.ops.custom.inplace_partial_rotary_mul(
            torch.ones(2, 4, 1, 64).npu(), cos, cos, rotary_mode="interleave", partial_slice=[0, 64]
        )


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "copy to host": lambda t: t.cpu(),
    "copy to device": lambda t: t + torch.ones(4, 4).npu(),
    "aten::nonzero": lambda t: t.nonzero(),
    "aten::repeat_interleave": lambda t: t.repeat_interleave(torch.arange(4).npu(), 0),
    "aten::index": lambda t: t[t > 0],
    "aten::index with host indices": lambda t: t[torch.tensor([1])],
    "stream synchronised": lambda t: t[0, 0].item(),
    "device synchronised": lambda t: torch.npu.synchronize(),
}


@pytest.mark.parametrize("reason", WAITS)
def test_what_makes_the_host_wait_is_counted(reason: str, standin: StandIn) -> None:
    x = torch.ones(4, 4).npu()
    with recording() as quiet:
        (x + 1).sum(-1).view(2, 2).t().contiguous().repeat_interleave(2, -1)
    assert not quiet.waits and quiet.launches("aten").total() >= 3
    with recording() as record:
        WAITS[reason](x)
    assert record.waits[reason] >= 1


def test_launches_are_counted_below_the_host_code_too(standin: StandIn) -> None:
    x, gamma, before = torch.ones(2, 16).npu(), torch.ones(16).npu(), host.launched()
    with recording() as record:
        for _ in range(3):
            torch.ops.npu.npu_rms_norm(x, gamma, epsilon=1e-6)
    assert record.launches("vendor") == {"aclnnRmsNorm": 3} and host.launched() - before == 3


def test_fresh_memory_is_poison(standin: StandIn) -> None:
    # asked of the runtime itself: torch_npu's allocator hands out blocks that were used before
    runtime, memory = host.runtime(), ctypes.c_void_p()
    assert runtime.aclrtMalloc(ctypes.byref(memory), ctypes.c_size_t(4096), 0) == 0
    assert ctypes.string_at(memory.value, 4096) == b"\xcd" * 4096
    runtime.aclrtFree(memory)


def test_vendored_schemas_are_those_of_the_wheel(standin: StandIn) -> None:
    found = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("npu::")}
    text = {str(torch._C.parse_schema(line)) for line in schemas.lines("npu")}
    assert found == text and len(found) == 425


def test_the_cpu_still_works(standin: StandIn) -> None:
    layer = torch.nn.Linear(8, 8)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 8)).sum().backward()
    optimiser.step()
    loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=4, num_workers=2)
    assert sum(len(b) for b in loader) == 8
