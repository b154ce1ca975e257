"""`v4 trace record`, `replay` and `show`: what is written, what is judged, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ops.contract import CONTRACTS
from ops.trace import Trace, TraceError
from ops.trace.compact import cuts
from ops.trace.lineage import Lineage
from ops.trace.record import checksum, raw
from tests import tiny
from tools.cli import main
from tools.trace import selection

ROOT = Path(__file__).resolve().parent.parent
PROMPT = ",".join(map(str, tiny.tokens(150)))
RUN = ("--ids", PROMPT, "--max-new-tokens", "6")


def record(out: Path, *options: str, model: str = "flash") -> int:
    return main(["trace", "record", "--out", str(out), "--model", str(tiny.checkpoint(model)), *RUN, *options])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 with the tensors of one CSA layer, weights included."""
    folder = tmp_path_factory.mktemp("traces") / "one"
    assert record(folder, "--places", "2") == 0
    return folder


@pytest.fixture
def copy(trace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trace, tmp_path / "copy"))


def replay(folder: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["trace", "replay", str(folder), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err, captured.err
    assert captured.err.startswith("v4 trace: ") and "Traceback" not in captured.err


# ---- what is written ---------------------------------------------------------------------------------------------------


def test_every_call_has_checksums_and_the_chosen_ones_tensors(trace: Path) -> None:
    found = Trace(trace)
    assert found.end is not None and found.end["failed"] is None and len(found.end["tokens"]) == 6
    assert [r["n"] for r in found.records] == list(range(len(found.records)))
    assert {r["place"] for r in found.records} == {*(f"layers.{i}" for i in range(5)), "head"}
    assert {r["step"] for r in found.records} == set(range(6))
    assert {r["place"] for r in found.kept} == {"layers.2"} and len(found.kept) > 100
    tensors = [
        form for r in found.records for form in (*r["in"].values(), *r["out"]) if isinstance(form, dict) and "shape" in form
    ]
    assert all("crc" in form or "parameter" in form for form in tensors)


def test_results_are_traced_to_the_calls_that_read_them(trace: Path) -> None:
    found = Trace(trace)
    links = {(r["op"], name): found.records[n]["op"] for r in found.records for name, (n, _) in r.get("from", {}).items()}
    assert links["sparse_attention", "q_THC"] == "q_norm_rope"
    assert links["sparse_attention", "cmp_index"] == "index_topk"
    assert links["moe_mlp", "weights_TK"] in ("gate_topk", "gate_hash")
    assert links["hc_post", "comb_Tnn"] == "hc_pre"
    assert all(link.intact for r in found.records for link in found.links(r).values())


def test_tracing_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny.checkpoint("flash")), *RUN, "--speculative", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert record(tmp_path / "t", "--speculative", "--json") == 0
    traced = json.loads(capsys.readouterr().out)
    assert traced["run"]["tokens"] == plain["tokens"]
    assert {"trace", "bytes", "calls", "kept", "left_out", "tensor_bytes", "run"} == set(traced)
    assert "mtp.0" in {r["place"] for r in Trace(tmp_path / "t").records}


def test_the_size_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path / "t", "--limit-mib", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] > 0 < found["kept"] and found["tensor_bytes"] <= 2 * 2**20
    stored = sum(f.stat().st_size for f in (tmp_path / "t").glob("*.safetensors"))
    assert found["tensor_bytes"] <= stored < found["tensor_bytes"] * 1.3
    assert Trace(tmp_path / "t").kept


def test_checksums_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path / "t", "--no-tensors") == 0
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["calls.jsonl"]
    refused(["replay", str(tmp_path / "t")], "0 with tensors, none of them asked for: record with tensors", capsys)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.int64, torch.bool])
def test_a_checksum_is_that_of_the_bytes_in_order(stored: torch.dtype) -> None:
    import zlib

    t = torch.arange(24).reshape(4, 6).to(torch.uint8).view(torch.bool if stored == torch.bool else torch.uint8)
    t = t if stored == torch.bool else t.float().to(stored)
    for view in (t, t.T, t[1:], t[:, 2:5], t[:0]):
        assert checksum(view) == zlib.crc32(view.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        assert bytes(raw(view)) == view.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_lineage_forgets_memory_that_is_gone() -> None:
    lineage, made = Lineage(), torch.ones(4)
    lineage.made(made, 7, 1, checksum(made))
    link = lineage.of(made.view(2, 2), checksum(made))
    assert link is not None and (link.number, link.output, link.intact) == (7, 1, True)
    assert lineage.of(made[:2], checksum(made[:2])) is None
    made += 1
    changed = lineage.of(made, checksum(made))
    assert changed is not None and not changed.intact
    address = made.data_ptr()
    del made, link, changed
    lineage.prune()
    assert address not in lineage._results


@pytest.mark.parametrize("used", [[[3, 1, 0]], [[9, 0, 0]]])
def test_caches_are_cut_to_the_blocks_in_use(used: list[list[int]]) -> None:
    cache, table = torch.randn(10, 4, 8), torch.tensor(used, dtype=torch.int32)
    (cut,) = cuts("sparse_attention", {"window_cache": cache, "window_table": table, "cmp_cache": None})
    small = cut.of(cache)
    assert small.shape[0] < 10 or used == [[3, 1, 0]]
    for old, new in zip(used[0], cut.renumbered[0].tolist(), strict=True):
        assert torch.equal(small[new], cache[old])
    outside = torch.tensor([[10, 0, 0]], dtype=torch.int32)
    assert cuts("sparse_attention", {"window_cache": cache, "window_table": outside, "cmp_cache": None}) == []


# ---- replay -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "cpu_invariant"])
def test_a_right_run_replays_green(backend: str, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(trace, "--backend", backend, capsys=capsys)
    assert code == 0 and found["ok"] and not found["wrong"]
    assert found["calls"] == len(Trace(trace).kept) == sum(row["calls"] for row in found["by_op"].values())
    assert all(0 <= row["replayed_worst"] <= 1 for row in found["by_op"].values())


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_runs_replay_green(numerics: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path / "t", "--dtype", dtype, "--numerics", numerics, "--steps", "0-1,4") == 0
    code, found = replay(tmp_path / "t", capsys=capsys)
    assert code == 0, found["wrong"][:3]


def test_a_fault_planted_when_recording_is_located(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path / "t", "--plant", "compress:state_not_stored@layers.2#4") == 0
    code, found = replay(tmp_path / "t", capsys=capsys)
    assert code == 1 and not found["ok"] and found["first_replayed"] is None
    assert found["first_recorded"]["where"] == "compress@layers.2#4"
    assert main(["trace", "bisect", "--trace", str(tmp_path / "t"), "--json"]) == 1
    first = json.loads(capsys.readouterr().out)["first"]
    assert (first["op"], first["place"], first["count"], first["step"]) == ("compress", "layers.2", 4, 2)


def test_a_fault_planted_in_the_replay_is_located(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(trace, "--plant", "sparse_attention:window_short@layers.2#3", capsys=capsys)
    assert code == 1 and found["first_recorded"] is None
    assert [w["where"] for w in found["wrong"]] == ["sparse_attention@layers.2#3"]
    assert main(["trace", "replay", str(trace), "--plant", "sparse_attention:window_short@layers.2#3"]) == 1
    assert "FIRST WRONG as replayed on cpu: sparse_attention@layers.2#3 (step 3" in capsys.readouterr().out


def test_a_fault_planted_where_no_call_is_is_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "planted fault hc_head:mean@head#99 meets none of the"
    refused(["replay", str(trace), "--plant", "hc_head:mean@head#99"], message, capsys)


def test_a_fault_without_effect_is_said_to_be_one(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of ordinary size do not show which epsilon is added to their mean square."""
    assert main(["trace", "replay", str(trace), "--plant", "rms_norm:eps_times_10@layers.2#0"]) == 0
    assert "rms_norm:eps_times_10@layers.2#0: reached, but no input of this run shows it" in capsys.readouterr().out


def test_weights_come_from_the_checkpoint_when_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path / "t", "--no-weights", "--places", "3") == 0
    refused(["replay", str(tmp_path / "t")], "recorded without weights: give the checkpoint with --checkpoint DIR", capsys)
    code, found = replay(tmp_path / "t", "--checkpoint", str(tiny.checkpoint("flash")), capsys=capsys)
    assert code == 0, found["wrong"][:3]
    other = str(tiny.checkpoint("pro"))
    refused(["replay", str(tmp_path / "t"), "--checkpoint", other], "another model than the one recorded", capsys)
    reseeded = str(tiny.checkpoint("flash", seed=1))
    refused(["replay", str(tmp_path / "t"), "--checkpoint", reseeded], "are not the weights that were recorded", capsys)


def test_replay_needs_nothing_but_torch_and_safetensors(trace: Path) -> None:
    absent = ("tokenizers", "yaml", "tqdm", "transformers", "rich", "huggingface_hub", "jinja2", "matplotlib")
    code = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\nfrom tools.cli import main\n"
        f"sys.exit(main(['trace', 'replay', {str(trace)!r}]) or main(['trace', 'bisect', '--trace', {str(trace)!r}, '--places', '2']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all right" in done.stdout and "nothing wrong" in done.stdout


def test_show_tells_what_a_trace_holds(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["trace", "show", str(trace), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 6 and found["with_tensors"] == len(Trace(trace).kept) and found["end"]["failed"] is None
    assert main(["trace", "show", str(trace)]) == 0
    assert "complete" in capsys.readouterr().out


# ---- what is refused ----------------------------------------------------------------------------------------------------


def _lines(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = folder / "calls.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def _header(folder: Path, **changes: Any) -> None:
    _lines(folder, lambda lines: [json.dumps({**json.loads(lines[0]), **changes}), *lines[1:]])


def _flip(folder: Path) -> None:
    path = next(folder.glob("tensors-*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _shorten(folder: Path) -> None:
    path = next(folder.glob("tensors-*"))
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no lines": (lambda f: (f / "calls.jsonl").unlink(), "no trace: calls.jsonl is missing"),
    "empty": (lambda f: (f / "calls.jsonl").write_text(""), "its first line is not a v4-trace header"),
    "foreign": (lambda f: (f / "calls.jsonl").write_text('{"a": 1}\n'), "its first line is not a v4-trace header"),
    "not json": (lambda f: (f / "calls.jsonl").write_bytes(b"\x89PNG\xff\xfe"), "its first line is not a v4-trace header"),
    "other format": (lambda f: _header(f, version=99), "trace format 99, expected 1"),
    "cut off": (lambda f: _lines(f, lambda ls: ls[:-1]), "the closing line is missing"),
    "cut in a line": (lambda f: _lines(f, lambda ls: [*ls[:-2], ls[-2][:50]]), "damaged or cut off"),
    "lost lines": (lambda f: _lines(f, lambda ls: [*ls[:5], *ls[9:]]), "the closing line counts"),
    "foreign line": (lambda f: _lines(f, lambda ls: [*ls[:5], '{"x": 1}', *ls[5:]]), "line 6: not a recorded call"),
    "other contract": (lambda f: _header(f, contracts={"rms_norm": "0: (x)"}), "recorded with another contract of"),
    "unknown op": (
        lambda f: _lines(f, lambda ls: [s.replace('"op":"hc_pre"', '"op":"hc_prae"') for s in ls]),
        "an op that this version does",
    ),
    "tensors gone": (lambda f: next(f.glob("tensors-*")).unlink(), "missing; the trace has it with"),
    "tensors short": (_shorten, "copied in part?"),
    "bit flipped": (_flip, "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_trace_is_refused(damage: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = DAMAGE[damage]
    spoil(copy)
    refused(["replay", str(copy)], message, capsys)
    refused(["bisect", "--trace", str(copy), "--all"], message, capsys)


def test_a_newer_contract_refuses_older_recordings(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTRACTS["rope"], "version", 2)
    with pytest.raises(TraceError, match="recorded with another contract of rope"):
        Trace(trace)


def test_what_was_cut_off_can_be_looked_at(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _lines(copy, lambda lines: [*lines[: len(lines) // 2], lines[len(lines) // 2][:40]])
    code, found = replay(copy, "--partial", capsys=capsys)
    assert code == 0 and 0 < found["calls"] < 100
    assert main(["trace", "show", str(copy), "--partial"]) == 0
    assert "cut off" in capsys.readouterr().out


def test_nothing_is_overwritten(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in trace.iterdir()}
    command = ["record", "--model", str(tiny.checkpoint("flash")), *RUN, "--out"]
    refused([*command, str(trace)], "a trace is there; give another folder, or --overwrite", capsys)
    assert {p.name: p.stat().st_mtime_ns for p in trace.iterdir()} == before
    (tmp_path / "diary.txt").write_text("mine")
    refused([*command, str(tmp_path), "--overwrite"], "found diary.txt in it; give another folder", capsys)
    refused([*command, str(tmp_path / "diary.txt")], "is a file, expected a folder", capsys)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_a_run_that_fails_leaves_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impl = CONTRACTS["clamped_swiglu"].impls["cpu"]

    def broken(gate_up_T2I: Tensor, *, limit: float, row_weight: Tensor | None = None) -> Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setitem(CONTRACTS["clamped_swiglu"].impls, "cpu", type(impl)(**{**vars(impl), "fn": broken}))
    with pytest.raises(RuntimeError, match="device lost"):
        record(tmp_path / "t")
    found = Trace(tmp_path / "t")
    assert found.end is not None and found.end["failed"] == "RuntimeError: device lost" and len(found.records) > 10
    assert main(["trace", "show", str(tmp_path / "t")]) == 0
    assert "RuntimeError: device lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--places", "7"), "there is no part 'layers.7'"),
        (("--places", "haed"), "did you mean 'head'?"),
        (("--only", "rms_nrom"), "did you mean 'rms_norm'?"),
        (("--steps", "3-1"), "found '3-1', expected numbers and ranges"),
        (("--limit-mib", "0"), "--limit-mib: found 0.0"),
        (("--plant", "rms_norm:nan@layers.9"), "the model has no part 'layers.9'"),
    ],
)
def test_wrong_options_are_refused_before_weights_are_read(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import v4

    monkeypatch.setattr(v4, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    refused(["record", "--out", str(tmp_path / "t"), "--model", str(tiny.checkpoint("flash")), *RUN, *options], message, capsys)
    assert not (tmp_path / "t").exists()


def test_a_trace_and_a_run_exclude_each_other(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["bisect", "--trace", str(trace), "--model", "x"], "leave out the model and the prompt, or leave out --trace", capsys)
    refused(["bisect"], "found no checkpoint", capsys)
    refused(["replay", str(trace), "--backend", "cdua"], "unknown backend 'cdua'", capsys)


def test_selections() -> None:
    chosen = selection.parse("0-1,head", "rope", "2,4-5", ["layers.0", "layers.1", "layers.2", "head"])
    assert chosen("layers.1", "rope", 4) and chosen("head", "rope", 2)
    assert not chosen("layers.2", "rope", 4) and not chosen("layers.1", "rms_norm", 4) and not chosen("layers.1", "rope", 3)
    assert selection.parse(None, None, None, [])("anything", "rope", 9)
