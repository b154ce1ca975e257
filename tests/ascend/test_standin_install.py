"""The stand-in: vendor schemas, ops that can be called, records, refusals, and torch's own ops on the pretended device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tools.npu_standin import schemas
from tools.npu_standin.calls import recording
from tools.npu_standin.install import StandIn, install

pytestmark = pytest.mark.standin


@pytest.mark.parametrize(("namespace", "count"), [("npu", 425), ("custom", 31), ("cann_ops_transformer", 11), ("_C_ascend", 55)])
def test_every_vendored_schema_parses(namespace: str, count: int) -> None:
    names = [torch._C.parse_schema(line).name for line in schemas.lines(namespace)]
    assert len(names) == count and all(n.startswith(f"{namespace}::") for n in names)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="custom.npu_absent|npu_absent"):
        schemas.schema("custom::npu_absent")
    with pytest.raises(ValueError, match="unknown SoC 'a7'"):
        install("a7")
    with pytest.raises(ValueError, match="unknown level"):
        install("a3", "l4")
    with pytest.raises(ValueError, match="unknown packages vendor"):
        install("a3", "l2", packages=("vendor",))


def test_a_vendor_op_answers(standin: StandIn, device: torch.device) -> None:
    x, gamma = torch.randn(5, 256).bfloat16(), torch.rand(256).bfloat16()
    with recording() as record:
        y, rstd = torch.ops.npu.npu_rms_norm(x.to(device), gamma.to(device), epsilon=1e-6)
    assert torch.equal(y.cpu(), F.rms_norm(x.float(), (256,), gamma.float(), 1e-6).bfloat16()) and rstd.shape == (5, 1)
    assert record.launches("vendor").total() == 1
    assert record.calls[-1].args["epsilon"] == 1e-6


def test_an_op_of_another_package_answers_in_place(standin: StandIn, device: torch.device) -> None:
    x = torch.randn(2, 3, 1, 512, device=device).bfloat16()
    cos, sin = torch.zeros(2, 1, 1, 64, device=device), torch.ones(2, 1, 1, 64, device=device)
    before = x.cpu().clone()
    torch.ops.custom.inplace_partial_rotary_mul(x, cos, sin, rotary_mode="interleave", partial_slice=[448, 512])
    after = x.cpu()
    assert torch.equal(after[..., :448], before[..., :448])
    assert torch.equal(after[..., 448::2], -before[..., 449::2]) and torch.equal(after[..., 449::2], before[..., 448::2])


def test_a_package_that_is_not_installed_has_no_ops(standin: StandIn) -> None:
    assert "_C_ascend" not in standin.packages
    assert not [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("_C_ascend::")]


def test_another_installation_needs_another_process(standin: StandIn) -> None:
    with pytest.raises(ValueError, match="needs a process of its own"):
        install(standin.chip.alias, standin.level, packages=())


def test_an_op_without_a_model_is_refused(standin: StandIn, device: torch.device) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="(?i)confusion_?transpose"):
        torch.ops.npu.npu_confusion_transpose(torch.ones(2, 3, device=device), [1, 0], [2, 3], True)
