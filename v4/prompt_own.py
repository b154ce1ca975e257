"""Prompt texts in our own wording, for checkpoints that we make: the structure of the format, not a release's sentences."""

from __future__ import annotations

_TOOLS = """## Tools

The functions below can be called from a reply. Such a reply ends with one "<{dsml_token}tool_calls>" block of this form:

<{dsml_token}tool_calls>
<{dsml_token}invoke name="$FUNCTION">
<{dsml_token}parameter name="$KEY" string="true|false">$CONTENT</{dsml_token}parameter>
...
</{dsml_token}invoke>
<{dsml_token}invoke name="$OTHER_FUNCTION">
...
</{dsml_token}invoke>
</{dsml_token}tool_calls>

A text argument has `string="true"` and is written unquoted and unescaped. Any other argument has `string="false"` and is JSON.

A turn that starts with {thinking_start_token} thinks first, up to {thinking_end_token}, and then holds the answer or the calls.

A turn that starts with {thinking_end_token} holds the answer or the calls only.

### Available Tool Schemas

{tool_schemas}

No other function names and no other parameters exist.
"""

_FORMAT = "## Response Format:\n\nThe whole reply is one JSON value that is valid under this schema:\n{schema}"

_EFFORT_1 = (
    "Thinking level: thorough.\n"
    "Take the question apart before answering it, and test every step against cases that could break it.\n"
    "Write the steps down, including those that were given up, and say why.\n\n"
)

_EFFORT_2 = (
    "Thinking level: exhaustive.\n"
    "Treat the question from several independent directions, and compare what they give.\n"
    "Continue until each result has been confirmed a second way and nothing rests on a guess.\n\n"
)


def _literal(text: str, indent: str) -> str:
    lines = "".join(f"{indent}    {line!r}\n" for line in text.splitlines(keepends=True))
    return f"(\n{lines}{indent})"


def own_texts_file(release: str = "0731") -> bytes:
    """A Python file of string constants to be stored as `encoding/encoding_v4.py` of a checkpoint (UTF-8).

    release: "0731" for effort levels low, high, max; "preview" for high, max. Raises ValueError for another release.
    """
    if release == "0731":
        prompts = f'    "low": "",\n    "high": {_literal(_EFFORT_1, "    ")},\n    "max": {_literal(_EFFORT_2, "    ")},\n'
        efforts = f'REASONING_EFFORT_PROMPTS = {{\n{prompts}}}\n\nDEFAULT_REASONING_EFFORT = "low"\n'
    elif release == "preview":
        efforts = f"REASONING_EFFORT_MAX = {_literal(_EFFORT_1, '')}\n"
    else:
        raise ValueError(f"release: found {release!r}, expected '0731' or 'preview'")
    return (
        '"""Fixed texts of this checkpoint\'s prompt format: data, meant to be parsed and not executed."""\n\n'
        f"TOOLS_TEMPLATE = {_literal(_TOOLS, '')}\n\n"
        f"RESPONSE_FORMAT_TEMPLATE = {_literal(_FORMAT, '')}\n\n"
        f"{efforts}"
    ).encode()
