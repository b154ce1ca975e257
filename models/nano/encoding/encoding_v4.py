"""Fixed texts of this checkpoint's prompt format: data, meant to be parsed and not executed."""

TOOLS_TEMPLATE = (
    '## Tools\n'
    '\n'
    'The functions below can be called from a reply. Such a reply ends with one "<{dsml_token}tool_calls>" block of this form:\n'
    '\n'
    '<{dsml_token}tool_calls>\n'
    '<{dsml_token}invoke name="$FUNCTION">\n'
    '<{dsml_token}parameter name="$KEY" string="true|false">$CONTENT</{dsml_token}parameter>\n'
    '...\n'
    '</{dsml_token}invoke>\n'
    '<{dsml_token}invoke name="$OTHER_FUNCTION">\n'
    '...\n'
    '</{dsml_token}invoke>\n'
    '</{dsml_token}tool_calls>\n'
    '\n'
    'A text argument has `string="true"` and is written unquoted and unescaped. Any other argument has `string="false"` and is JSON.\n'
    '\n'
    'A turn that starts with {thinking_start_token} thinks first, up to {thinking_end_token}, and then holds the answer or the calls.\n'
    '\n'
    'A turn that starts with {thinking_end_token} holds the answer or the calls only.\n'
    '\n'
    '### Available Tool Schemas\n'
    '\n'
    '{tool_schemas}\n'
    '\n'
    'No other function names and no other parameters exist.\n'
)

RESPONSE_FORMAT_TEMPLATE = (
    '## Response Format:\n'
    '\n'
    'The whole reply is one JSON value that is valid under this schema:\n'
    '{schema}'
)

REASONING_EFFORT_PROMPTS = {
    "low": "",
    "high": (
        'Thinking level: thorough.\n'
        'Take the question apart before answering it, and test every step against cases that could break it.\n'
        'Write the steps down, including those that were given up, and say why.\n'
        '\n'
    ),
    "max": (
        'Thinking level: exhaustive.\n'
        'Treat the question from several independent directions, and compare what they give.\n'
        'Continue until each result has been confirmed a second way and nothing rests on a guess.\n'
        '\n'
    ),
}

DEFAULT_REASONING_EFFORT = "low"
