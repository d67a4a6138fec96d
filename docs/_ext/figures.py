"""Plots and pictures in the page itself, as SVG in the colours of the page.

.. code-block:: rst

   .. headline::

   .. picture:: operator
      :alt: What there is to see, if not what pictures.py says.

   .. measured-plot:: cache.json
      :threads: 2
      :alt: What there is to see.

   .. measured-training-plot:: training.json
      :threads: 2
      :alt: What there is to see.
"""

from typing import Any, ClassVar

import headline
import panels
import pictures
from docutils import nodes
from docutils.parsers.rst import directives
from drawing import figure
from machines import FOLDER, load, machine_of, threads_of
from measured import Measured, MeasuredTraining, types_of
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bnbp.cli.benchmark import report


class InPage(SphinxDirective):
    """A directive whose figure is part of the page."""

    def identity(self) -> str:
        """What the figure's IDs begin with; no other on the page begins so."""
        return f"figure-{self.env.new_serialno('figure')}"

    @staticmethod
    def html(text: str) -> list[nodes.Node]:
        """The figure as a node."""
        return [nodes.raw("", text, format="html")]


class MeasuredPlot(Measured, InPage):
    """What ``bnbp bench --plot`` would have drawn of the rows, each panel by itself."""

    option_spec: ClassVar[dict[str, Any]] = {**Measured.option_spec, "alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        content = self.content_of_file()
        rows = report.load({"rows": self.chosen(content["rows"])})
        drawn, legend = panels.of_rows(rows, self.identity(), self.options["alt"])
        caption = f"{types_of(content)}, {threads_of(rows[0].point.threads)}. {machine_of(content)}."
        return self.html(figure(drawn, caption, legend))


class MeasuredTrainingPlot(MeasuredTraining, InPage):
    """What ``bnbp train-bench --plot`` would have drawn."""

    option_spec: ClassVar[dict[str, Any]] = {**MeasuredTraining.option_spec, "alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        content, rows = self.content_of_file(), self.rows()
        drawn, legend = panels.of_training(rows, self.identity(), self.options["alt"])
        return self.html(figure(drawn, f"float32, {threads_of(rows[0].threads)}. {machine_of(content)}.", legend))


class Headline(InPage):
    """bnbp beside the frameworks."""

    def run(self) -> list[nodes.Node]:
        name = headline.newest()
        self.env.note_dependency(str(FOLDER / name))
        return self.html(headline.inline(load(name), self.identity()))


class Picture(InPage):
    """One of the drawings of ``pictures.py``, with its own description or that of ``alt``."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in pictures.PICTURES:
            raise self.error(f"expected one of {', '.join(pictures.PICTURES)}, got {name}")
        self.env.note_dependency(pictures.__file__)
        words = [" ".join(self.options["alt"].split())] if "alt" in self.options else []
        return self.html(figure([pictures.PICTURES[name](self.identity(), *words)]))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_css_file("figures.css")
    app.add_directive("headline", Headline)
    app.add_directive("picture", Picture)
    app.add_directive("measured-plot", MeasuredPlot)
    app.add_directive("measured-training-plot", MeasuredTrainingPlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
