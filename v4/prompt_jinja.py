"""Reads the fixed prompt texts out of a Jinja chat template. The template is parsed into its syntax tree and never rendered."""

from __future__ import annotations

from collections.abc import Iterator

import jinja2
from jinja2 import nodes

from v4.prompt_texts import (
    FORMAT_HEADING,
    SCHEMAS_HEADING,
    TOOLS_HEADING,
    TOOLS_RENDERED_SHA256,
    Constants,
    digest,
)


def read_template(template: str, source: str) -> Constants:
    """Texts of a template under the names that encoding files use; what is not found is left out.

    Tools section: the literal with both headings, and the literal after the schemas (the one that completes the published
    hash, or one assigned to a name that ends in "footer"). Response format: the literal with its heading. Preambles: literals
    assigned to reasoning_effort_high and reasoning_effort_max. Raises ValueError for a template that does not parse.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]
    )
    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{source}: line {error.lineno} of the Jinja template does not parse ({error.message})") from error
    named, literals = _literals(tree)
    result: Constants = {name: text for name, text in named.items() if name.lower().startswith("reasoning_effort")}
    if (tools := _tools(named, literals)) is not None:
        result["TOOLS_TEMPLATE"] = tools
    for text in literals:
        if FORMAT_HEADING in text:
            result["RESPONSE_FORMAT_TEMPLATE"] = _escape(text[text.index(FORMAT_HEADING) :].rstrip("\n") + "\n") + "{schema}"
    return result


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _tools(named: dict[str, str], literals: list[str]) -> str | None:
    heads = [text for text in literals if TOOLS_HEADING in text and SCHEMAS_HEADING in text]
    if not heads:
        return None
    head = heads[0][heads[0].index(TOOLS_HEADING) : heads[0].index(SCHEMAS_HEADING)] + SCHEMAS_HEADING + "\n\n"
    named_tails = [text for name, text in named.items() if name.lower().endswith("footer")]
    tails = [f"\n\n{text.strip()}\n" for text in literals if text.strip()]
    official = [tail for tail in tails if digest(head + tail) == TOOLS_RENDERED_SHA256]
    for tail in official + [f"\n\n{text.strip()}\n" for text in named_tails]:
        return f"{_escape(head)}{{tool_schemas}}{_escape(tail)}"
    return None


def _literals(tree: nodes.Template) -> tuple[dict[str, str], list[str]]:
    """Names assigned to constant text, and all constant texts in document order: joined with their neighbours, and alone."""
    named: dict[str, str] = {}
    literals: list[str] = []
    for node in tree.find_all((nodes.Assign, nodes.AssignBlock, nodes.Output)):
        body = [node.node] if isinstance(node, nodes.Assign) else node.body if isinstance(node, nodes.AssignBlock) else [node]
        pieces = [piece for part in body for piece in _pieces(part, named)]
        runs = _runs(pieces)
        literals += [text for text in (*runs, *pieces) if text]
        target = getattr(node, "target", None)
        if isinstance(target, nodes.Name) and len(runs) == 1 and runs[0] is not None:
            named[target.name] = runs[0]
    return named, literals


def _pieces(node: nodes.Node, named: dict[str, str]) -> Iterator[str | None]:
    """Constant strings in order; None where something computed stands between them."""
    if isinstance(node, nodes.TemplateData):
        yield node.data
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, nodes.Name):
        yield named.get(node.name)
    elif isinstance(node, nodes.Add):
        yield from _pieces(node.left, named)
        yield from _pieces(node.right, named)
    elif isinstance(node, (nodes.Concat, nodes.Output)):
        for part in node.nodes:
            yield from _pieces(part, named)
    else:
        yield None


def _runs(pieces: list[str | None]) -> list[str | None]:
    """Neighbouring constants joined; a None stays as a separator."""
    runs: list[str | None] = []
    for piece in pieces:
        if piece is not None and runs and runs[-1] is not None:
            runs[-1] += piece
        else:
            runs.append(piece)
    return runs
