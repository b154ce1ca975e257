"""What a node or an environment lacks: one clear message and exit code 2, and everything on the CPU goes on working.

Each case runs in a process of its own. The broken torch_npu is a package of two files in front of the path, which torch would load
by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tools.npu_standin.chips import CHIPS

pytestmark = [pytest.mark.standin]
ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libhccl.so: cannot open shared object file: No such file or directory"
WHEEL = find_spec("torch_npu") is not None
COULD_NOT_RUN = 2


def run(
    *arguments: str, path: Path | None = None, program: tuple[str, ...] = ("-m", "tools.cli")
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("V4_", "TORCH_DEVICE"))}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in (path, ROOT) if p is not None)
    if cache := os.environ.get("V4_CACHE"):
        environment["V4_CACHE"] = cache
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Exit code 2, no traceback, and the last line tells it all."""
    assert done.returncode == COULD_NOT_RUN, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(f in last for f in fragments), done.stderr


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    done = run("checkpoint", "make", "--config", "nano", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def false_package(folder: Path, version: str, body: str) -> Path:
    """A torch_npu that torch finds and loads by itself unless told otherwise; only where no real one is, which make test is for."""
    if WHEEL:
        pytest.skip("runs in an environment without torch_npu: make test")
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu" / "__init__.py").write_text(f"def _autoload():\n    pass\n{body}\n", encoding="utf-8")
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n", encoding="utf-8")
    return folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """torch_npu of the right version without the libraries of CANN."""
    return false_package(tmp_path, f"{torch.__version__.split('+')[0]}", f"raise ImportError({LIBRARY!r})")


def test_the_broken_package_does_break_torch(broken: Path) -> None:
    done = run("-c", "import torch", path=broken, program=())
    assert done.returncode != 0 and "Failed to load the backend extension" in done.stderr


@pytest.mark.parametrize("module", ["v4", "ops", "backends.cpu", "tools.cli", "tools.generate"])
def test_imports_survive_a_broken_torch_npu(module: str, broken: Path) -> None:
    done = run("-c", f"import {module}", path=broken, program=())
    assert done.returncode == 0, done.stderr


CPU_COMMANDS = {
    "generate": ("generate", "--model", "{nano}", "--ids", "0,5,7", "--max-new-tokens", "2"),
    "doctor": ("doctor", "--backend", "cpu"),
    "plan": ("plan", "--config", "flash", "--context", "1000"),
    "checkpoint plan": ("checkpoint", "plan", "--config", "nano"),
    "checkpoint verify": ("checkpoint", "verify", "{nano}"),
    "parity": (
        *("parity", "--backend", "cpu", "--op", "rms_norm", "--dtype", "fp32", "--samples", "1"),
        *("--mutant-seeds", "0", "--legal-seeds", "0", "--min-cases", "1"),
    ),
    "compare": ("compare", "--help"),
    "trace record": ("trace", "record", "--model", "{nano}", "--ids", "0,5,7", "--max-new-tokens", "1", "--out", "{tmp}/trace"),
}


@pytest.mark.parametrize("command", CPU_COMMANDS)
def test_cpu_commands_survive_a_broken_torch_npu(command: str, broken: Path, nano: Path) -> None:
    arguments = [a.format(nano=nano, tmp=broken) for a in CPU_COMMANDS[command]]
    done = run(*arguments, path=broken)
    assert done.returncode == 0, done.stderr[-2000:]


def test_torch_npu_without_cann(broken: Path, nano: Path) -> None:
    refused(
        run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5", path=broken),
        "libhccl.so",
        "CANN",
        "set_env.sh",
    )


def test_doctor_tells_it_too(broken: Path) -> None:
    done = run("doctor", path=broken)
    assert "libhccl.so" in done.stdout and "backend ascend" in done.stdout and "Traceback" not in done.stderr


def test_torch_npu_of_another_torch(tmp_path: Path, nano: Path) -> None:
    path = false_package(tmp_path, "2.10.0", "raise RuntimeError('undefined symbol')")
    done = run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5", path=path)
    refused(done, "torch_npu 2.10.0 does not go with torch", "one minor version")


@pytest.mark.skipif(WHEEL, reason="torch_npu is installed here")
def test_no_torch_npu(nano: Path) -> None:
    refused(
        run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5"), "torch_npu is not installed", "pip install"
    )


@pytest.mark.skipif(WHEEL, reason="torch_npu is installed here")
def test_level_l3_without_torch_npu(nano: Path) -> None:
    done = run("--level", "l3", "--", "doctor", program=("-m", "tools.npu_standin"))
    refused(done, "torch_npu is not installed", "make test-ascend")


@pytest.mark.wheel
def test_the_real_torch_npu_without_cann(nano: Path) -> None:
    refused(run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5"), "libhccl.so", "CANN", "set_env.sh")


@pytest.mark.wheel
def test_a_chip_that_is_not_known(nano: Path) -> None:
    pretend = (
        "import sys; from tools.npu_standin import cann, host; from tools.npu_standin.chips import Chip; from tools import cli;"
        "host.load(cann.build(), Chip('old', '310p', 'Ascend310P3')); sys.exit(cli.main(sys.argv[1:]))"
    )
    done = run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5", program=("-c", pretend))
    refused(done, "'Ascend310P3'", "Ascend910B", "Ascend950")


@pytest.mark.wheel
@pytest.mark.parametrize("chip", [c.alias for c in CHIPS])
def test_a_kernel_that_the_op_package_lacks(chip: str, nano: Path) -> None:
    program = (
        "-m",
        "tools.npu_standin",
        "--soc",
        chip,
        "--level",
        "l3",
        "--lacking",
        "aclnnMoeGatingTopK,aclnnMoeGatingTopKV2",
        "--",
    )
    done = run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5", "--max-new-tokens", "1", program=program)
    refused(done, "aclnnMoeGatingTopK", "install the ops package", "--ops")


@pytest.mark.wheel
@pytest.mark.parametrize("chip, told", [("a3", "older kind"), ("950", "the CANN of this node has no aclnnRmsNorm, which")])
def test_a_kernel_that_torch_npu_replaces_without_a_word(chip: str, told: str, nano: Path) -> None:
    program = ("-m", "tools.npu_standin", "--soc", chip, "--level", "l3", "--lacking", "aclnnRmsNorm", "--")
    done = run("generate", "--model", str(nano), "--backend", "ascend", "--ids", "0,5", "--max-new-tokens", "1", program=program)
    refused(done, "aclnnRmsNorm", told, "nstall the ops package", "--ops")


def test_a_package_that_is_missing_is_named_in_the_table(nano: Path) -> None:
    program = ("-m", "tools.npu_standin", "--soc", "a3", "--packages", "", "--")
    done = run(
        "generate",
        "--model",
        str(nano),
        "--backend",
        "ascend",
        "--ids",
        "0,5",
        "--max-new-tokens",
        "1",
        "--explain",
        program=program,
    )
    assert done.returncode == 0, done.stderr
    line = next(text for text in (done.stdout + done.stderr).splitlines() if text.startswith("rope "))
    assert "custom" in line and "install the custom_ops package" in line


@pytest.mark.parametrize("chip", ["a2", "a3"])
@pytest.mark.parametrize("numerics", ["stored", "reference"])
def test_a_checkpoint_of_a_mode_that_the_chip_lacks(numerics: str, chip: str, nano: Path) -> None:
    program = ("-m", "tools.npu_standin", "--soc", chip, "--")
    done = run("generate", "--model", str(nano), "--backend", "ascend", "--numerics", numerics, "--ids", "0,5", program=program)
    refused(done, "FP4 and FP8", f"--target ascend-{chip}-w8a8", "--numerics exact")


def test_an_int8_checkpoint_has_no_official_round_trips(nano: Path, tmp_path: Path) -> None:
    done = run("checkpoint", "convert", str(nano), "--target", "ascend-a3-w8a8", "--out", str(tmp_path / "int8"))
    assert done.returncode == 0, done.stderr
    arguments = ("generate", "--model", str(tmp_path / "int8"), "--backend", "ascend", "--numerics", "reference", "--ids", "0,5")
    refused(run(*arguments, program=("-m", "tools.npu_standin", "--soc", "a3", "--")), "is INT8", "numerics='stored'")


def test_an_unknown_chip_on_the_command_line() -> None:
    done = run("--soc", "a7", "--", "doctor", program=("-m", "tools.npu_standin"))
    assert done.returncode == COULD_NOT_RUN and "invalid choice: 'a7'" in done.stderr
