"""This project's own CANN op with both halves: its compiled torch half on device npu, found kernel, argument checks, Meta, and the backend that binds it.

V4_TEST_OWN=1 V4_TEST_LEVEL=l3 V4_TEST_SOC=a3: the kernel is a model behind a pretended op package. On hardware the real one answers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backends.ascend import own
from backends.ascend.hyper import HC_HEAD
from backends.ascend.probe import probe
from ops.contract import CONTRACTS
from ops.judge import judge
from ops.registry import Binding, bind, load_backend, on_device
from tests.ascend.bound import judge_all
from tests.ascend.conftest import HARDWARE
from tools.npu_standin.calls import recording
from tools.npu_standin.host import BRIDGES, Bridge
from tools.npu_standin.install import StandIn

pytestmark = [pytest.mark.own_op, pytest.mark.wheel, pytest.mark.device]
OP, KERNEL = "hc_head", "aclnnV4HcHead"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAKEN = {"one", "flash", "pro"}
EPS = {"norm_eps": 1e-6, "hc_eps": 1e-6}


@pytest.fixture(autouse=True)
def there(soc: str) -> None:
    probe()
    if why := own.missing(OP):
        assert HARDWARE, why  # on the stand-in both halves must be there
        pytest.skip(why)


def bound(dtype: torch.dtype) -> Binding:
    """With what this machine's own probe says."""
    load_backend("ascend")
    return bind(("ascend",), dtype=dtype, probes={"ascend": probe()}, only=[OP])


def arguments(device: torch.device | str, tokens: int = 2, width: int = 128) -> list[torch.Tensor]:
    shapes = ((4, 4 * width), (1,), (4,))
    g = torch.Generator().manual_seed(0)
    streams = torch.randn(tokens, 4, width, generator=g).bfloat16()
    return [t.to(device) for t in (streams, *(torch.randn(s, generator=g) for s in shapes))]


def call(*args: Any, **kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = torch.ops.v4_ascend.hc_head(*args, **kwargs)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backend_binds_it_and_it_meets_the_contract(dtype: torch.dtype, soc: str, device: torch.device) -> None:
    binding = bound(dtype)
    samples = [s for s in CONTRACTS[OP].samples(dtype, 0) if TAKEN & set(s.tags)]
    with recording() as record:
        labels, verdicts = judge_all(binding, OP, samples, soc, device)
    assert labels == {f"{HC_HEAD} (own, optional)": 9}
    assert not [str(v) for v in verdicts if not v.ok]
    assert HARDWARE or record.launches("vendor")[KERNEL] == 9


def test_other_shapes_fall_to_plain_torch(soc: str, device: torch.device) -> None:
    samples = [s for s in CONTRACTS[OP].samples(torch.bfloat16, 0) if not TAKEN & set(s.tags)]
    labels, verdicts = judge_all(bound(torch.bfloat16), OP, samples, soc, device)
    assert not [str(v) for v in verdicts if not v.ok]
    assert not [label for label in labels if HC_HEAD in label]


@pytest.mark.standin
def test_arguments_reach_the_kernel_in_its_order(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = BRIDGES[KERNEL], {}

    def look(**values: Any) -> None:
        seen.update(values)
        right.fn(**values)

    monkeypatch.setitem(BRIDGES, KERNEL, Bridge(right.name, right.arguments, look))
    args = arguments("cpu", tokens=3)
    call(*(a.npu() for a in args), norm_eps=0.25, hc_eps=0.5)
    for name, wanted in zip(("streams", "fn", "scale", "base"), args, strict=True):
        assert torch.equal(seen[name], wanted), name
    assert (seen["norm_eps"], seen["hc_eps"], tuple(seen["y"].shape)) == (0.25, 0.5, (3, 128))


@pytest.mark.standin
@pytest.mark.parametrize("lost", ["scale", "base", "norm_eps", "hc_eps"])
def test_a_kernel_that_loses_an_argument_is_seen(lost: str, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BRIDGES[KERNEL]

    def wrong(**values: Any) -> None:
        values[lost] = values[lost] * 0 if isinstance(values[lost], torch.Tensor) else 0.1
        right.fn(**values)

    monkeypatch.setitem(BRIDGES, KERNEL, Bridge(right.name, right.arguments, wrong))
    fn = on_device(bound(torch.bfloat16).ops.hc_head, CONTRACTS[OP], standin.device)
    sample = next(s for s in CONTRACTS[OP].samples(torch.bfloat16, 0) if "flash" in s.tags)
    assert not judge(CONTRACTS[OP], fn, sample).ok


WRONG = {
    "type": (lambda a: [a[0].double(), *a[1:]], {}, "streams is Double, expected BFloat16, Half or Float"),
    "dims": (lambda a: [a[0][0], *a[1:]], {}, r"streams has 2 dimensions, expected \[T, 4, D\]"),
    "no token": (lambda a: [a[0][:0], *a[1:]], {}, "there is no token"),
    "streams": (lambda a: [a[0][:, :2].contiguous(), *a[1:]], {}, "found 2 streams, the kernel has 4"),
    "width": (lambda a: [a[0][..., :100].contiguous(), *a[1:]], {}, "width 100 is no multiple of 64 up to 16384"),
    "strided": (lambda a: [a[0].transpose(0, 1).contiguous().transpose(0, 1), *a[1:]], {}, "streams is not contiguous"),
    "fn of hc_pre": (lambda a: [a[0], a[1].repeat(6, 1), *a[2:]], {}, r"fn is Float \[24, 512\], expected Float \[4, 512\]"),
    "fn transposed": (lambda a: [a[0], a[1].T.contiguous().T, *a[2:]], {}, "fn is not contiguous"),
    "fn bf16": (lambda a: [a[0], a[1].bfloat16(), *a[2:]], {}, "fn is BFloat16"),
    "scale of hc_pre": (lambda a: [*a[:2], a[2].repeat(3), a[3]], {}, r"scale is Float \[3\], expected Float \[1\]"),
    "base": (lambda a: [*a[:3], a[3][:3]], {}, r"base is Float \[3\], expected Float \[4\]"),
    "norm_eps": (lambda a: a, {"norm_eps": float("nan")}, "norm_eps is nan"),
    "hc_eps": (lambda a: a, {"hc_eps": -1.0}, "hc_eps is -1"),
}


@pytest.mark.parametrize("where", ["device", "meta"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused(wrong: str, where: str, device: torch.device) -> None:
    change, eps, message = WRONG[wrong]
    args = change(arguments(device if where == "device" else "meta"))
    with recording() as record, pytest.raises(RuntimeError, match=f"hc_head: {message}"):
        call(*args, **{**EPS, **eps})
    assert not record.launches("vendor")[KERNEL]


def test_a_weight_that_was_left_on_the_host_is_refused(device: torch.device) -> None:
    args = arguments(device)
    with pytest.raises(RuntimeError, match="hc_head: base is on cpu, streams on npu:0"):
        call(*args[:3], args[3].cpu(), **EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_agrees_with_the_kernel(dtype: torch.dtype, device: torch.device) -> None:
    streams, *weights = arguments(device)
    results = {}
    for where in ("device", "meta"):
        args = [t if where == "device" else t.to("meta") for t in (streams.to(dtype), *weights)]
        found = call(*args, **EPS)
        results[where] = (found.dtype, found.shape, found.stride())
    assert results["device"] == results["meta"]
    torch.library.opcheck(torch.ops.v4_ascend.hc_head.default, (streams.to(dtype), *weights), EPS, test_utils=("test_schema", "test_faketensor"))


def test_a_number_of_tokens_that_is_not_known_yet_stays_unknown(device: torch.device) -> None:
    with FakeTensorMode():
        assert call(*arguments("meta", tokens=7), **EPS).shape == (7, 128)

    def step(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return call(x, *weights, **EPS)

    args = arguments("meta", tokens=7)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(_Module(step), tuple(args), dynamic_shapes=(({0: tokens}, None, None, None),))
    assert "hc_head" in str(program.graph) and program.module()(*arguments("meta", tokens=9)).shape == (9, 128)


class _Module(torch.nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self._fn = fn

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._fn(*args)
        return found
