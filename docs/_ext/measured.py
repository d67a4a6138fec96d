"""Tables of what ``bnbp bench --json`` and ``bnbp train-bench --json`` have saved, and figures in the text.

They are made while the pages are built: measure again, replace the file.

.. code-block:: rst

   .. measured:: network.json
      :layout: nchw
      :threads: 2

   .. measured-against:: cache.json torch
      :layout: nchw
      :threads: 2

   .. measured-summary::

      network.json 2
      cache.json 1

   :measured:`torch / bnbp in network.json, nchw, 2` times as long.

   .. measured-training:: training.json
      :threads: 2

   .. measured-losses:: training.json
      :threads: 2
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from machines import EARLY, FOLDER, LIBRARIES, TITLES, cpu_of, load, machine_of, number, ratio, slower, threads_of
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from bnbp.cli.benchmark.points import fused_with
from bnbp.cli.training import plot as training_plot
from bnbp.cli.training import report as training_report
from bnbp.cli.training.cases import CANDIDATES, CONVERTED, EAGER, OTHER_THREADS, Row
from bnbp.cli.training.cases import TITLES as NETWORKS

LAYOUTS = {"nchw": "channels first", "nhwc": "channels last"}
OPERATORS = {
    "training": "batch norm in training",
    "training_backprop": "gradient of batch norm in training",
    "inference": "batch norm in inference",
    "inference_backprop": "gradient of batch norm in inference",
}
SETS = {
    "network": "ResNet-50's batch norms, batch of 32",
    "cache": "8,000 to 800,000 elements, in the caches",
    "odd": "other shapes",
    "small": "small calls",
}
SHORT_SETS = {"network": "ResNet-50", "cache": "in the caches"}


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
        unit, scale, digits = ("µs", 1e6, 1) if "microseconds" in self.options else ("ms", 1e3, 2)

        def number(seconds: dict[str, dict[str, float]], name: str) -> str:
            return f"{seconds[name]['median'] * scale:.{digits}f}" if name in seconds else ""

        totals = "totals" in self.options
        rows = content["totals"] if totals else self.chosen(content["rows"])
        names = [name for name in TITLES if any(name in row["seconds"] for row in rows)]
        table = []
        for row in rows:
            seconds = row["seconds"]
            if totals:
                label = f"{OPERATORS[row['operator']]}, {LAYOUTS[row['layout']]}, {threads_of(row['threads'])}"
                bound = seconds["bound"]["median"]
            else:
                times = f" ({row['point']['times']})" if row["point"]["times"] > 1 else ""
                label = "x".join(map(str, row["point"]["shape"])) + times
                bound = seconds["floor"]["median"] + (seconds["read"]["median"] if row["second_read"] else 0)
            ratio = f"{seconds['bnbp']['median'] / bound:.2f}"
            cells = [label, *(number(seconds, name) for name in names)]
            table.append([*cells, f"{bound * scale:.{digits}f}", ratio])
        network = content["settings"]["sets"] == ["network"]
        if network and not totals:
            table.append(self.sum(content["totals"], names, scale))
        first = "operator, layout, threads" if totals else "shape (how often)" if network else "shape"
        heads = [f"{TITLES[name]}, {unit}" for name in names]
        return [
            build(
                [first, *heads, f"floor that applies, {unit}", "bnbp / floor"], table, self.caption(content, "medians")
            )
        ]

    def content_of_file(self) -> dict[str, Any]:
        """What the file holds."""
        for path in (FOLDER / self.arguments[0], EARLY):
            self.env.note_dependency(str(path))
        return load(self.arguments[0])

    def caption(self, content: dict[str, Any], statistic: str) -> str:
        """What was measured, and where."""
        settings = content["settings"]
        parts = [what_of(content)]
        if "totals" not in self.options:
            layout, threads = self.options.get("layout"), self.options.get("threads", settings["threads"][0])
            parts += [LAYOUTS[layout]] if layout else []
            parts.append(threads_of(threads))
        parts += [types_of(content), f"{statistic} of {settings['rounds']} rounds"]
        return f"{', '.join(parts)}. {machine_of(content)}."

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
        heads = [f"{TITLES[name]}, µs" for name in names]
        return [build(["shape", *heads, f"bnbp / {TITLES[peer]}"], table, self.caption(content, "minima"))]


class MeasuredSummary(SphinxDirective):
    """How many times as long as bnbp the others take for the gradient: a line for each file, threads and layout."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        table = []
        for line in self.content:
            name, threads = line.split()
            self.env.note_dependency(str(FOLDER / name))
            content = load(name)
            for layout in LAYOUTS:
                where = {"operator": "training_backprop", "layout": layout, "threads": int(threads)}
                ratios = [ratio(content, peer, "bnbp", **where) for peer in LIBRARIES]
                floor = ratio(content, "bnbp", "bound", **where)
                cells = [number(each) if each else "" for each in (*ratios, floor)]
                level = content["environment"]["bnbp"]["isa"]["used"]
                machine = f"{cpu_of(content)} ({level}), {threads_of(int(threads))}"
                table.append([SHORT_SETS[content["settings"]["sets"][0]], LAYOUTS[layout], machine, *cells])
        heads = ["tensors", "layout", "machine", *(f"{name} / bnbp" for name in LIBRARIES.values()), "bnbp / floor"]
        return [build(heads, table, "Times of the gradient in float32, as ratios.", words=3)]


class MeasuredNumber(SphinxRole):
    """A number of a file.

    - ``torch / bnbp in network.json, nchw, 2`` is a ratio of times, the layout and the number of threads at the end.
    - ``bnbp > torch in cache.json, nchw, 2`` is on how many shapes bnbp took longer, as "1 of 30".
    """

    PATTERN = re.compile(r"(.+) (/|>) (.+) in (\S+), (nchw|nhwc), (\d+)(?:, (\w+))?")

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        match = self.PATTERN.fullmatch(self.text)
        if not match:
            message = self.inliner.reporter.error(f"cannot read {self.text!r}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        name, sign, other, file, layout, threads, operator = match.groups("training_backprop")
        self.env.note_dependency(str(FOLDER / file))
        where = {"operator": operator, "layout": layout, "threads": int(threads)}
        if sign == ">":
            return [nodes.Text("{} of {}".format(*slower(load(file), other, **where)))], []
        value = ratio(load(file), name, other, **where)
        if value is None:
            raise ValueError(f"{file} has no time of {name} or of {other}")
        return [nodes.Text(number(value))], []


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
        heads = [f"{training_plot.NAMES[name]}, ms" for name in names]
        heads = ["network", "batch", *heads, "PyTorch / converted", "memory"]
        return [build(heads, table, self.training_caption("minima"), words=2)]

    def training_caption(self, statistic: str) -> str:
        """What was measured, and where."""
        content = self.content_of_file()
        threads = threads_of(self.options.get("threads", content["settings"]["threads"][0]))
        rounds = f", {statistic} of {content['settings']['rounds']} rounds" if statistic else ""
        return f"Training steps, float32, {threads}{rounds}. {machine_of(content)}."

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
        heads = ["network", "first loss", "last loss", "converted", "other number of threads"]
        return [build(heads, table, self.training_caption(""))]


def what_of(content: dict[str, Any]) -> str:
    """The shapes, and the operator if it is the only one."""
    settings = content["settings"]
    what = ", ".join(SETS[name] for name in settings["sets"])
    fused = fused_with(settings.get("activation"), settings.get("addend", False))
    [*others, operator] = settings["operators"]
    return f"{what[0].upper()}{what[1:]}" + ("" if others else f": {OPERATORS[operator]}{fused}")


def types_of(content: dict[str, Any]) -> str:
    """The type of the tensors."""
    dtype: str = content["settings"]["dtype"]
    return f"{dtype} with parameters in float32" if dtype.endswith("float16") else dtype


def build(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, words: int = 1) -> nodes.table:
    """A docutils table whose first columns are words, and the rest numbers."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=3 if k < words else 1) for k in range(len(head))]
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
    table = nodes.table(classes=["measured", f"words-{words}"])
    table += [nodes.title(text=caption), group]
    return table


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("measured", Measured)
    app.add_directive("measured-against", MeasuredAgainst)
    app.add_directive("measured-summary", MeasuredSummary)
    app.add_directive("measured-training", MeasuredTraining)
    app.add_directive("measured-losses", MeasuredLosses)
    app.add_role("measured", MeasuredNumber())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
