"""Fixed prompt texts: read from a checkpoint's files without executing them, recognised, and compared with published hashes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from v4 import prompt_texts
from v4.prompt_texts import PromptTexts, digest, identify, own_texts_file, read_constants

TOOLS = "## Tools\n\nuse <{dsml_token}tool_calls> {{}}\n\n### Available Tool Schemas\n\n{tool_schemas}\n\nend\n"
FORMAT = "## Response Format:\n\nas:\n{schema}"


def checkpoint(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_own_texts(tmp_path: Path) -> None:
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_v4.py").write_bytes(own_texts_file())
    texts = PromptTexts.from_checkpoint(tmp_path)
    assert texts.release == "0731" and texts.default_effort == "low" and texts.source.endswith("encoding_v4.py")
    own = {"tools": "own wording", "response_format": "own wording", "effort_high": "own wording", "effort_max": "unverified"}
    assert texts.check() == own
    preview = identify(read_constants(own_texts_file("preview").decode(), "p"), "p")
    assert preview.release == "preview" and preview.check()["effort_max"] == "own wording"
    with pytest.raises(ValueError, match="found '0813', expected '0731' or 'preview'"):
        own_texts_file("0813")


def test_files_are_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = (
        f"import pathlib\npathlib.Path({str(mark)!r}).write_text('x')\nraise SystemExit(3)\n"
        f"TOOLS_TEMPLATE = open({str(mark)!r}, 'w').name\nTOOLS_TEMPLATE = {TOOLS!r}\nassert False\n"
    )
    before = set(sys.modules)
    texts = PromptTexts.from_checkpoint(checkpoint(tmp_path, encoding__e_DOT_py=code))
    assert texts.tools == TOOLS and not mark.exists()
    assert not [name for name in set(sys.modules) - before if "encoding" in name and "e_py" in name]


def test_constant_forms() -> None:
    code = (
        "a = 'x' 'y'\nb: str = (\n    'p'\n    'q' + a\n)\nc = {'k': a, 'l': ('m' 'n')}\n"
        "d = f'{a}'\ne = a.upper()\nf = {'k': 1}\ng = 5\nh = i = 'z'\ndef fn():\n    j = 'no'\nb2: str\n"
    )
    assert read_constants(code, "f") == {"a": "xy", "b": "pqxy", "c": {"k": "xy", "l": "mn"}, "h": "z", "i": "z"}


def test_known_by_hash_then_name_then_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    other = TOOLS.replace("end", "other end")
    assert identify({"ANY": TOOLS, "ANY2": FORMAT}, "f").tools == TOOLS, "by its headings"
    assert identify({"ANY": TOOLS, "tools_template": other}, "f").tools == other, "by name before headings"
    monkeypatch.setattr(prompt_texts, "TOOLS_TEMPLATE_SHA256", digest(TOOLS))
    monkeypatch.setattr(prompt_texts, "FORMAT_TEMPLATE_SHA256", digest(FORMAT))
    texts = identify({"ANY": TOOLS, "TOOLS_TEMPLATE": other, "F": FORMAT}, "f")
    assert texts.tools == TOOLS, "by hash before name"
    assert texts.check() == {"tools": "official", "response_format": "official"}
    assert identify({"tools_template": other}, "f").check() == {"tools": "own wording", "response_format": "absent"}


def test_rendered_hash_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = PromptTexts(tools=TOOLS)
    assert texts.check()["tools"] == "own wording"
    monkeypatch.setattr(prompt_texts, "TOOLS_RENDERED_SHA256", digest(texts.render_tools([])))
    assert texts.check()["tools"] == "official"


def test_effort_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    full, beyond = "full\n\n", "Reasoning Effort: Beyond it\n\n"
    monkeypatch.setattr(prompt_texts, "FULL_EFFORT_SHA256", digest(full))
    preview = identify({"REASONING_EFFORT_MAX": full}, "f")
    assert (preview.release, preview.efforts, preview.check()["effort_max"]) == ("preview", {"high": "", "max": full}, "official")
    shifted = {"low": "", "high": full, "max": beyond}
    for constants in (
        {"REASONING_EFFORT_PROMPTS": shifted, "DEFAULT_REASONING_EFFORT": "low"},
        {"reasoning_effort_high": full, "reasoning_effort_max": beyond},
        {"A": beyond, "B": full},
    ):
        texts = identify(constants, "f")  # type: ignore[arg-type]
        assert (texts.release, texts.efforts, texts.default_effort) == ("0731", shifted, "low")
        assert (texts.check()["effort_high"], texts.check()["effort_max"]) == ("official", "unverified")
    assert identify({"A": full}, "f").release == "preview"
    assert identify({}, "f").release == "unknown"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{tool_schemas.__class__}", "found slot {tool_schemas.__class__}, expected only"),
        ("{tool_schemas!r}", "found slot"),
        ("{tool_schemas:>9}", "found slot"),
        ("{other} {tool_schemas}", "found slot {other}"),
        ("{0}", "found slot {0}"),
        ("## Tools", "found no slot {tool_schemas}"),
        ("{tool_schemas", "expected '}'"),
    ],
)
def test_templates_are_plain(tools: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTexts(tools=tools)


def test_wrong_default_effort() -> None:
    with pytest.raises(ValueError, match="default effort: found 'low', expected one of"):
        PromptTexts(efforts={"high": ""}, default_effort="low")


def test_unreadable_encoding_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="e.py: not readable as Python"):
        PromptTexts.from_checkpoint(checkpoint(tmp_path, encoding__e_DOT_py="def ("))
    with pytest.raises(ValueError, match="expected at most 1048576"):
        PromptTexts.from_checkpoint(checkpoint(tmp_path, encoding__e_DOT_py="#" * (1 << 21)))


def test_two_encoding_files(tmp_path: Path) -> None:
    files = {"encoding__a_DOT_py": f"TOOLS_TEMPLATE = {TOOLS!r}", "encoding__test_DOT_py": "X = 'no text of the format'"}
    assert PromptTexts.from_checkpoint(checkpoint(tmp_path, **files)).tools == TOOLS
    checkpoint(tmp_path, encoding__b_DOT_py=f"TOOLS_TEMPLATE = {TOOLS + 'x'!r}")
    with pytest.raises(ValueError, match="a.py and .*b.py hold different texts"):
        PromptTexts.from_checkpoint(tmp_path)


def test_nothing_found(tmp_path: Path) -> None:
    texts = PromptTexts.from_checkpoint(tmp_path)
    assert texts == PromptTexts() and texts.check() == {"tools": "absent", "response_format": "absent"}


JINJA = """{%- set dsml = '｜DSML｜' -%}
{%- set tools_header = '## Tools\\n\\nuse <' + dsml + 'tool_calls> {}\\n\\n### Available Tool Schemas\\n' -%}
{%- set tools_footer %}

end {{ dsml }}
{% endset -%}
{%- set reasoning_effort_high = 'H\\n\\n' -%}
{%- set reasoning_effort_max = 'M\\n\\n' -%}
{%- for m in messages -%}
{{- tools_header -}}{%- for t in m.tools -%}{{- '\\n' + (t.function | tojson) -}}{%- endfor -%}{{- tools_footer -}}
{{- '\\n\\n## Response Format:\\n\\nas:\\n' + (m.response_format | tojson) -}}
{%- if m.bad -%}{{- raise_exception('x') -}}{%- break -%}{%- endif -%}
{%- endfor -%}"""


def test_jinja_template(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    texts = PromptTexts.from_checkpoint(checkpoint(tmp_path, chat_template_DOT_jinja=JINJA))
    section = "## Tools\n\nuse <｜DSML｜tool_calls> {}\n\n### Available Tool Schemas\n\nA\nB\n\nend ｜DSML｜\n"
    assert texts.render_tools(["A", "B"]) == section
    assert texts.render_format("{}") == "## Response Format:\n\nas:\n{}"
    assert (texts.release, texts.efforts) == ("0731", {"low": "", "high": "H\n\n", "max": "M\n\n"})


def test_jinja_tail_found_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_jinja = pytest.importorskip("v4.prompt_jinja")
    section = "## Tools\n\n### Available Tool Schemas\n\n\n\nend\n"
    monkeypatch.setattr(prompt_jinja, "TOOLS_RENDERED_SHA256", digest(section))
    monkeypatch.setattr(prompt_texts, "TOOLS_RENDERED_SHA256", digest(section))
    template = "{{ 'x' }}{{ '## Tools\\n\\n### Available Tool Schemas\\n\\n' + schemas + '\\n\\nend\\n' }}{{ 'y' }}"
    texts = PromptTexts.from_jinja(template, "j")
    assert texts.render_tools([]) == section and texts.check()["tools"] == "official"
    assert PromptTexts.from_jinja(template.replace("end", "fin"), "j").tools is None


def test_jinja_in_tokenizer_config(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    for value in (JINJA, [{"name": "other", "template": ""}, {"name": "default", "template": JINJA}]):
        path = checkpoint(tmp_path, tokenizer_config_DOT_json=json.dumps({"chat_template": value}))
        assert PromptTexts.from_checkpoint(path).release == "0731"


def test_jinja_that_does_not_parse() -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match="j: line 2 of the Jinja template does not parse"):
        PromptTexts.from_jinja("\n{% if %}", "j")


def test_without_jinja2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    texts = PromptTexts.from_jinja(JINJA, "chat_template.jinja")
    assert "the package jinja2 is not installed" in texts.source
    with pytest.raises(ValueError, match="tools section.*jinja2 is not installed"):
        texts.render_tools([])
