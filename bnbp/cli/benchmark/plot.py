"""The picture of a benchmark: ratios to the floor, or for the set of the caches time per element against size."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

from .candidates import BNBP, FLOOR, FRESH, PLAIN
from .measure import Row
from .points import label, threads_of

COLOURS = {
    BNBP: "tab:blue",
    FRESH: "tab:cyan",
    PLAIN: "tab:green",
    "torch": "tab:red",
    "torch.compile": "tab:pink",
    "tensorflow": "tab:orange",
    "jax": "tab:purple",
    "numpy": "tab:gray",
}
COLOURS_OF_LINES = {**COLOURS, FLOOR: "black"}
MARKERS = {  # colour is not the only thing that tells them apart
    BNBP: "D",
    FRESH: "d",
    PLAIN: "P",
    "torch": "o",
    "torch.compile": "p",
    "tensorflow": "s",
    "jax": "^",
    "numpy": "v",
    FLOOR: ".",
}
NAMES = {BNBP: "bnbp, out=", PLAIN: "bnbp without activation, out=", FLOOR: "floor: a copy"}

LAYOUT_NAMES = {"nchw": "channels first", "nhwc": "channels last"}


class Kind(NamedTuple):
    """What the panels of a plot show."""

    draw: Callable[[Any, Sequence[Row]], dict[str, Any]]  #: on axes, some rows; returns what is drawn, by candidate
    scale: Callable[[Any, Sequence[Row]], None]  #: makes axes fit rows, which may be those of several panels
    x: str
    y: str


def draw(file: BinaryIO, file_format: str, rows: Sequence[Row], heading: str) -> None:
    """Draw the rows with the largest number of threads: a panel for each operator and layout.

    Where all rows are of the set of the caches, see :func:`draw_times`, otherwise :func:`draw_ratios`.

    Parameters
    ----------
    file : binary file
        Where to write.
    file_format : str
        Such as "png".
    rows : sequence of Row
        What :class:`Benchmark` has measured.
    heading : str
        What stands above, such as the machine.
    """
    from matplotlib.figure import Figure

    threads = max(row.point.threads for row in rows)
    members = [row for row in rows if row.point.threads == threads]
    kind, panels = kind_of(members), panels_of(members)
    lines = list(dict.fromkeys(line for line, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    figure = Figure(layout="constrained")
    figure.set_size_inches(2.2 + 4.6 * len(columns), 1.2 + height(members) * len(lines))
    grid = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True, sharey=kind is TIMES)
    drawn: dict[str, Any] = {}
    for (line, column), each in panels.items():
        axes = grid[lines.index(line)][columns.index(column)]
        drawn |= draw_panel(kind, axes, each, members)
        axes.set_title(f"{line}, {column}", loc="left", fontsize="medium")
        if line == lines[-1] or kind is TIMES:
            axes.set_xlabel(kind.x)
    figure.axes[0].set_ylabel(kind.y)
    figure.suptitle(f"{heading}, {threads_of(members[0].point)}", x=0.01, ha="left")
    known = [name for name in COLOURS_OF_LINES if name in drawn]
    labels = [NAMES.get(name, name) for name in known]
    figure.legend([drawn[name] for name in known], labels, loc="outside lower center", ncols=len(known), frameon=False)
    figure.savefig(file, format=file_format, dpi=150)


def kind_of(rows: Iterable[Row]) -> Kind:
    """What is to be shown of these rows."""
    return TIMES if all(row.point.in_cache for row in rows) else RATIOS


def panels_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each panel, by operator and layout; of times, (N, C), which is both layouts, has its own."""
    panels: dict[tuple[str, str], list[Row]] = {}
    kind = kind_of(rows)
    for row in rows:
        flat = kind is TIMES and len(row.point.shape) == 2
        layout = "(N, C)" if flat else LAYOUT_NAMES[row.point.layout]
        panels.setdefault((row.point.operator, layout), []).append(row)
    return panels


def height(rows: Sequence[Row]) -> float:
    """The height of a panel in inches, of those that these rows fill."""
    return 3.6 if kind_of(rows) is TIMES else 0.9 + 0.3 * max(map(len, panels_of(rows).values()))


def draw_panel(kind: Kind, axes: Any, rows: Sequence[Row], all_rows: Sequence[Row]) -> dict[str, Any]:
    """Draw some rows on axes that have the scale of all, so that panels compare; return what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    drawn = kind.draw(axes, rows)
    kind.scale(axes, all_rows)
    return drawn


def draw_ratios(axes: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the ratios to the floor as dots, a line of them for each shape; return what is drawn, by candidate."""
    names = [label(row.point.shape) for row in rows]
    drawn = {}
    for name, colour in COLOURS.items():
        dots = [(row.seconds[name].over(row.bound)[1], y) for y, row in enumerate(rows) if name in row.seconds]
        if dots:
            x, y = zip(*dots, strict=True)
            drawn[name] = axes.scatter(x, y, color=colour, s=28, zorder=3, marker=MARKERS[name])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return drawn


def scale_ratios(axes: Any, rows: Sequence[Row]) -> None:
    """A logarithmic axis round the ratios of these rows, and round 1."""
    axes.set_xscale("log")
    _set_ticks(axes.xaxis, [1, *(row.seconds[name].over(row.bound)[1] for row, name in _drawn(rows, COLOURS))])


def draw_times(axes: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the time of an element against the number of elements; return what is drawn, by candidate.

    There is a dot for each shape, and for each candidate one line, which passes through the geometric mean of the
    shapes of a size. Times are minima: an interruption is long beside such calls.
    """
    drawn = {}
    for name, colour in COLOURS_OF_LINES.items():
        at: dict[int, list[float]] = {}
        for row in rows:
            if name in row.seconds:
                at.setdefault(row.point.size, []).append(_time(row, name))
        if at:
            sizes = sorted(at)
            means = [statistics.geometric_mean(at[size]) for size in sizes]
            style = "--" if name == FLOOR else "-"
            (drawn[name],) = axes.plot(sizes, means, style, color=colour, linewidth=2 if name == BNBP else 1.2)
            dots = [(size, time) for size in sizes for time in at[size]]
            axes.scatter(*zip(*dots, strict=True), color=colour, s=12, marker=MARKERS[name])
    return drawn


def scale_times(axes: Any, rows: Sequence[Row]) -> None:
    """Logarithmic axes round the times of these rows."""
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = [row.point.size for row in rows]
    axes.set_xlim(min(sizes) * 0.8, max(sizes) * 1.25)
    axes.xaxis.set_major_locator(FixedLocator([1e4, 3e4, 1e5, 3e5, 1e6]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _set_ticks(axes.yaxis, [_time(row, name) for row, name in _drawn(rows, COLOURS_OF_LINES)])


RATIOS = Kind(draw_ratios, scale_ratios, "time / floor that applies (medians)", "")
TIMES = Kind(draw_times, scale_times, "elements", "ns an element (minima)")


def _drawn(rows: Iterable[Row], names: Iterable[str]) -> list[tuple[Row, str]]:
    """Each row with each of the names that it has a time of."""
    return [(row, name) for row in rows for name in names if name in row.seconds]


def _time(row: Row, name: str) -> float:
    """Nanoseconds for an element."""
    return row.seconds[name].minimum / row.point.size * 1e9


def _set_ticks(axis: Any, values: Sequence[float]) -> None:
    """Limits round the values of a logarithmic axis, and ticks at round numbers."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    low, high = min(values) * 0.8, max(values) * 1.25
    steps = (1, 1.5, 2, 3, 5) if high < 15 * low else (1, 2, 5)
    ticks = [step * 10.0**exponent for exponent in range(-3, 5) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
