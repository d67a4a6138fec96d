"""The picture of a benchmark: ratios to the floor, or for the set of the caches time per element against size."""

import statistics
from collections.abc import Collection, Iterable, Sequence
from typing import Any, BinaryIO

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
NAMES = {BNBP: "bnbp, out=", PLAIN: "bnbp without activation, out=", FLOOR: "floor: a copy"}

LAYOUT_NAMES = {"nchw": "channels first", "nhwc": "channels last"}


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
    figure = Figure(layout="constrained")
    drawn = (draw_times if all(row.point.in_cache for row in members) else draw_ratios)(figure, members)
    figure.suptitle(f"{heading}, {threads_of(members[0].point)}", x=0.01, ha="left")
    known = [name for name in COLOURS_OF_LINES if name in drawn]
    labels = [NAMES.get(name, name) for name in known]
    figure.legend([drawn[name] for name in known], labels, loc="outside lower center", ncols=len(known), frameon=False)
    figure.savefig(file, format=file_format, dpi=150)


def draw_ratios(figure: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the ratios to the floor as dots, a line of them for each shape; return what is drawn, by candidate."""
    panels = _panels((row.point.operator, row.point.layout, row) for row in rows)
    grid = _grid(figure, panels, (4.6, 0.9 + 0.3 * max(map(len, panels.values()))), sharex=True)
    ratios: list[float] = [1]
    seen = {}
    for key, members in panels.items():
        axes = grid[key]
        names = [label(row.point.shape) for row in members]
        for name, colour in COLOURS.items():
            dots = [(row.seconds[name].over(row.bound)[1], y) for y, row in enumerate(members) if name in row.seconds]
            if dots:
                x, y = zip(*dots, strict=True)
                ratios += x
                seen[name] = axes.scatter(x, y, color=colour, s=28, zorder=3, marker="D" if name == BNBP else "o")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    for axes in grid.values():
        axes.set_xscale("log")
        _set_ticks(axes.xaxis, ratios)
    for axes in figure.axes[-len({layout for _, layout in panels}) :]:
        axes.set_xlabel("time / floor that applies (medians)")
    return seen


def draw_times(figure: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Draw the time of an element against the number of elements; return what is drawn, by candidate.

    There is a dot for each shape, and for each candidate one line, which passes through the geometric mean of the
    shapes of a size. Times are minima: an interruption is long beside such calls.
    """
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    panels = _panels(
        (row.point.operator, LAYOUT_NAMES[row.point.layout] if len(row.point.shape) > 2 else "(N, C)", row)
        for row in rows
    )
    grid = _grid(figure, panels, (4.4, 3.6), sharex=True, sharey=True)
    times: list[float] = []
    seen = {}
    for key, members in panels.items():
        axes = grid[key]
        for name, colour in COLOURS_OF_LINES.items():
            at: dict[int, list[float]] = {}
            for row in members:
                if name in row.seconds:
                    at.setdefault(row.point.size, []).append(row.seconds[name].minimum / row.point.size * 1e9)
            if at:
                sizes = sorted(at)
                means = [statistics.geometric_mean(at[size]) for size in sizes]
                style = "--" if name == FLOOR else "-"
                (seen[name],) = axes.plot(sizes, means, style, color=colour, linewidth=2 if name == BNBP else 1.2)
                dots = [(size, time) for size in sizes for time in at[size]]
                axes.scatter(*zip(*dots, strict=True), color=colour, s=10)
                times += [time for _, time in dots]
    for axes in grid.values():
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator([1e4, 3e4, 1e5, 3e5, 1e6]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _set_ticks(axes.yaxis, times)
        axes.set_xlabel("elements")
    figure.axes[0].set_ylabel("ns an element (minima)")
    return seen


def _panels(keyed: Iterable[tuple[str, str, Row]]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each panel, by what its line and its column of panels have in common."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for line, column, row in keyed:
        panels.setdefault((line, column), []).append(row)
    return panels


def _grid(
    figure: Any, panels: Collection[tuple[str, str]], size: tuple[float, float], **options: bool
) -> dict[tuple[str, str], Any]:
    """Axes for the panels, each of a size in inches, with their titles."""
    lines = list(dict.fromkeys(line for line, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    figure.set_size_inches(2.2 + size[0] * len(columns), 1.2 + size[1] * len(lines))
    grid = figure.subplots(len(lines), len(columns), squeeze=False, **options)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    result = {}
    for line, column in panels:
        axes = result[line, column] = grid[lines.index(line)][columns.index(column)]
        axes.set_title(f"{line}, {column}", loc="left", fontsize="medium")
    return result


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
