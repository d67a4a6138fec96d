"""The picture of a measurement: the step of every candidate, relative to PyTorch's best."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from .cases import BOTH, CHANNELS_LAST, COMPILE, CONTIGUOUS, CONVERTED, EAGER, TITLES, Row
from .report import PYTORCH

__all__ = ["draw", "draw_panel"]

COLOURS = {EAGER: "tab:red", COMPILE: "tab:pink", CONVERTED: "tab:blue", BOTH: "tab:cyan"}
NAMES = {EAGER: "PyTorch", COMPILE: "torch.compile", CONVERTED: "converted", BOTH: "converted, torch.compile"}
MARKERS = {CONTIGUOUS: "o", CHANNELS_LAST: "D"}
FORMAT_NAMES = {CONTIGUOUS: "contiguous", CHANNELS_LAST: "channels last"}
X = "time of a step / PyTorch's best (minima)"


def draw(file: BinaryIO, file_format: str, rows: Sequence[Row], heading: str) -> None:
    """Draw the rows with the largest number of threads: a line of dots for each network.

    Parameters
    ----------
    file : binary file
        Where to write.
    file_format : str
        Such as "png".
    rows : sequence of Row
        What was measured.
    heading : str
        What stands above, such as the machine.
    """
    from matplotlib.figure import Figure

    threads = max(row.threads for row in rows)
    members = [row for row in rows if row.threads == threads]
    figure = Figure(figsize=(7.4, 1.8 + 0.35 * len(members)), layout="constrained")
    axes = figure.subplots()
    drawn = draw_panel(axes, members)
    axes.set_xlabel(X)
    marks = [axes.scatter([], [], color=COLOURS[name], label=NAMES[name]) for name in drawn]
    marks += [
        axes.scatter([], [], color="gray", marker=marker, label=FORMAT_NAMES[name]) for name, marker in MARKERS.items()
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, handletextpad=0.1)
    figure.suptitle(f"{heading}, float32, {threads} thread{'s' * (threads > 1)}", x=0.01, ha="left")
    figure.savefig(file, format=file_format, dpi=150)


def draw_panel(axes: Any, rows: Sequence[Row]) -> list[str]:
    """Draw the rows on axes; return the candidates that they have."""
    for y, row in enumerate(rows):
        fastest = row.best(*PYTORCH) or row.best(*COLOURS)
        for result in row.results:
            if result.seconds and fastest and fastest.seconds:
                ratio, _ = result.seconds.over(fastest.seconds)
                colour, marker = COLOURS[result.candidate], MARKERS[result.format]
                axes.scatter(ratio, y, color=colour, marker=marker, s=28, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [TITLES[row.network] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return list(dict.fromkeys(result.candidate for row in rows for result in row.results))
