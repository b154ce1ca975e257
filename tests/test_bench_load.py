"""Loading and raw reading are timed in processes of their own."""

from pathlib import Path

import pytest

from tools.bench.cpu import measure_load
from tools.bench.reading import apart
from tools.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "nano"
    assert main(["checkpoint", "make", "--config", "nano", "--seed", "3", "--out", str(out)]) == 0
    return out


def test_rates_of_a_checkpoint(checkpoint: Path) -> None:
    said: list[str] = []
    found = measure_load(checkpoint, said.append, repeats=1)
    assert found["bytes"] == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert found["of_raw"] == found["load_gb_per_s"] / found["raw_gb_per_s"]
    assert len(said) == 1


def test_a_reading_that_fails_is_told(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)ended with code 1.*missing index"):
        apart(tmp_path, "load")
    with pytest.raises(ValueError, match="expected load or raw"):
        apart(checkpoint, "fast")
