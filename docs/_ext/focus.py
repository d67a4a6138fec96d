"""Code, tables and formulas can be wider than a window. They take the focus, so that the keyboard can scroll them."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

SCROLLING = re.compile(r'<(?=pre>|div class="(?:table-wrapper|math)\b)(pre|div)')


def add(app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document | None) -> None:
    if "body" in context:
        context["body"] = SCROLLING.sub(r'<\1 tabindex="0"', context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
