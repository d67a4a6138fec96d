"""``bnbp bench``: the operators on this machine, beside its floor and other implementations."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bnbp
from bnbp._config import describe

from .benchmark import report
from .benchmark.candidates import BNBP, FLOOR, FRESH, OWN, PLAIN
from .benchmark.measure import Benchmark, Row, Seconds, Settings
from .benchmark.peers import PEERS
from .benchmark.plot import draw
from .benchmark.points import LAYOUTS, SETS, fused_with, label, tensor_type, title
from .files import check_output, plot_format, write_file
from .operators import Activation, Operator
from .terminal import Failure, console, print_line

__all__ = ["bench"]


class Shapes(StrEnum):
    """The sets of shapes of ``bnbp bench``."""

    network = "network"
    odd = "odd"
    small = "small"
    cache = "cache"
    all = "all"


class Layout(StrEnum):
    """Where the channels are."""

    nchw = "nchw"
    nhwc = "nhwc"
    both = "both"


class Peer(StrEnum):
    """What bnbp is compared with."""

    torch = "torch"
    compiled = "torch.compile"
    tensorflow = "tensorflow"
    jax = "jax"
    numpy = "numpy"
    none = "none"


class DType(StrEnum):
    """The type of the tensors."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


def bench(
    sets: Annotated[
        list[Shapes] | None, typer.Option("--set", help="A set of shapes; may be repeated.", show_default="network")
    ] = None,
    op: Annotated[
        list[Operator] | None, typer.Option(help="The operator; may be repeated.", show_default="all four")
    ] = None,
    activation: Annotated[
        Activation | None,
        typer.Option(help="The activation that follows the batch norm, as part of the operator.", show_default="none"),
    ] = None,
    addend: Annotated[
        bool, typer.Option("--addend", help="Add a tensor before the activation; compute its gradient as well.")
    ] = False,
    layout: Annotated[Layout, typer.Option(help="Channels first, channels last, or both.")] = Layout.both,
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="Numbers of threads.", show_default="1 and as bnbp info says")
    ] = None,
    peer: Annotated[
        list[Peer] | None, typer.Option(help="What to compare with; may be repeated.", show_default="all installed")
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="The type of the tensors; at 16 bits, parameters and statistics are float32.")
    ] = DType.float32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Number of turns of each candidate.")] = 10,
    numbers: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Where to save the numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to save a plot: .png, .pdf or .svg.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Measure the operators on this machine, beside a floor and other implementations.

    The floor is the time of a loop that only reads and writes what the operator must. It uses the same arrays, in turns
    with the operator. A time counts only if the answer is right.

    `--set network` is ResNet-50 with batches of 32. `--set cache` has tensors of 8,000 to 800,000 elements, which fit
    the caches. For these, compare with the other implementations. A plot of this set alone shows time per element
    against size.

    With an activation, the operators include it. The table also has the operators without it, PyTorch's functions one
    after the other, and the same functions compiled by torch.compile, which takes some seconds for each row.
    """
    if addend and not activation:
        raise typer.BadParameter("it needs --activation", param_hint="--addend")
    file_format = plot_format(plot) if plot else ""
    settings = Settings(
        sets=tuple(SETS) if sets and Shapes.all in sets else _names(sets or [Shapes.network]),
        operators=_names(op or Operator),
        layouts=LAYOUTS if layout == Layout.both else _names([layout]),
        threads=_thread_counts(threads),
        peers=_peers(peer, activation),
        dtype=str(dtype),
        rounds=rounds,
        activation=str(activation) if activation else None,
        addend=addend,
    )
    targets = {path: check_output(path, force) for path in (numbers, plot) if path}
    if numbers and plot and targets[numbers] == targets[plot]:
        raise typer.BadParameter("it is the file of --json", param_hint="--plot")
    if plot:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise Failure("the plot needs matplotlib; run: pip install 'bnbp[bench]'") from error
    try:
        tensor_type(dtype)
    except ModuleNotFoundError as error:
        raise Failure("bfloat16 needs ml_dtypes; run: pip install 'bnbp[bench]'") from error

    measurement = Benchmark(settings)
    environment = measurement.environment()
    _print_environment(environment)
    rows = _measure(measurement)
    for group in report.groups(rows).values():
        _print_bench_table(group, settings)
    console.print(LEGEND, highlight=False)
    if any(row.point.in_cache for row in rows):
        console.print(LEGEND_OF_CACHE, highlight=False)
    if activation:
        console.print(LEGEND_OF_ACTIVATION, highlight=False)
    if numbers:
        write_file(numbers, targets[numbers], force, lambda stream: report.save(stream, settings, environment, rows))
        print_line(f"numbers saved in {numbers}")
    if plot:
        heading = f"{environment['cpu']}, {dtype}{fused_with(activation, addend)}"
        write_file(plot, targets[plot], force, lambda stream: draw(stream, file_format, rows, heading))
        print_line(f"plot saved in {plot}")
    wrong = [f"{row.point}: {row.notes[name]}" for row in rows for name in OWN if name in row.notes]
    if wrong:
        raise Failure(f"bnbp itself is wrong in {len(wrong)} places; first {wrong[0]}")


def _names(members: Iterable[StrEnum]) -> tuple[str, ...]:
    """Each once, in the order given."""
    return tuple(dict.fromkeys(map(str, members)))


def _thread_counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return tuple(sorted({1, int(bnbp.show_config("dicts")["threads"]["default"])}))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 1 <= int(part) < 2**31 for part in parts):
        raise typer.BadParameter(f"expected numbers of threads such as 1,2, got {text!r}", param_hint="--threads")
    return tuple(dict.fromkeys(map(int, parts)))


def _peers(chosen: list[Peer] | None, activation: Activation | None) -> tuple[str, ...]:
    if not chosen:  # without an activation there is little to fuse
        return tuple(name for name in PEERS if activation or name != Peer.compiled)
    if Peer.none not in chosen:
        return _names(chosen)
    if len(set(chosen)) > 1:
        raise typer.BadParameter("none does not go with others", param_hint="--peer")
    return ()


def _print_environment(environment: dict[str, Any]) -> None:
    """Print the environment in words, what bnbp says of itself last."""
    known = {key: value for key, value in environment.items() if value not in (None, [], {})}
    of_bnbp = [(f"bnbp {name}", text) for name, text in describe(known.pop("bnbp"))]
    for name, text in describe(known) + of_bnbp:
        print_line(f"{name}: {text}")


def _measure(measurement: Benchmark) -> list[Row]:
    """Measure everything, with a progress bar."""
    points = measurement.points()
    rows = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(points))
        for point in points:
            progress.update(task, description=str(point))
            try:
                rows.append(measurement.measure(point))
            except MemoryError as error:
                raise Failure(f"there is not enough memory for {point}") from error
            progress.advance(task)
    return rows


def _print_bench_table(rows: list[Row], settings: Settings) -> None:
    """Print the times and ratios of one operator, layout and number of threads, and what there is to say of them."""
    point = rows[0].point
    total = report.total(rows)
    rivals = [report.rival(rows), PLAIN if point.activation else None] if point.in_cache else []
    compared = [name for name in rivals if name]
    small = point.in_cache or max(row.floor.median for row in rows) <= 2e-4
    scale, unit = (1e6, "us") if small else (1e3, "ms")
    others = [name for name in (PLAIN, *settings.peers) if any(name in row.seconds for row in rows)]

    def time(seconds: Seconds | None) -> str:
        return f"{seconds.median * scale:.2f}" if seconds else "-"

    def other_time(row: Row, name: str) -> str:
        seconds, own = row.seconds.get(name), row.seconds.get(BNBP)
        return time(seconds) + (f" ({seconds.over(own)[1]:.1f}x)" if seconds and own else "")

    def both(ratio: tuple[float, float] | None, applies: bool = False) -> str:
        return "{:.2f} {:.2f}".format(*ratio) + " *"[applies] if ratio else ""

    def ratios(row: Row, other: Seconds | None, applies: bool) -> str:
        own = row.seconds.get(BNBP)
        return both(own.over(other), applies and row is not total) if own and other else "-"

    def against(row: Row, name: str) -> str:
        return ratios(row, row.seconds.get(name), False)

    # What a row shows, by column; where one pass does, there is no second read.
    columns: dict[str, Callable[[Row], str]] = {
        "floor": lambda row: time(row.floor),
        "+ read": lambda row: time(row.floor_and_read),
        "bnbp": lambda row: time(row.seconds.get(BNBP)),
        "/ floor": lambda row: ratios(row, row.floor, not (row.second_read or point.in_cache)),
        "/ (floor + read)": lambda row: ratios(row, row.floor_and_read, row.second_read),
        "bnbp fresh": lambda row: time(row.seconds.get(FRESH)),
        **{name: partial(other_time, name=name) for name in others},
    }
    if not point.reduces or point.in_cache:
        del columns["+ read"], columns["/ (floor + read)"]
    for name in compared:
        columns[f"/ {name}"] = partial(against, name=name)

    table = Table(point.set, box=box.SIMPLE_HEAD, title=f"{title(point)}, {unit}", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        times = f", {row.point.times} times" if row.point.times > 1 else ""
        table.add_row(label(row.point.shape) + times, *(show(row) for show in columns.values()))
    if point.set == "network":
        table.add_section()
        table.add_row("total", *(show(total) for show in columns.values()), style="bold")
    elif point.in_cache:
        means = {f"/ {name}": both(report.geometric_mean(rows, name)) for name in (FLOOR, *compared)}
        table.add_section()
        table.add_row("geometric mean", *(means.get(name, "") for name in columns), style="bold")
    # A terminal may wrap what is too wide for it, and a file has room; rich would squeeze it.
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, crop=False, highlight=False)
    for line in report.remarks(rows):
        print_line(line)


LEGEND_OF_CACHE = "/ torch is bnbp's time over PyTorch's. Without PyTorch, the fastest peer takes its place."

LEGEND_OF_ACTIVATION = (
    "bnbp plain is the operator without the activation, and writes into results that exist. The others compute the "
    "same as bnbp. The gradients are given the forward result, which bnbp reads only if there is an addend. + read "
    "reads neither the forward result nor the addend again."
)

LEGEND = (
    "Times are medians. Each ratio is given twice: of the minima, then of the medians. The floor reads and writes each "
    "tensor once, and + read reads the inputs once more; * marks the ratio that applies. (2.0x) is twice bnbp's time. "
    "bnbp and the floor write into results that exist, and all others make new ones."
)
