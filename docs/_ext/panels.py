"""The panels of ``bnbp bench --plot`` and ``bnbp train-bench --plot``, each an SVG in the colours of the page."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from drawing import themed
from machines import TITLES

from bnbp.cli.benchmark import plot
from bnbp.cli.benchmark.measure import Row
from bnbp.cli.training import plot as training_plot
from bnbp.cli.training.cases import BOTH, COMPILE, CONVERTED, EAGER
from bnbp.cli.training.cases import Row as TrainingRow

INCHES = 4.5  # the width of a panel; at 72 units an inch its text of 11 has 12 pixels in a window of 390
CLASSES = {  # of figures.css
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
    EAGER: "torch",
    COMPILE: "torch-compile",
    CONVERTED: "bnbp",
    BOTH: "fresh",
}
OPERATORS = {
    "training": "Training",
    "training_backprop": "Gradient",
    "inference": "Inference",
    "inference_backprop": "Gradient of inference",
}

Panels = tuple[list[str], list[tuple[str, str, str]]]  # and a legend, as `drawing.figure` takes them


def of_rows(rows: Sequence[Row], identity: str, description: str) -> Panels:
    """A panel for each operator and layout of the rows of a benchmark."""
    kind, panels = plot.kind_of(rows), []
    drawn: set[str] = set()
    colours = {plot.COLOURS_OF_LINES[name]: class_ for name, class_ in CLASSES.items()}
    for k, ((operator, layout), members) in enumerate(plot.panels_of(rows).items()):
        title = f"{OPERATORS[operator]}, {layout}"

        def draw(axes: Any, title: str = title, members: Sequence[Row] = members) -> None:
            drawn.update(plot.draw_panel(kind, axes, members, rows))
            axes.set_title(title, loc="left", fontsize="medium")
            axes.set_xlabel(kind.x)
            axes.set_ylabel(kind.y)

        panels.append(panel(draw, plot.height(rows) + 0.3, f"{identity}-{k}", (title, description), colours))
    names = [name for name in plot.COLOURS_OF_LINES if name in drawn]
    return panels, [(CLASSES[name], plot.MARKERS[name], plot.NAMES.get(name, TITLES[name])) for name in names]


def of_training(rows: Sequence[TrainingRow], identity: str, description: str) -> Panels:
    """The one panel of a measurement of training steps."""
    drawn: list[str] = []

    def draw(axes: Any) -> None:
        drawn.extend(training_plot.draw_panel(axes, rows))
        axes.set_xlabel(training_plot.X)

    words = ("Time of a training step over PyTorch's best", description)
    colours = {training_plot.COLOURS[name]: class_ for name, class_ in TRAINING_CLASSES.items()}
    picture = panel(draw, 0.9 + 0.35 * len(rows), identity, words, colours)
    legend = [(TRAINING_CLASSES[name], "s", training_plot.NAMES[name]) for name in drawn]
    legend += [("ink", mark, training_plot.FORMAT_NAMES[name]) for name, mark in training_plot.MARKERS.items()]
    return [picture], legend


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
        draw(canvas.subplots())
        canvas.savefig(file, format="svg", transparent=True)
    return themed(file.getvalue().decode(), identity, *words, {to_hex(key): name for key, name in colours.items()})
