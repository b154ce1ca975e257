"""The long fixed texts of the prompt format: tools section, response format, effort preambles.

They belong to a checkpoint, so they are read from its own files (parsed, never executed) and compared with the published hashes.
Checkpoints that we make carry the texts of `own_texts_file()`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from string import Formatter

from v4.prompt_own import own_texts_file
from v4.tokenizer import DSML, END_THINK, THINK

__all__ = ["PromptTexts", "digest", "identify", "own_texts_file", "read_constants"]

TOOLS_TEMPLATE_SHA256 = "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8"
TOOLS_RENDERED_SHA256 = "c7d3159308f7d076bee8974ece110fda1f92f6e577306e602ba2b466b4dcd904"
FORMAT_TEMPLATE_SHA256 = "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5"
FULL_EFFORT_SHA256 = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"

TOOLS_HEADING, SCHEMAS_HEADING, FORMAT_HEADING = "## Tools", "### Available Tool Schemas", "## Response Format:"
_TOKENS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": END_THINK}
_MOST_BYTES = 1 << 20

Constants = dict[str, "str | dict[str, str]"]


def digest(text: str) -> str:
    """SHA-256 of the UTF-8 bytes, in hexadecimal."""
    return sha256(text.encode("utf-8")).hexdigest()


def _fill(template: str, **values: str) -> str:
    return "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in Formatter().parse(template))


def _check_template(what: str, template: str, slot: str, allowed: Mapping[str, str]) -> None:
    """Only plain slots: a template out of a file must not reach into objects through attributes or format codes."""
    fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    bad = [name for name, spec, conversion in fields if name not in {slot, *allowed} or spec or conversion]
    if bad:
        raise ValueError(
            f"{what}: found slot {{{bad[0]}}}, expected only {{{'}, {'.join([slot, *allowed])}}}; is the encoding file intact?"
        )
    if slot not in [name for name, _, _ in fields]:
        raise ValueError(f"{what}: found no slot {{{slot}}}; is the encoding file intact?")


@dataclass(frozen=True)
class PromptTexts:
    """Fixed texts of one checkpoint; None or missing where its files do not hold them.

    tools, response_format: `str.format` templates. efforts: level -> preamble ("" for none): {high, max} in preview releases,
    {low, high, max} from 0731 on. default_effort: the level meant by None. source: the texts' file, or why there are none.
    """

    tools: str | None = None
    response_format: str | None = None
    efforts: Mapping[str, str] = field(default_factory=dict)
    default_effort: str | None = None
    source: str = "no encoding file and no chat template was read"

    def __post_init__(self) -> None:
        if self.tools is not None:
            _check_template("tools section", self.tools, "tool_schemas", _TOKENS)
        if self.response_format is not None:
            _check_template("response format", self.response_format, "schema", {})
        if self.default_effort is not None and self.default_effort not in self.efforts:
            raise ValueError(f"default effort: found {self.default_effort!r}, expected one of {sorted(self.efforts)}")

    @property
    def release(self) -> str:
        """ "preview" (levels high, max), "0731" (low, high, max; also 0813) or "unknown" (no preambles)."""
        return "unknown" if not self.efforts else "0731" if "low" in self.efforts else "preview"

    def render_tools(self, schemas: list[str]) -> str:
        """The tools section for schemas in JSON, one per line. Raises ValueError when the checkpoint has no such text."""
        if self.tools is None:
            raise self._absent("tools section")
        return _fill(self.tools, tool_schemas="\n".join(schemas), **_TOKENS)

    def render_format(self, schema: str) -> str:
        """The response-format section for a schema in JSON. Raises ValueError when the checkpoint has no such text."""
        if self.response_format is None:
            raise self._absent("response-format section")
        return _fill(self.response_format, schema=schema)

    def preamble(self, effort: str | None) -> str:
        """Text after BOS in thinking mode for an effort level; None is the release's default. Raises ValueError if unknown."""
        level = self.default_effort if effort is None else effort
        if level is None:
            return ""
        if level not in self.efforts:
            found = f"effort: found {level!r}, expected None" + "".join(f", {known!r}" for known in self.efforts)
            raise ValueError(f"{found} for this checkpoint (release {self.release}; texts: {self.source})")
        return self.efforts[level]

    def check(self) -> dict[str, str]:
        """Text name -> "official" (published hash), "own wording", "unverified" (no hash is published) or "absent"."""

        def verdict(found: str | None, *hashes: str) -> str:
            return "absent" if found is None else "official" if digest(found) in hashes else "own wording"

        result = {
            "tools": verdict(self.tools, TOOLS_TEMPLATE_SHA256),
            "response_format": verdict(self.response_format, FORMAT_TEMPLATE_SHA256),
        }
        if self.tools is not None and digest(self.render_tools([])) == TOOLS_RENDERED_SHA256:
            result["tools"] = "official"
        for level, text in self.efforts.items():
            if text:
                full = level == ("high" if self.release == "0731" else "max")
                result[f"effort_{level}"] = verdict(text, FULL_EFFORT_SHA256) if full else "unverified"
        return result

    def _absent(self, what: str) -> ValueError:
        return ValueError(
            f"this prompt needs the {what}, and the checkpoint has none ({self.source}); "
            "expected it in encoding/*.py or chat_template.jinja of the checkpoint: copy that file from the release"
        )

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> PromptTexts:
        """Texts of a checkpoint directory: its encoding file, else its Jinja template, else none (with the reason in `source`).

        Raises ValueError for a file that cannot be parsed, or two encoding files that disagree.
        """
        path = Path(path)
        found: list[PromptTexts] = []
        for file in sorted((path / "encoding").glob("*.py")):
            texts = cls.from_encoding_file(file)
            if texts.tools or texts.response_format or texts.efforts:
                found.append(texts)
        for other in found[1:]:
            if (other.tools, other.response_format, other.efforts) != (
                found[0].tools,
                found[0].response_format,
                found[0].efforts,
            ):
                raise ValueError(f"{found[0].source} and {other.source} hold different texts; keep the one that the release uses")
        return found[0] if found else cls._from_template_files(path)

    @classmethod
    def _from_template_files(cls, path: Path) -> PromptTexts:
        file = path / "chat_template.jinja"
        if file.is_file():
            return cls.from_jinja(_read(file), str(file))
        config = path / "tokenizer_config.json"
        template = json.loads(_read(config)).get("chat_template") if config.is_file() else None
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return cls.from_jinja(template, str(config)) if isinstance(template, str) else cls()

    @classmethod
    def from_encoding_file(cls, file: str | Path) -> PromptTexts:
        """Texts among the module-level string constants of a Python file; nothing in it is executed."""
        return identify(read_constants(_read(Path(file)), str(file)), str(file))

    @classmethod
    def from_jinja(cls, template: str, source: str) -> PromptTexts:
        """Texts among the literals of a Jinja chat template, which is parsed and not rendered.

        Without the package jinja2 nothing is read, and `source` says so. Raises ValueError for a template that does not parse.
        """
        if importlib.util.find_spec("jinja2") is None:
            return cls(source=f"{source} is a Jinja template, and the package jinja2 is not installed")
        from v4.prompt_jinja import read_template

        return identify(read_template(template, source), source)


def _read(file: Path) -> str:
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(
            f"{file}: found {file.stat().st_size} bytes, expected at most {_MOST_BYTES}; this is no prompt text file"
        )
    return file.read_text(encoding="utf-8")


def read_constants(code: str, source: str) -> Constants:
    """Names assigned at module level to strings (also concatenated or parenthesised) or dicts of strings. Nothing is executed."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{source}: not readable as Python ({error}); fetch the file again") from error
    known: Constants = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        value = _constant(node.value, known) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value else None
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                known[target.id] = value
    return known


def _constant(node: ast.expr, known: Constants) -> str | dict[str, str] | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _constant(node.left, known), _constant(node.right, known)
        return left + right if isinstance(left, str) and isinstance(right, str) else None
    if isinstance(node, ast.Dict):
        pairs = [
            (_constant(key, known) if key else None, _constant(value, known))
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        strings = {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, str)}
        return strings if len(strings) == len(pairs) else None
    return None


def _strings(constants: Constants) -> Iterator[tuple[str, str]]:
    for name, value in constants.items():
        if isinstance(value, str):
            yield name.lower(), value


def _pick(constants: Constants, hashes: set[str], name: str, *marks: str) -> str | None:
    """By published hash, else by name, else the only text with all marks."""
    strings = list(_strings(constants))
    matching = [text for _, text in strings if digest(text) in hashes] or [text for known, text in strings if known == name]
    return next(iter(matching or [text for _, text in strings if all(mark in text for mark in marks)]), None)


def _efforts(constants: Constants) -> tuple[dict[str, str], str | None]:
    names = dict(_strings(constants))
    for name, value in constants.items():
        if name.lower() == "reasoning_effort_prompts" and isinstance(value, dict):
            return value, names.get("default_reasoning_effort", "low" if "low" in value else None)
    high, top = names.get("reasoning_effort_high"), names.get("reasoning_effort_max")
    if top is None:
        full = next((text for text in names.values() if digest(text) == FULL_EFFORT_SHA256), None)
        beyond = next((text for text in names.values() if text.startswith("Reasoning Effort: Beyond")), None)
        high, top = (full, beyond) if beyond is not None else (None, full)
    if top is None:
        return {}, None
    return ({"high": "", "max": top}, "high") if high is None else ({"low": "", "high": high, "max": top}, "low")


def identify(constants: Constants, source: str) -> PromptTexts:
    """Which constant is which text: published hashes first, then the names of the releases, then the headings.

    Names, in any case: TOOLS_TEMPLATE, RESPONSE_FORMAT_TEMPLATE, REASONING_EFFORT_PROMPTS with DEFAULT_REASONING_EFFORT, or
    REASONING_EFFORT_MAX alone (preview levels) or with REASONING_EFFORT_HIGH (0731 levels).
    """
    tools = _pick(constants, {TOOLS_TEMPLATE_SHA256}, "tools_template", TOOLS_HEADING, "{tool_schemas}")
    response_format = _pick(constants, {FORMAT_TEMPLATE_SHA256}, "response_format_template", FORMAT_HEADING, "{schema}")
    efforts, default = _efforts(constants)
    return PromptTexts(tools, response_format, efforts, default, source)
