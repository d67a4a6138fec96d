"""Repairs of the pages for readers who use a keyboard or a screen reader.

Code, tables and formulas can be wider than a window. They take the focus, so that the keyboard can scroll them. The
arguments of a long signature, one a line, are not a list of definitions, though Sphinx writes them as one. Nor are
references a list of the kind that docutils says they are, which would have no links back.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

SCROLLING = re.compile(r'<(?=pre>|div class="(?:table-wrapper|math)\b)(pre|div)')
ARGUMENTS = re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>")
ARGUMENT = re.compile(r"<dd>(.*)</dd>")


def repaired(html: str) -> str:
    html = html.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    html = SCROLLING.sub(r'<\1 tabindex="0"', html)
    return ARGUMENTS.sub(lambda match: ARGUMENT.sub(r'<span class="sig-argument">\1</span>', match[1]), html)


def add(app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document | None) -> None:
    if "body" in context:
        context["body"] = repaired(context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
