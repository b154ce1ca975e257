"""`v4 generate`: a prompt or a conversation in, streamed text out.

Everything that can be refused (run file, prompt, context) is checked before weights are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import v4
from ops.mutants import Plant
from ops.registry import parse_overrides
from tools.runconfig import RunConfig, nearest, read_run_file
from v4.api import replayed_of
from v4.config import Config
from v4.encoding import encode
from v4.prompt_texts import PromptTexts
from v4.settings import Scope
from v4.tokenizer import BOS, StreamDecoder, Tokenizer

_CHAT_KEYS = ("messages", "tools", "response_format")


@dataclass(frozen=True)
class Request:
    """A checked request: settings, token ids of the prompt, the tokenizer that decodes the answer (None: ids only), and faults to plant."""

    settings: RunConfig
    ids: list[int]
    tokenizer: Tokenizer | None
    plants: tuple[Plant, ...] = ()
    reached: set[Plant] = field(default_factory=set)

    def scope(self, place: str, ops: SimpleNamespace) -> SimpleNamespace:
        """The ops of one part of the model, with the planted faults in."""
        for plant in self.plants:
            ops = plant.scope(place, ops, self.reached)
        return ops


def settings_of(args: argparse.Namespace) -> RunConfig:
    """The run file, if any, with the command line's options on top. ValueError names what is wrong."""
    settings = read_run_file(args.config) if args.config else RunConfig()
    given = {f.name: getattr(args, f.name, None) for f in fields(RunConfig)}
    given["ops"] = parse_overrides(args.ops) if args.ops else None
    return settings.override(given)


def read_chat(path: str) -> list[dict[str, Any]]:
    """Messages of a conversation file. Tools and response format beside the messages go to the leading system message."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; expected a JSON file with messages") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(found, list):
        return found
    if not isinstance(found, dict) or "messages" not in found:
        kind = type(found).__name__
        raise ValueError(f"{path}: found a {kind} without messages, expected a list of messages or {{'messages': [...]}}")
    for key in found:
        if key not in _CHAT_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(key, _CHAT_KEYS)}")
    messages = found["messages"]
    extra = {k: v for k, v in found.items() if k != "messages" and v}
    if not extra or not isinstance(messages, list):
        return messages
    leads = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    first = messages[0] if leads else {"role": "system", "content": ""}
    return [{**first, **extra}, *(messages[1:] if leads else messages)]


def _ids(args: argparse.Namespace, model: Path, tokenizer: Tokenizer | None) -> list[int]:
    if args.ids is not None:
        try:
            return [int(part) for part in args.ids.split(",")]
        except ValueError:
            raise ValueError(f"--ids: found {args.ids!r}, expected integers such as 0,5,7") from None
    if args.prompt is None and args.chat is None:
        raise ValueError('found no prompt; give one as text ("..."), as --chat FILE, or as --ids')
    if tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer.json; give token ids with --ids 0,5,7")
    if args.raw:
        if args.chat is not None:
            raise ValueError("--raw continues plain text; a conversation (--chat) needs the chat format")
        return tokenizer.encode(BOS + args.prompt)
    messages = read_chat(args.chat) if args.chat is not None else [{"role": "user", "content": args.prompt}]
    mode = "thinking" if args.thinking or args.effort else "chat"
    return tokenizer.encode(encode(messages, mode=mode, effort=args.effort, texts=PromptTexts.from_checkpoint(model)))


def prepare(args: argparse.Namespace) -> Request:
    """Check settings, prompt and context length without reading a weight. ValueError names what is wrong and what to do."""
    settings = settings_of(args)
    if settings.model is None:
        raise ValueError("found no checkpoint; give --model DIR, or model: in the run file (v4 checkpoint make writes one)")
    model = Path(settings.model)
    if not model.is_dir():
        raise ValueError(f"{model}: no such directory; expected a checkpoint (v4 checkpoint make --config nano --out {model})")
    config = Config.from_file(model)
    tokenizer = Tokenizer(model) if (model / "tokenizer.json").is_file() else None
    ids = _ids(args, model, tokenizer)
    limit = min(settings.context or config.max_position_embeddings, config.max_position_embeddings)
    if len(ids) + settings.max_new_tokens > limit:
        raise ValueError(
            f"prompt of {len(ids)} and {settings.max_new_tokens} new tokens exceed the context of {limit}; "
            "shorten the prompt, lower --max-new-tokens, or raise --context"
        )
    if settings.speculative and settings.temperature > 0:
        raise ValueError("--speculative verifies greedy drafts: leave --temperature at 0")
    if settings.cuda_graph:
        if settings.speculative:
            raise ValueError("--cuda-graph replays single tokens: leave --speculative off")
        if getattr(args, "plant", None):
            raise ValueError("--cuda-graph replays what was recorded, without the ops: leave --plant off")
        replayed_of(settings.backend)
    plants = tuple(Plant.parse(text) for text in getattr(args, "plant", None) or ())
    known = [
        *(f"layers.{i}" for i in range(config.num_hidden_layers)),
        "head",
        *(f"mtp.{i}" for i in range(config.num_nextn_predict_layers)),
    ]
    for plant in plants:
        if plant.place not in (None, *known):
            raise ValueError(f"--plant {plant}: the model has no part {plant.place!r}{nearest(plant.place, known)}")
    return Request(settings, ids, tokenizer, plants)


def load(request: Request, watch: Scope | None = None) -> v4.LoadedModel:
    """Load the model that the request asks for, with its planted faults in.

    watch: wraps the ops of each part of the model, outside of planted faults, so that a recorder sees what really ran.
    """
    s = request.settings
    if watch is not None and s.cuda_graph:
        raise ValueError("--cuda-graph replays what was recorded, without the ops: a trace needs it off")

    def scope(place: str, ops: SimpleNamespace) -> SimpleNamespace:
        planted = request.scope(place, ops)
        return planted if watch is None else watch(place, planted)

    return v4.load(
        str(s.model),
        backend=s.backend,
        dtype=getattr(torch, s.dtype),
        numerics=s.numerics,
        ops=dict(s.ops) or None,
        strict=s.strict,
        checked=s.checked,
        batch_invariant=s.batch_invariant,
        max_context=s.context,
        mtp=s.speculative,
        scope=scope if request.plants or watch else None,
    )


def answer(request: Request, model: v4.LoadedModel, write: Callable[[str], None]) -> dict[str, Any]:
    """Generate, and pass text on as it becomes complete; the JSON report. ValueError when a planted fault was never reached.

    Keys: text, tokens, tokens_per_second, backend, ops, prompt_tokens, prefill_seconds, stopped, acceptance, plants.
    """
    s = request.settings
    decoder = StreamDecoder(request.tokenizer, skip_special=True) if request.tokenizer else None
    pieces: list[str] = []

    def put(piece: str) -> None:
        if piece:
            pieces.append(piece)
            write(piece)

    def on_token(token: int) -> None:
        put(decoder.feed(token) if decoder else f"{',' if pieces else ''}{token}")

    result = model.generate(
        request.ids,
        s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        seed=s.seed,
        speculative=s.speculative,
        on_token=on_token,
        recorded=s.cuda_graph,
    )
    if decoder:
        put(decoder.finish())
    if missed := [str(p) for p in request.plants if p not in request.reached]:
        raise ValueError(
            f"planted fault {', '.join(missed)} was never reached: no such call in this run (fewer steps, or an op that this model takes as "
            "part of a fused one, as moe_mlp takes grouped_experts); v4 trace record --no-tensors shows which calls there are"
        )
    return {
        "text": "".join(pieces),
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "backend": s.backend,
        "ops": model.binding.table(),
        "prompt_tokens": len(request.ids),
        "prefill_seconds": result.prefill_seconds,
        "stopped": result.stopped,
        "acceptance": result.acceptance if s.speculative else None,
        "plants": [str(p) for p in request.plants],
    }


def stream(piece: str) -> None:
    """Write a piece of text to stdout at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def announce(request: Request, verb: str) -> None:
    """Say on stderr which faults are planted: a wrong answer must never come as a surprise."""
    for plant in request.plants:
        print(f"v4 {verb}: planted fault {plant}: {plant.variant.what}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """The verb; returns the exit code."""
    request = prepare(args)
    announce(request, args.verb)
    model = load(request)
    report = answer(request, model, (lambda piece: None) if args.json else stream)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    print(flush=True)
    accepted = "" if report["acceptance"] is None else f", {report['acceptance']:.0%} of drafts accepted"
    print(
        f"[{report['prompt_tokens']} prompt tokens in {report['prefill_seconds']:.2f} s, {len(report['tokens'])} tokens at "
        f"{report['tokens_per_second']:.1f}/s, backend {report['backend']}, stopped by {report['stopped']}{accepted}]",
        file=sys.stderr,
    )
    if args.explain:
        print("\n" + model.explain())
    return 0
