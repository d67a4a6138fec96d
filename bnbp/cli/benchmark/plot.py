"""The picture of a benchmark."""

from collections.abc import Sequence
from typing import BinaryIO

from .candidates import BNBP, FRESH
from .measure import Row
from .points import label

COLOURS = {
    BNBP: "tab:blue",
    FRESH: "tab:cyan",
    "torch": "tab:red",
    "tensorflow": "tab:orange",
    "jax": "tab:purple",
    "numpy": "tab:gray",
}


def draw(file: BinaryIO, file_format: str, rows: Sequence[Row], heading: str) -> None:
    """Draw the ratios to the floor as dots: a panel for each operator and layout, with the largest number of threads.

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
    from matplotlib.ticker import FixedLocator, NullLocator

    threads = max(row.point.threads for row in rows)
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.point.threads == threads:
            panels.setdefault((row.point.operator, row.point.layout), []).append(row)
    operators, layouts = list(dict.fromkeys(o for o, _ in panels)), list(dict.fromkeys(s for _, s in panels))
    height = max(map(len, panels.values()))
    size = (2.2 + 4.6 * len(layouts), 1.2 + len(operators) * (0.9 + 0.3 * height))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(operators), len(layouts), squeeze=False, sharex=True)
    ratios: list[float] = [1]
    seen = {}
    for (operator, layout), members in panels.items():
        axes = grid[operators.index(operator)][layouts.index(layout)]
        names = [label(row.point.shape) for row in members]
        for name, colour in COLOURS.items():
            dots = [(row.seconds[name].over(row.bound)[1], y) for y, row in enumerate(members) if name in row.seconds]
            if dots:
                x, y = zip(*dots, strict=True)
                ratios += x
                seen[name] = axes.scatter(x, y, color=colour, s=28, zorder=3, marker="D" if name == BNBP else "o")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"{operator}, {layout}", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    low, high = min(ratios), max(ratios)
    steps = (1, 1.5, 2, 3, 5) if high < 10 * low else (1, 2, 5)
    ticks = [step * 10**exponent for exponent in range(-2, 5) for step in steps]
    ticks = [tick for tick in ticks if low * 0.8 <= tick <= high * 1.25]
    for axes in grid.flat:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(low * 0.8, high * 1.25)
    for axes in grid[-1]:
        axes.set_xlabel("time / floor that applies (medians)")
    figure.suptitle(f"{heading}, {threads} thread{'s' * (threads > 1)}", x=0.01, ha="left")
    known = [name for name in COLOURS if name in seen]
    labels = ["bnbp, out=" if name == BNBP else name for name in known]
    figure.legend([seen[name] for name in known], labels, loc="outside lower center", ncols=len(known), frameon=False)
    figure.savefig(file, format=file_format, dpi=150)
