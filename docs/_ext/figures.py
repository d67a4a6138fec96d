"""Plots and pictures in the page itself, as SVG in the colours of the page.

.. code-block:: rst

   .. headline::

   .. picture:: operator

   .. measured-plot:: cache.json
      :threads: 2
      :alt: What there is to see.

   .. measured-training-plot:: training.json
      :threads: 2
      :alt: What there is to see.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import headline
import pictures
from docutils import nodes
from docutils.parsers.rst import directives
from drawing import figure, themed
from machines import FOLDER, load, machine_of, threads_of
from measured import OPERATORS, TITLES, Measured, MeasuredTraining, types_of
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bnbp.cli.benchmark import plot, report
from bnbp.cli.training import plot as training_plot

INCHES = 4.5  # the width of a panel; at 72 units an inch its text of 10 has 11 pixels in a window of 390
CLASSES = {
    "bnbp": "bnbp",
    "bnbp fresh": "fresh",
    "bnbp plain": "plain",
    "torch": "torch",
    "torch.compile": "torch-compile",
    "tensorflow": "tensorflow",
    "jax": "jax",
    "numpy": "numpy",
    "floor": "ink",
}
TRAINING_CLASSES = {
    training_plot.EAGER: "torch",
    training_plot.COMPILE: "torch-compile",
    training_plot.CONVERTED: "bnbp",
    training_plot.BOTH: "fresh",
}


def panel(
    draw: Callable[[Any], None], height: float, identity: str, words: tuple[str, str], colours: Mapping[str, str]
) -> str:
    """What is drawn on axes, as an SVG in the colours of the page.

    Parameters
    ----------
    draw : callable
        Draws on the axes.
    height : float
        Of the panel, in inches.
    identity : str
        What its IDs begin with.
    words : tuple of str
        Its title and description, for those who do not see it.
    colours : mapping of str to str
        Names of classes, by the colours in which something is drawn.
    """
    from matplotlib import rc_context
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": identity, "font.size": 11}):
        canvas = Figure(figsize=(INCHES, height), layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        canvas.savefig(file, format="svg", transparent=True)
    classes = {to_hex(colour): name for colour, name in colours.items()}
    return themed(file.getvalue().decode(), identity, *words, classes)


class InPage(SphinxDirective):
    """A directive whose figure is part of the page."""

    def identity(self) -> str:
        """What the figure's IDs begin with; no other on the page begins so."""
        return f"figure-{self.env.new_serialno('figure')}"

    def depends_on(self, name: str) -> None:
        self.env.note_dependency(str(FOLDER / name))

    @staticmethod
    def html(text: str) -> list[nodes.Node]:
        return [nodes.raw("", text, format="html")]


class MeasuredPlot(Measured, InPage):
    """What ``bnbp bench --plot`` would have drawn of the rows, each panel by itself."""

    option_spec: ClassVar[dict[str, Any]] = {**Measured.option_spec, "alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        content = self.content_of_file()
        rows = report.load({"rows": self.chosen(content["rows"])})
        kind, identity, drawn, panels = plot.kind_of(rows), self.identity(), {}, []
        colours = {plot.COLOURS_OF_LINES[name]: class_ for name, class_ in CLASSES.items()}
        for k, ((operator, layout), members) in enumerate(plot.panels_of(rows).items()):
            title = f"{OPERATORS[operator].capitalize()}, {layout}"

            def draw(axes: Any, title: str = title, members: Any = members) -> None:
                drawn.update(plot.draw_panel(kind, axes, members, rows))
                axes.set_title(title, loc="left", fontsize="medium")
                axes.set_xlabel(kind.x)
                axes.set_ylabel(kind.y)

            words = (title, self.options["alt"])
            panels.append(panel(draw, plot.height(rows) + 0.3, f"{identity}-{k}", words, colours))
        names = [name for name in plot.COLOURS_OF_LINES if name in drawn]
        legend = [(CLASSES[name], plot.MARKERS[name], plot.NAMES.get(name, TITLES[name])) for name in names]
        threads = threads_of(rows[0].point.threads)
        return self.html(figure(panels, f"{types_of(content)}, {threads}. {machine_of(content)}.", legend))


class MeasuredTrainingPlot(MeasuredTraining, InPage):
    """What ``bnbp train-bench --plot`` would have drawn."""

    option_spec: ClassVar[dict[str, Any]] = {**MeasuredTraining.option_spec, "alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        content, rows = self.content_of_file(), self.rows()
        drawn: list[str] = []
        title = "Time of a training step over PyTorch's best"

        def draw(axes: Any) -> None:
            drawn.extend(training_plot.draw_panel(axes, rows))
            axes.set_xlabel(training_plot.X)

        colours = {training_plot.COLOURS[name]: class_ for name, class_ in TRAINING_CLASSES.items()}
        picture = panel(draw, 0.9 + 0.35 * len(rows), self.identity(), (title, self.options["alt"]), colours)
        legend = [(TRAINING_CLASSES[name], "o", training_plot.NAMES[name]) for name in drawn]
        legend += [("ink", mark, training_plot.FORMAT_NAMES[name]) for name, mark in training_plot.MARKERS.items()]
        threads = threads_of(rows[0].threads)
        return self.html(figure([picture], f"float32, {threads}. {machine_of(content)}.", legend))


class Headline(InPage):
    """bnbp beside the frameworks."""

    def run(self) -> list[nodes.Node]:
        name = headline.newest()
        self.depends_on(name)
        return self.html(headline.inline(load(name), self.identity()))


class Picture(InPage):
    """One of the drawings of ``pictures.py``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in pictures.PICTURES:
            raise self.error(f"expected one of {', '.join(pictures.PICTURES)}, got {name}")
        self.env.note_dependency(pictures.__file__)
        return self.html(figure([pictures.PICTURES[name](self.identity())]))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_css_file("figures.css")
    app.add_directive("headline", Headline)
    app.add_directive("picture", Picture)
    app.add_directive("measured-plot", MeasuredPlot)
    app.add_directive("measured-training-plot", MeasuredTrainingPlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
