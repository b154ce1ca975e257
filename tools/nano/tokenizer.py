"""The nano model's own byte-level BPE: trained on its data, with the special strings that the prompt format needs.

A digit, a run of letters or a run of other signs is a word, with the one space before it: " 4" and " red" are single tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Built

from tools.nano.documents import copying, counting, own_texts, recall, story, tool_call
from tools.nano.facts import FAMILIES, keys, make
from v4.tokenizer import BOS, DSML, END_THINK, EOS, SPECIAL_IDS, THINK

SPECIAL = tuple(sorted(SPECIAL_IDS, key=lambda s: SPECIAL_IDS[s]))
"""Special strings in the order of their ids here: BOS 0, EOS 1, PAD 2, then the others."""

_TEXT = frozenset((THINK, END_THINK, DSML))
_WORD = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\n+|\s"


def corpus(seed: int, documents: int = 1500) -> Iterable[str]:
    """Sample documents of every kind as plain text without special strings; every key of every fact comes at least once."""
    r, texts = Random(seed), own_texts()
    for family in FAMILIES:
        for key in keys(family):
            fact = make(family, key, r)
            yield f" {fact.text}\n\n{fact.question}"
    for n in range(documents):
        kind = (recall(r, 400), story(r, 400), copying(r), counting(r), tool_call(r, texts) if n % 10 == 0 else [])[n % 5]
        text = "".join(piece.text for piece in kind)
        for special in SPECIAL:
            text = text.replace(special, "\n")
        yield text


def train(vocabulary: int, seed: int = 0) -> Built:
    """A byte-level BPE of `vocabulary` ids, place holders behind the words. ValueError when that is less than specials and bytes need."""
    if vocabulary < 256 + len(SPECIAL):
        raise ValueError(f"vocabulary {vocabulary}: expected at least {256 + len(SPECIAL)}")
    built = Built(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORD), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    added = [AddedToken(s, special=s not in _TEXT, normalized=False) for s in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=added, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(corpus(seed), trainer)
    first = built.get_vocab_size()
    # an id without a token could be generated and not be decoded
    built.add_special_tokens([AddedToken(f"<｜place▁holder▁no▁{n}｜>", special=True) for n in range(vocabulary - first)])
    return built


def write(built: Built, path: str | Path) -> None:
    """Store as tokenizer.json."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    built.save(str(path), pretty=False)


def config_file() -> bytes:
    """tokenizer_config.json of a checkpoint with this tokenizer."""
    values = {
        "add_bos_token": False, "add_eos_token": False, "bos_token": BOS, "clean_up_tokenization_spaces": False, "eos_token": EOS,
        "model_max_length": 1048576, "pad_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()
