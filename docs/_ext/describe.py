"""A description for each page, which search engines show below its title.

It is the page's first paragraph, cut to a length that they show, unless the page has a ``.. meta:: :description:``.
"""

from html import escape
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

LENGTH = 160  # about what is shown

# Paragraphs in these are beside the text.
ASIDE = (nodes.Admonition, nodes.table, nodes.footnote, nodes.comment, nodes.topic, nodes.field_list)

GENERATED = {
    "genindex": "All functions, classes and terms of the documentation of bnbp, in alphabetical order.",
    "py-modindex": "The Python modules of bnbp.",
    "search": "Search the documentation of bnbp.",
    "_modules/index": "The modules of bnbp whose source code these pages show.",
}


def is_aside(node: nodes.Node) -> bool:
    while node is not None:
        if isinstance(node, ASIDE) and not isinstance(node, addnodes.desc):  # which Sphinx takes for an admonition
            return True
        node = node.parent
    return False


def shortened(text: str) -> str:
    """As many whole sentences as LENGTH has room for; of a first sentence that is longer, as many words."""
    if len(text) <= LENGTH:
        return text
    start = text[:LENGTH]
    sentences, stop, _ = start.rpartition(". ")
    return sentences + stop.strip() if stop else start.rpartition(" ")[0].rstrip(",;:") + " …"


def description(document: nodes.document) -> str:
    for paragraph in document.findall(nodes.paragraph):
        if not is_aside(paragraph):
            return shortened(" ".join(paragraph.astext().split()))
    return ""


def add(app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document | None) -> None:
    if 'name="description"' in context.get("metatags", ""):
        return
    if document is not None:
        text = description(document)
    else:
        text = GENERATED.get(page) or f"The source code of {context['title']}."
    context["metatags"] = context.get("metatags", "") + f'<meta name="description" content="{escape(text)}">\n'


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
