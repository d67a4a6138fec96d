"""Repairs of the pages, most of them for readers who use a keyboard or a screen reader.

Code, tables and formulas can be wider than a window. They take the focus, so that the keyboard can scroll them. The
arguments of a long signature, one a line, are not a list of definitions, though Sphinx writes them as one. Nor are
references a list of the kind that docutils says they are, which would have no links back.

The captions of the navigation say that they are headings, and get the level that this needs. In headings and in the
navigation, a long name that has no room is broken after an underscore or before a capital.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

SCROLLING = re.compile(r'<(?=pre>|div class="(?:table-wrapper|math)\b)(pre|div)')
ARGUMENTS = re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>")
HEADING = re.compile(r"<h[1-6]>.*?</h[1-6]>")
TEXT = re.compile(r"(?<=>)[^<>]+(?=<)")
LONG_NAME = re.compile(r"\w{20,}")
JOINT = re.compile(r"(?<=_)(?=\w)|(?<=[a-z])(?=[A-Z])")
ARGUMENT = re.compile(r"<dd>(.*)</dd>")


def breakable(html: str) -> str:
    return TEXT.sub(lambda text: LONG_NAME.sub(lambda name: JOINT.sub("<wbr>", name[0]), text[0]), html)


def navigation(html: str) -> str:
    return breakable(html.replace('role="heading"', 'role="heading" aria-level="2"'))


def repaired(html: str) -> str:
    html = html.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    html = SCROLLING.sub(r'<\1 tabindex="0"', html)
    html = HEADING.sub(lambda heading: breakable(heading[0]), html)
    return ARGUMENTS.sub(lambda match: ARGUMENT.sub(r'<span class="sig-argument">\1</span>', match[1]), html)


def add(app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document | None) -> None:
    for part, repair in (("body", repaired), ("furo_navigation_tree", navigation), ("toc", breakable)):
        if part in context:
            context[part] = repair(context[part])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", add, priority=900)  # when the theme has made the navigation
    return {"parallel_read_safe": True, "parallel_write_safe": True}
