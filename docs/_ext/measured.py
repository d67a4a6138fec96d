"""Tables and plots of what ``bnbp bench --json`` and ``bnbp train-bench --json`` have saved.

They are made while the pages are built: measure again, replace the file.

.. code-block:: rst

   .. measured:: network.json
      :layout: nchw
      :threads: 2

   .. measured-against:: cache.json torch
      :layout: nchw
      :threads: 2

   .. measured-plot:: cache.json
      :threads: 2
      :alt: What there is to see.

   .. measured-training:: training.json
      :threads: 2

   .. measured-losses:: training.json
      :threads: 2

   .. measured-training-plot:: training.json
      :threads: 2
      :alt: What there is to see.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bnbp.cli.benchmark import plot, report
from bnbp.cli.training import plot as training_plot
from bnbp.cli.training import report as training_report
from bnbp.cli.training.cases import CANDIDATES, CONVERTED, EAGER, OTHER_THREADS, Row
from bnbp.cli.training.cases import TITLES as NETWORKS

FOLDER = Path(__file__).parents[1] / "measured"
TITLES = {
    "floor": "floor",
    "bnbp": "bnbp",
    "bnbp fresh": "bnbp fresh",
    "bnbp plain": "without the activation",
    "torch": "PyTorch",
    "torch.compile": "torch.compile",
    "tensorflow": "TensorFlow",
    "jax": "JAX",
    "numpy": "NumPy",
}


class Measured(SphinxDirective):
    """The rows of one operator, layout and number of threads: medians, and the ratio of bnbp's to the floor's."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {
        "operator": directives.unchanged,
        "layout": directives.unchanged,
        "threads": directives.nonnegative_int,
        "microseconds": directives.flag,
        "totals": directives.flag,  # only the sums, of all operators, layouts and threads
    }

    def run(self) -> list[nodes.Node]:
        content = self.content_of_file()
        scale, digits = (1e6, 1) if "microseconds" in self.options else (1e3, 2)

        def number(seconds: dict[str, dict[str, float]], name: str) -> str:
            return f"{seconds[name]['median'] * scale:.{digits}f}" if name in seconds else ""

        rows = content["totals"] if "totals" in self.options else self.chosen(content["rows"])
        names = [name for name in TITLES if any(name in row["seconds"] for row in rows)]
        table = []
        for row in rows:
            seconds = row["seconds"]
            if "totals" in self.options:
                label = f"{row['operator']}, {row['layout']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
                bound = seconds["bound"]["median"]
            else:
                times = f" ({row['point']['times']})" if row["point"]["times"] > 1 else ""
                label = "x".join(map(str, row["point"]["shape"])) + times
                bound = seconds["floor"]["median"] + (seconds["read"]["median"] if row["second_read"] else 0)
            ratio = f"{seconds['bnbp']['median'] / bound:.2f}"
            cells = [label, *(number(seconds, name) for name in names)]
            table.append([*cells, f"{bound * scale:.{digits}f}", ratio])
        if "totals" not in self.options and content["settings"]["sets"] == ["network"]:
            table.append(self.sum(content["totals"], names, scale))
        return [build(["", *(TITLES[name] for name in names), "floor that applies", "bnbp / floor"], table)]

    def content_of_file(self) -> dict[str, Any]:
        path = FOLDER / self.arguments[0]
        self.env.note_dependency(str(path))
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return content

    def chosen(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        def fits(row: dict[str, Any]) -> bool:
            point = row.get("point", row)
            return all(point[key] == value for key, value in self.options.items() if key in point)

        found = [row for row in rows if fits(row)]
        if not found:
            raise self.error(f"{self.arguments[0]}: nothing was measured for {self.options}")
        return found

    def sum(self, totals: list[dict[str, Any]], names: list[str], scale: float) -> list[str]:
        [total] = self.chosen(totals)
        seconds = total["seconds"]
        cells = [f"{seconds[name]['median'] * scale:.0f}" if name in seconds else "" for name in names]
        bound = seconds["bound"]["median"]
        return ["network", *cells, f"{bound * scale:.0f}", f"{seconds['bnbp']['median'] / bound:.2f}"]


class MeasuredAgainst(Measured):
    """The rows in microseconds, minima, with the ratio of bnbp's to a peer's, and the geometric mean of the ratios."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        content, peer = self.content_of_file(), self.arguments[1]
        rows = self.chosen(content["rows"])
        [total] = self.chosen(content["totals"])
        names = [name for name in TITLES if any(name in row["seconds"] for row in rows)]
        table = []
        for row in rows:
            times = {name: seconds["minimum"] for name, seconds in row["seconds"].items()}
            cells = (f"{times[name] * 1e6:.1f}" if name in times else "" for name in names)
            ratio = f"{times['bnbp'] / times[peer]:.2f}" if peer in times else ""
            table.append(["x".join(map(str, row["point"]["shape"])), *cells, ratio])
        mean = f"{total['geometric_means'][peer]['minimum']:.2f}"
        table.append(["geometric mean", *[""] * len(names), mean])
        return [build(["", *(TITLES[name] for name in names), f"bnbp / {TITLES[peer]}"], table)]


class MeasuredPlot(Measured):
    """What ``bnbp bench --plot`` would have drawn of the rows."""

    option_spec: ClassVar[dict[str, Any]] = {**Measured.option_spec, "alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        content = self.content_of_file()
        rows = self.chosen(content["rows"])
        chosen = [str(self.options[key]) for key in ("operator", "layout", "threads") if key in self.options]
        heading = f"{content['environment']['cpu']}, {content['settings']['dtype']}"
        return [self.image(chosen, lambda file: plot.draw(file, "svg", report.load({"rows": rows}), heading))]

    def image(self, chosen: list[str], draw: Callable[[BinaryIO], None]) -> nodes.image:
        """An SVG file for what was chosen."""
        name = "-".join([Path(self.arguments[0]).stem, *chosen])
        path = Path(self.env.srcdir, "_build", "plots", f"{name}.svg")  # images must be below the pages
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            draw(file)
        return nodes.image(uri=f"/{path.relative_to(self.env.srcdir).as_posix()}", alt=self.options["alt"])


class MeasuredTraining(Measured):
    """The steps of each network, minima in milliseconds, with the ratios of times and of memory."""

    option_spec: ClassVar[dict[str, Any]] = {"threads": directives.nonnegative_int}

    def run(self) -> list[nodes.Node]:
        rows = self.rows()
        names = [name for name in CANDIDATES if any(row.best(name) for row in rows)]
        table = []
        for row in rows:
            times = [training_report.milliseconds(row.best(name)) for name in names]
            speedup, memory = training_report.speedup(row), training_report.memory_ratio(row)
            batch = "x".join(map(str, row.shape))
            ratios = [f"{ratio:.2f}" if ratio else "" for ratio in (speedup and speedup[0], memory)]
            table.append([NETWORKS[row.network], batch, *times, *ratios])
        heads = [training_plot.NAMES[name] for name in names]
        return [build(["", "batch", *heads, "PyTorch / converted", "memory"], table)]

    def rows(self) -> list[Row]:
        return training_report.load({"rows": self.chosen(self.content_of_file()["rows"])})


class MeasuredLosses(MeasuredTraining):
    """The first and last loss of each network, and how far losses are from PyTorch's."""

    def run(self) -> list[nodes.Node]:
        table = []
        for row in self.rows():
            if CONVERTED in row.losses:
                apart = [training_report.losses_apart(row, name) for name in (CONVERTED, OTHER_THREADS)]
                losses = row.losses[EAGER]
                numbers = [f"{losses[0]:.4f}", f"{losses[-1]:.4f}", *(f"{number:.1e}" for number in apart)]
                table.append([NETWORKS[row.network], *numbers])
        return [build(["", "first loss", "last loss", "converted", "other number of threads"], table)]


class MeasuredTrainingPlot(MeasuredTraining, MeasuredPlot):
    """What ``bnbp train-bench --plot`` would have drawn."""

    option_spec: ClassVar[dict[str, Any]] = {
        **MeasuredTraining.option_spec,
        "alt": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        heading, rows = self.content_of_file()["environment"]["cpu"], self.rows()
        chosen = [str(self.options["threads"])] if "threads" in self.options else []
        return [self.image(chosen, lambda file: training_plot.draw(file, "svg", rows, heading))]


def build(head: list[str], rows: list[list[str]]) -> nodes.table:
    """A docutils table."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=3 if k == 0 else 1) for k in range(len(head))]
    header, body = nodes.thead(), nodes.tbody()
    for part, lines in ((header, [head]), (body, rows)):
        for line in lines:
            row = nodes.row()
            for cell in line:
                entry = nodes.entry()
                entry += nodes.paragraph(text=cell)
                row += entry
            part += row
    group += [header, body]
    table = nodes.table(classes=["measured"])
    table += group
    return table


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("measured", Measured)
    app.add_directive("measured-against", MeasuredAgainst)
    app.add_directive("measured-plot", MeasuredPlot)
    app.add_directive("measured-training", MeasuredTraining)
    app.add_directive("measured-losses", MeasuredLosses)
    app.add_directive("measured-training-plot", MeasuredTrainingPlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
