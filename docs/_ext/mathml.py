"""Formulas as MathML, made while the pages are built: they need no script, no network and no font of their own."""

from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)

# The annotation is the TeX source, which browsers do not show: a formula can be copied out of the page.
converter = LatexToMathML(annotation=True, fancy_error=False)


def mathml(tex: str, block: bool) -> str:
    """The ``math`` element for a formula; as everywhere in Sphinx, a block with ``\\\\`` in it is aligned at ``&``."""
    if block and r"\\" in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    return converter.convert_with_local_state(tex, displaystyle=block)


def visit(translator: Any, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    try:
        formula = mathml(node.astext(), block)
    except LatexError as error:
        log.warning("cannot convert %r to MathML: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    translator.body.append(f'<div class="math">{formula}</div>\n' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", inline_renderers=(visit, None), block_renderers=(visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
