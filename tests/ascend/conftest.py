"""Where the tests of the ascend backend run.

Without anything set: level l2 on CPU tensors, each test for the three chips. V4_TEST_SOC=a2|a3|950 takes one chip, V4_TEST_LEVEL=l2|l3 the level
(l3 needs torch_npu and one chip per process; make test-ascend runs it so). V4_TEST_DEVICE=npu runs the same tests on a real device: nothing
is installed, and the chip is what the runtime says. V4_TEST_OWN=1 (l3) runs the tests of this project's own CANN op, alone: both of its halves are
there then, the kernel pretended, and the backend binds it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch

from backends.ascend import own_build
from tools.npu_standin import models, package
from tools.npu_standin.chips import CHIPS, chip
from tools.npu_standin.install import StandIn, install

HARDWARE = os.environ.get("V4_TEST_DEVICE") == "npu"
LEVEL = os.environ.get("V4_TEST_LEVEL", "l2")
OWN = os.environ.get("V4_TEST_OWN") == "1"


def _families() -> list[str]:
    if HARDWARE:
        from backends.ascend.probe import probe

        return [str(probe().soc)]
    if chosen := os.environ.get("V4_TEST_SOC"):
        return [chip(chosen).family]
    if LEVEL == "l3":
        raise pytest.UsageError("V4_TEST_LEVEL=l3 needs V4_TEST_SOC=a2, a3 or 950: torch_npu asks for the chip once per process")
    return [c.family for c in CHIPS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "soc" in metafunc.fixturenames:
        metafunc.parametrize("soc", _families(), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if LEVEL == "l3":  # what does not touch the device has run at l2
        without = [i for i in items if not {"device", "standin"} & set(getattr(i, "fixturenames", ()))]
        config.hook.pytest_deselected(items=without)
        items[:] = [i for i in items if i not in without]
    if not HARDWARE:
        elsewhere = [i for i in items if (i.get_closest_marker("own_op") is not None) != OWN]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [i for i in items if i not in elsewhere]
    for item in items:
        if item.get_closest_marker("wheel") and find_spec("torch_npu") is None:
            item.add_marker(pytest.mark.skip(reason="needs torch_npu: make test-ascend"))
        if item.get_closest_marker("device") and LEVEL != "l3" and not HARDWARE:
            item.add_marker(pytest.mark.skip(reason="needs device npu: V4_TEST_LEVEL=l3, make test-ascend"))
        if item.get_closest_marker("standin") and HARDWARE:
            item.add_marker(pytest.mark.skip(reason="about the stand-in, not about the backend"))


@pytest.fixture
def soc(request: pytest.FixtureRequest) -> Iterator[str]:
    """Chip family of this test, as the backend's probe names it; the vendor's ops are callable for it."""
    family: str = request.param
    before = models.soc()
    if OWN and "torch_npu" not in sys.modules:
        own_build.build()
        package.show()
    if not HARDWARE:
        install(family, LEVEL)
    yield family
    models.set_soc(before)


@pytest.fixture
def standin(soc: str) -> StandIn:
    """The stand-in, for tests that are about it."""
    return install(soc, LEVEL)


@pytest.fixture
def device() -> torch.device:
    """Where the tensors of a test live."""
    return torch.device("npu" if HARDWARE or LEVEL == "l3" else "cpu")


@pytest.fixture
def on_chip() -> Iterator[Callable[[str], None]]:
    """Tells the models which chip they imitate, without installing anything; undone after the test."""
    before = models.soc()
    yield models.set_soc
    models.set_soc(before)
