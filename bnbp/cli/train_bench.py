"""``bnbp train-bench``: whole training steps in PyTorch, beside those of the converted networks."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.measure import Measurement
from rich.table import Table

import bnbp

from .bench import _names, _print_environment, _thread_counts
from .files import check_output, plot_format, write_file
from .terminal import Failure, console, print_line, progress_bar
from .training import report
from .training.cases import BOTH, COMPILE, CONVERTED, EAGER, OTHER_THREADS, TITLES, Row, Settings
from .training.plot import draw

if TYPE_CHECKING:
    from .training.measure import Benchmark

__all__ = ["train_bench"]


class Network(StrEnum):
    """The functions of ``training/networks.py``."""

    mobilenet_v1 = "mobilenet_v1"
    mobilenet_v2 = "mobilenet_v2"
    resnet50 = "resnet50"
    densenet121 = "densenet121"
    efficientnet = "efficientnet"
    unet = "unet"
    gan = "gan"
    mlp = "mlp"
    small_convnet = "small_convnet"


class Candidate(StrEnum):
    """PyTorch as it is and compiled, and the same of the converted network."""

    eager = EAGER
    compile = COMPILE
    converted = CONVERTED
    both = BOTH


class Sizes(StrEnum):
    """The sets of networks of ``bnbp train-bench``."""

    full = "full"
    tiny = "tiny"


def train_bench(
    networks: Annotated[
        list[Network] | None, typer.Option("--network", help="The network; may be repeated.", show_default="all")
    ] = None,
    candidates: Annotated[
        list[Candidate] | None,
        typer.Option("--candidate", help="What to time; may be repeated.", show_default="all but converted+compile"),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="Numbers of threads.", show_default="as bnbp info says")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Number of turns of each candidate.")] = 10,
    steps: Annotated[int, typer.Option(min=0, metavar="N", help="Number of steps to compare losses over.")] = 20,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of a step, on Linux.")] = True,
    sizes: Annotated[Sizes, typer.Option("--set", help="Networks as published, or tiny ones to try out.")] = Sizes.full,
    numbers: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Where to save the numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to save a plot: .png, .pdf or .svg.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Measure whole training steps in PyTorch: forward pass, loss, backward pass and SGD.

    Each network is timed as it is, with torch.compile, and as bnbp.torch.convert returns it. These take turns, in both
    memory formats. A time counts only if the gradients are right. Then the losses of some steps are compared, and the
    peak memory of a step is measured in a process of its own.

    All networks together take about an hour. Much of it is torch.compile, which needs a C++ compiler.
    """
    file_format = plot_format(plot) if plot else ""
    counts = _thread_counts(threads) if threads else (int(bnbp.show_config("dicts")["threads"]["default"]),)
    targets = {path: check_output(path, force) for path in (numbers, plot) if path}
    if numbers and plot and targets[numbers] == targets[plot]:
        raise typer.BadParameter("it is the file of --json", param_hint="--plot")
    if plot:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise Failure("the plot needs matplotlib; run: pip install 'bnbp[train]'") from error
    try:
        from .training.measure import Benchmark
    except ModuleNotFoundError as error:
        raise Failure("train-bench needs PyTorch; run: pip install 'bnbp[train]'") from error
    settings = Settings(
        set=str(sizes),
        networks=_names(networks or Network),
        candidates=_names(candidates or [Candidate.eager, Candidate.compile, Candidate.converted]),
        threads=counts,
        rounds=rounds,
        steps=steps,
        memory=memory,
    )

    measurement = Benchmark(settings)
    environment = measurement.environment()
    _print_environment(environment)
    rows = _measure(measurement)
    for count in counts:
        _print_table([row for row in rows if row.threads == count], settings)
    console.print(LEGEND, highlight=False)
    if numbers:
        write_file(numbers, targets[numbers], force, lambda stream: report.save(stream, settings, environment, rows))
        print_line(f"numbers saved in {numbers}")
    if plot:
        write_file(plot, targets[plot], force, lambda stream: draw(stream, file_format, rows, environment["cpu"]))
        print_line(f"plot saved in {plot}")
    wrong = [
        f"{TITLES[row.network]}, {result.way}: {result.note}"
        for row in rows
        for result in row.results
        if result.way.converted and not result.seconds
    ]
    if wrong:
        raise Failure(f"bnbp itself is wrong in {len(wrong)} places; first {wrong[0]}")


def _measure(measurement: "Benchmark") -> list[Row]:
    """Measure everything, with a progress bar."""
    points = measurement.points()
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(points))
        for network, threads in points:
            progress.update(task, description=f"{TITLES[network]}, {threads} thread{'s' * (threads > 1)}")
            rows.append(measurement.measure(network, threads))
            progress.advance(task)
    return rows


def _print_table(rows: list[Row], settings: Settings) -> None:
    """Print the times, ratios and losses with one number of threads, and why a time is missing."""
    threads = rows[0].threads
    table = Table(
        "", box=box.SIMPLE_HEAD, title=f"a step, ms, {threads} thread{'s' * (threads > 1)}", title_justify="left"
    )
    for name in ("batch", *settings.candidates, "PyTorch / converted", "memory", "losses", "losses, threads"):
        table.add_column(name, justify="right")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        ratio = report.speedup(row)
        table.add_row(
            TITLES[row.network],
            "x".join(map(str, row.shape)),
            *(report.milliseconds(row.best(name)) or "-" for name in settings.candidates),
            "{:.2f} {:.2f}".format(*ratio) if ratio else "-",
            number(report.memory_ratio(row), ".2f"),
            number(report.losses_apart(row, CONVERTED), ".0e"),
            number(report.losses_apart(row, OTHER_THREADS), ".0e"),
        )
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, crop=False, highlight=False)
    for row in rows:
        for result in row.results:
            if result.note:
                print_line(f"{TITLES[row.network]}, {result.way}: {result.note}")


LEGEND = (
    "Times are minima, in the faster memory format; * marks channels last. PyTorch / converted is the time of eager or "
    "compile, whichever is faster, over the time of converted: of the minima, then of the medians. memory is the peak "
    "memory of a converted step over the peak of an eager step, both beyond what is there between steps. losses is the "
    "largest difference between the losses of converted and of eager at the same step. losses, threads is the same for "
    "eager with another number of threads."
)
