"""The growth of decode cost is fitted rightly, and a line through what is no line is seen."""

import json
from pathlib import Path

import pytest

from tests.test_nano_training import shaken, small
from tools.bench.__main__ import main
from tools.bench.nano import fit, growth
from tools.nano.export import export


def rows(csa: float = 0.0) -> list[dict[str, object]]:
    found = []
    for n in (1024, 16384, 2**20):
        seconds = {"sparse_attention[csa]": 1e-4 + csa * n, "index_topk[csa]": 1e-3 + 3 * n / 4 * 5e-9, "sparse_attention[hca]": 1e-4 + 2 * n / 128 * 7e-9}
        found.append({"tokens": n, "seconds": {**seconds, "step": 1.0}, "transformers": None})
    return found


def test_growth() -> None:
    g = growth(rows(), [0, 4, 128, 4, 128, 4])
    assert (g["csa_core"], g["csa_growth"]) == (1, 1)
    assert g["index_topk[csa]"]["ns_per_entry_and_layer"] == pytest.approx(5)
    assert g["sparse_attention[hca]"]["ns_per_entry_and_layer"] == pytest.approx(7)
    assert g["index_topk[csa]"]["worst"] < 1e-6
    assert growth(rows(1e-9), [0, 4, 128, 4, 128, 4])["csa_growth"] > 5


def test_no_line() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert fit(x, [v**2 for v in x])["worst"] > 0.3
    with pytest.raises(ValueError, match="at least 3"):
        fit([1.0, 2.0], [1.0, 2.0])


@pytest.mark.slow
def test_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    export(shaken(small(index_topk=8)), tmp_path / "model")
    common = ["nano", "--checkpoint", str(tmp_path / "model"), "--rounds", "1"]
    assert main([*common, "--contexts", "256,512,1024", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert [r["tokens"] for r in report["rows"]] == [256, 512, 1024]
    assert all(r["transformers"] > 0 for r in report["rows"])
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "| transformers, step |" in capsys.readouterr().out
    assert main([*common, "--contexts", "64,512,1024"]) == 2
    assert "none below 96" in capsys.readouterr().err
