"""The command line. Everything that can go wrong becomes one line on standard error; see :func:`main`."""

import difflib
import os
import secrets
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, BinaryIO, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bnbp

from . import benchmark, network, outofcore

__all__ = ["main"]

Arrays = dict[str, Any]


class Failure(Exception):
    """Something is wrong with a file or its data; the message is for the user. Exit code 1."""


class Interrupted(BaseException):
    """Ctrl-C, or a request to end. Not a KeyboardInterrupt, which typer would turn into an exit without a word."""


class Operator(StrEnum):
    """The operators that ``bnbp run`` offers; the functions of bnbp have these names after ``batch_norm_``."""

    training = "training"
    training_backprop = "training_backprop"
    inference = "inference"
    inference_backprop = "inference_backprop"


_BACKPROP_INPUTS = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")
INPUTS = {
    Operator.training: ("input", "gamma", "beta"),
    Operator.training_backprop: _BACKPROP_INPUTS,
    Operator.inference: ("input", "gamma", "beta", "mean", "variance"),
    Operator.inference_backprop: _BACKPROP_INPUTS,
}
OPTIONAL = ("gamma", "beta")

app = typer.Typer(
    help="Batch normalisation for CPUs, and its gradient.",
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

console = Console()


def main() -> int:
    """Run the command line and return the exit code.

    Returns
    -------
    int
        0; 1 if something is wrong with a file or its data; 2 if the command was not understood.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        code = app(prog_name="bnbp", standalone_mode=False)
        print(end="", flush=True)  # here, where a full disk still gets its one line
        return int(code or 0)
    except typer.TyperException as error:
        return _complain(f"{error.format_message().rstrip('.')}; see bnbp --help", code=2)
    except Failure as error:
        return _complain(str(error))
    except Interrupted:
        return _complain("interrupted")
    except OSError as error:  # only the terminal is left: files are handled where they are read and written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again, and complain
        return _complain(f"cannot write to standard output: {error.strerror}")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted


def _complain(message: str, code: int = 1) -> int:
    """Print one line, whatever characters a file name may hold; return the exit code."""
    print("bnbp:", _printable(message), file=sys.stderr)
    return code


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


@contextmanager
def _or_fail_to(action: str) -> Iterator[None]:
    """Say what could not be done, and why, when the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot {action}: {error.strerror or error}") from error


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bnbp {bnbp.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# bnbp info


@app.command()
def info() -> None:
    """Show the version, the instruction set, OpenMP, and the number of threads with where that number came from."""
    rows = _flat(bnbp.show_config("dicts"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"[bold]{escape(name):<{width}}[/bold]  {escape(value)}", soft_wrap=True, highlight=False)


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as rows: the keys on the way to a value, and the value."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + key, text))
    return rows


# bnbp run


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.npz|FOLDER", help="Arrays by the operator's input names.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where to save the results, by output name.")
    ],
    op: Annotated[
        Operator, typer.Option(metavar="OP", help=f"The operator: {', '.join(Operator)}.")
    ] = Operator.training_backprop,
    epsilon: Annotated[float, typer.Option(metavar="E", help="Added to the variance.")] = 1e-5,
    channel_axis: Annotated[int, typer.Option(metavar="K", help="The axis of the channels; -1 is channels-last.")] = 1,
    num_threads: Annotated[
        int | None, typer.Option(metavar="N", help="Upper limit of threads.", show_default="as bnbp info says")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that exist.")] = False,
) -> None:
    """Run an operator on the arrays of an .npz file, or of a folder of .npy files, and save its results in another.

    The inputs are input, gamma, beta, mean, variance and normalized_delta; training takes the first three and
    inference the first five, and gamma and beta may be left out (1 and 0). The results are input_delta, gamma_delta and
    beta_delta; or normalized, with batch_mean and batch_variance in training.

    In a folder the arrays are input.npy, mean.npy and so on, and the tensors may be larger than memory: a small part of
    each is there at a time. The results may go into the same folder.
    """
    options = {"epsilon": epsilon, "channel_axis": channel_axis, "num_threads": num_threads}
    results = (_run_folder if os.path.isdir(file) else _run_file)(file, output, op, force, options)
    table = Table("result", "shape", "type", box=box.SIMPLE_HEAD)
    for name, array in results.items():
        table.add_row(name, str(array.shape), str(array.dtype))
    console.print(table)
    _print_line(f"saved in {output}")


def _run_file(file: Path, output: Path, op: Operator, force: bool, options: dict[str, Any]) -> Arrays:
    with suppress(OSError):  # one of them is not there
        if output.samefile(file):
            raise typer.BadParameter("it is the input file", param_hint="--output")
    target = _check_output(output, force)
    with _or_refuse():
        arrays = _read(file, op)
        inputs = {name: arrays.get(name) for name in INPUTS[op]}
        result = getattr(bnbp, f"batch_norm_{op}")(**inputs, **options)
    results: Arrays = {"normalized": result} if isinstance(result, np.ndarray) else result._asdict()
    _write(output, target, force, lambda stream: np.savez(stream, **results))
    return results


def _run_folder(folder: Path, output: Path, op: Operator, force: bool, options: dict[str, Any]) -> Arrays:
    with ExitStack() as inputs, _or_refuse():
        _check_output_folder(output, op, force)
        files = {name: inputs.enter_context(_open_npy(folder / f"{name}.npy")) for name in _npy_names(folder, op)}
        outofcore.check(op, files, **options)
        with _new_files(output, outofcore.RESULTS[op], force) as streams, _progress() as progress:
            task = progress.add_task(op, total=outofcore.steps(op, files))
            return outofcore.compute(op, files, streams, lambda: progress.advance(task), **options)


def _check_output(output: Path, force: bool) -> Path:
    """Refuse an output that could not or must not be written, before any work; return the file to write."""
    action = f"write {output}"
    with _or_fail_to(action):
        target = Path(os.path.realpath(output))  # --force replaces what a symbolic link points to, not the link
        if not target.parent.is_dir():
            raise Failure(f"cannot {action}: there is no folder {output.parent}")
        if target.is_dir():
            raise Failure(f"cannot {action}: it is a folder")
        if target.exists() and not target.is_file():
            raise Failure(f"cannot {action}: it is not an ordinary file")  # replacing /dev/null would be a calamity
        if target.exists() and not force:
            raise Failure(f"cannot {action}: it exists; --force replaces it")
    return target


def _check_output_folder(output: Path, op: Operator, force: bool) -> None:
    """Refuse a folder for the results of an operator as :func:`_check_output` refuses a file."""
    action = f"write {output}"
    with _or_fail_to(action):
        if output.is_dir():
            for name in outofcore.RESULTS[op]:
                _check_output(output / f"{name}.npy", force)
        elif os.path.lexists(output):
            raise Failure(f"cannot {action}: it is not a folder")
        elif not output.absolute().parent.is_dir():
            raise Failure(f"cannot {action}: there is no folder {output.parent}")


def _read(path: Path, op: Operator) -> Arrays:
    """The arrays of an .npz file, which must be those that the operator takes."""
    with _or_fail_to(f"read {path}"), path.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # NumPy and zipfile have many ways to say it
            raise Failure(f"cannot read {path}: not an .npz file, or a damaged one") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise Failure(f"cannot read {path}: not an .npz file but a single array (.npy); numpy.savez names arrays")
        _check_names(path, op, archive.files)
        return {name: _read_array(path, archive, name) for name in archive.files}


def _check_names(path: Path, op: Operator, names: list[str]) -> None:
    known = INPUTS[op]
    takes = f"{op} takes {', '.join(known)}"
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (is it {close[0]}?)" if close else ""
            raise Failure(f"{path}: unknown array {name!r}{hint}; {takes}")
    missing = [name for name in known if name not in names and name not in OPTIONAL]
    if missing:
        raise Failure(f"{path}: missing {', '.join(missing)}; {takes} (gamma and beta may be left out)")


def _npy_names(folder: Path, op: Operator) -> list[str]:
    """The inputs that a folder has; results of an earlier run may lie beside them."""
    with _or_fail_to(f"read {folder}"):
        names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".npy")
    names = [name for name in names if name not in outofcore.RESULTS[op]]
    _check_names(folder, op, names)
    return names


@contextmanager
def _open_npy(path: Path) -> Iterator[outofcore.NpyFile]:
    with ExitStack() as opened:
        with _or_fail_to(f"read {path}"):
            if path.exists() and not path.is_file():
                raise Failure(f"cannot read {path}: it is not an ordinary file")  # a pipe would keep us waiting
            file = outofcore.NpyFile(str(path), opened.enter_context(path.open("rb")))
        yield file


def _read_array(path: Path, archive: Any, name: str) -> NDArray[Any]:
    try:
        with warnings.catch_warnings():  # a damaged header can be strange Python, which is warned of
            warnings.simplefilter("ignore")
            array = archive[name]
    except OSError:
        raise
    except Exception as error:  # a damaged array can raise almost anything
        if "allow_pickle" in str(error):
            raise Failure(f"{path}: {name} holds Python objects, which are not read") from error
        raise Failure(f"{path}: cannot read {name}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise Failure(f"{path}: {name} is not an array")
    return array.view(outofcore.element_type(f"{path}: {name}", array.dtype))


@contextmanager
def _or_refuse() -> Iterator[None]:
    """Say what the operator has to say of its arguments, or of the files that they are in."""
    try:
        yield
    except (TypeError, ValueError, outofcore.UnreadableError) as error:  # the operator's own checks name the argument
        raise Failure(str(error)) from error
    except MemoryError as error:
        raise Failure("there is not enough memory") from error


def _write(output: Path, target: Path, force: bool, write: Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all: the data go to a temporary file beside it, which then takes its name."""
    temporary = target.with_name(f".bnbp-{secrets.token_hex(8)}.tmp")
    with _or_fail_to(f"write {output}"):
        try:
            with temporary.open("xb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if force:
                temporary.replace(target)
            else:
                _rename_to_new(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _new_files(folder: Path, names: Iterable[str], force: bool) -> Iterator[dict[str, BinaryIO]]:
    """Write .npy files whole or not at all, and all or none: in the end each takes its name in the folder."""
    with _or_fail_to(f"write {folder}"), ExitStack() as undo:
        if not folder.exists():
            folder.mkdir()
            undo.callback(_remove_empty, folder)
        temporaries = {name: folder / f".bnbp-{secrets.token_hex(8)}.tmp" for name in names}
        streams: dict[str, BinaryIO] = {}
        for name, temporary in temporaries.items():
            undo.callback(temporary.unlink, missing_ok=True)
            streams[name] = undo.enter_context(temporary.open("xb"))
        yield streams
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        for name, temporary in temporaries.items():
            target = folder / f"{name}.npy"
            if force:
                temporary.replace(target)
            else:
                _rename_to_new(temporary, target)
                undo.callback(target.unlink, missing_ok=True)
        undo.pop_all()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody else has put something into it
        folder.rmdir()


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename a file, unless the new name has appeared meanwhile: a plain rename would replace what has it."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        target.open("xb").close()
        source.replace(target)
    else:
        source.unlink()


def _print_line(text: str) -> None:
    """Print a line with a path in it: not wrapped, and not taken for markup."""
    console.print(_printable(text), soft_wrap=True, markup=False, highlight=False)


def _progress() -> Progress:
    """A progress bar, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


# bnbp demo

WITHOUT, WITH = "without batch norm", "with batch norm"


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the weights, the split and the batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="How often each network sees every image.")] = 8,
    plot: Annotated[Path, typer.Option(metavar="PATH", help="Where to save the plot: .png, .pdf or .svg.")] = Path(
        "bnbp-demo.png"
    ),
    num_threads: Annotated[int, typer.Option(min=1, metavar="N", help="Upper limit of bnbp's threads.")] = 1,
) -> None:
    """Train a small network on images of handwritten digits, with and without batch norm, and compare.

    Needs scikit-learn (the images) and matplotlib (the plot).
    """
    file_format = plot.suffix[1:].lower()
    if file_format not in ("png", "pdf", "svg"):
        raise typer.BadParameter("expected a name that ends in .png, .pdf or .svg", param_hint="--plot")
    target = _check_output(plot, force=True)
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise Failure("the demo needs scikit-learn and matplotlib; run: pip install 'bnbp[demo]'") from error

    digits = network.load_digits(seed)
    operators = network.TimedOperators(num_threads)
    curves, seconds = _train({WITHOUT: None, WITH: operators}, digits, epochs, seed)
    share = operators.seconds / seconds[WITH]
    deviations = {
        dtype.__name__: network.gradient_deviation(operators, digits, seed, dtype) for dtype in (np.float32, np.float64)
    }
    _write(plot, target, True, lambda stream: network.draw_learning_curves(stream, file_format, curves))

    console.print(
        f"Learning rate {network.LEARNING_RATE}, momentum {network.MOMENTUM}, batches of {network.BATCH} for both: "
        "a high rate, but one with which the network still learns without batch norm.",
        highlight=False,
    )
    console.print(_demo_table(curves, seconds, share, deviations))
    console.print(
        "Gradient deviation: from the same network with bnbp.reference in float64, over all parameters; the largest "
        "difference in a layer divided by the layer's largest gradient, of the worst layer.",
        highlight=False,
    )
    _print_line(f"plot saved in {plot}")


def _train(
    variants: dict[str, network.TimedOperators | None], digits: network.Digits, epochs: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Train each variant, with a progress bar; return the test accuracies after each epoch, and the seconds."""
    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    with _progress() as progress:
        for name, operators in variants.items():
            start = time.perf_counter()
            training = network.train(network.build_network(operators, seed), digits, epochs, seed)
            curves[name] = list(progress.track(training, total=epochs, description=f"{name:<{len(WITHOUT)}}"))
            seconds[name] = time.perf_counter() - start
    return curves, seconds


def _demo_table(
    curves: dict[str, list[float]], seconds: dict[str, float], share: float, deviations: dict[str, float]
) -> Table:
    table = Table("", *curves, box=box.SIMPLE_HEAD)
    for epoch in sorted({1, len(curves[WITH])}):
        accuracies = (f"{curve[epoch - 1]:.1%}" for curve in curves.values())
        table.add_row(f"test accuracy after {epoch} epoch{'s' * (epoch > 1)}", *accuracies)
    table.add_row("training time", *(f"{taken:.1f} s" for taken in seconds.values()))
    table.add_row("of that in bnbp", "", f"{share:.1%}")
    for dtype, deviation in deviations.items():
        table.add_row(f"gradient deviation in {dtype}", "", f"{deviation:.1e}")
    return table


# bnbp bench


class Shapes(StrEnum):
    """The sets of shapes of ``bnbp bench``."""

    network = "network"
    odd = "odd"
    small = "small"
    all = "all"


class Layout(StrEnum):
    """Where the channels are."""

    nchw = "nchw"
    nhwc = "nhwc"
    both = "both"


class Peer(StrEnum):
    """What bnbp is compared with."""

    torch = "torch"
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


@app.command()
def bench(
    sets: Annotated[
        list[Shapes] | None, typer.Option("--set", help="The shapes; may be repeated.", show_default="network")
    ] = None,
    op: Annotated[
        list[Operator] | None, typer.Option(help="The operator; may be repeated.", show_default="all four")
    ] = None,
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
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="How often each candidate has its turn.")] = 10,
    numbers: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Where to save the numbers.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to save a plot: .png, .pdf or .svg.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Measure the operators on this machine, beside its floor and beside other implementations.

    The floor is the time of a loop that reads and writes what the operator must and does nothing else, on the same
    arrays and in turns with it. The network is ResNet-50 with batches of 32. No time counts before the answer is right.
    """
    file_format = plot.suffix[1:].lower() if plot else ""
    if plot and file_format not in ("png", "pdf", "svg"):
        raise typer.BadParameter("expected a name that ends in .png, .pdf or .svg", param_hint="--plot")
    settings = benchmark.Settings(
        sets=tuple(benchmark.SETS) if sets and Shapes.all in sets else _names(sets or [Shapes.network]),
        operators=_names(op or Operator),
        layouts=benchmark.LAYOUTS if layout == Layout.both else _names([layout]),
        threads=_thread_counts(threads),
        peers=_peers(peer),
        dtype=str(dtype),
        rounds=rounds,
    )
    targets = {path: _check_output(path, force) for path in (numbers, plot) if path}
    if numbers and plot and targets[numbers] == targets[plot]:
        raise typer.BadParameter("it is the file of --json", param_hint="--plot")
    if plot:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise Failure("the plot needs matplotlib; run: pip install 'bnbp[bench]'") from error
    try:
        benchmark.tensor_type(dtype)
    except ModuleNotFoundError as error:
        raise Failure("bfloat16 needs ml_dtypes; run: pip install 'bnbp[bench]'") from error

    measurement = benchmark.Benchmark(settings)
    environment = measurement.environment()
    _print_environment(environment)
    rows = _measure(measurement)
    for group in benchmark.groups(rows).values():
        _print_bench_table(group, settings)
    console.print(LEGEND, highlight=False)
    if numbers:
        _write(numbers, targets[numbers], force, lambda stream: benchmark.save(stream, settings, environment, rows))
        _print_line(f"numbers saved in {numbers}")
    if plot:
        heading = f"{environment['cpu']}, {dtype}"
        _write(plot, targets[plot], force, lambda stream: benchmark.draw(stream, file_format, rows, heading))
        _print_line(f"plot saved in {plot}")
    wrong = [f"{row.point}: {row.notes[name]}" for row in rows for name in benchmark.OWN if name in row.notes]
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


def _peers(chosen: list[Peer] | None) -> tuple[str, ...]:
    if not chosen:
        return tuple(benchmark.PEERS)
    if Peer.none not in chosen:
        return _names(chosen)
    if len(set(chosen)) > 1:
        raise typer.BadParameter("none does not go with others", param_hint="--peer")
    return ()


def _print_environment(environment: dict[str, Any]) -> None:
    for name, value in _flat({key: value for key, value in environment.items() if value not in (None, [], {})}):
        _print_line(f"{name}: {value}")


def _measure(measurement: benchmark.Benchmark) -> list[benchmark.Row]:
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


def _print_bench_table(rows: list[benchmark.Row], settings: benchmark.Settings) -> None:
    """Print the times and ratios of one operator, layout and number of threads, and what there is to say of them."""
    point = rows[0].point
    total = benchmark.total(rows)
    scale, unit = (1e3, "ms") if max(row.floor.median for row in rows) > 2e-4 else (1e6, "us")
    peers = [name for name in settings.peers if any(name in row.seconds for row in rows)]

    def time(seconds: benchmark.Seconds | None) -> str:
        return f"{seconds.median * scale:.2f}" if seconds else "-"

    def peer_time(row: benchmark.Row, name: str) -> str:
        seconds, own = row.seconds.get(name), row.seconds.get(benchmark.BNBP)
        return time(seconds) + (f" ({seconds.over(own)[1]:.1f}x)" if seconds and own else "")

    def ratios(row: benchmark.Row, floor: benchmark.Seconds | None, applies: bool) -> str:
        own = row.seconds.get(benchmark.BNBP)
        return "{:.2f} {:.2f}".format(*own.over(floor)) + " *"[applies and row is not total] if own and floor else "-"

    # What a row shows, by column; where one pass does, there is no second read.
    columns: dict[str, Callable[[benchmark.Row], str]] = {
        "floor": lambda row: time(row.floor),
        "+ read": lambda row: time(row.floor_and_read),
        "bnbp": lambda row: time(row.seconds.get(benchmark.BNBP)),
        "/ floor": lambda row: ratios(row, row.floor, not row.second_read),
        "/ (floor + read)": lambda row: ratios(row, row.floor_and_read, row.second_read),
        "bnbp fresh": lambda row: time(row.seconds.get(benchmark.FRESH)),
        **{name: partial(peer_time, name=name) for name in peers},
    }
    if not point.reduces:
        del columns["+ read"], columns["/ (floor + read)"]

    table = Table(point.set, box=box.SIMPLE_HEAD, title=f"{benchmark.title(point)}, {unit}", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        times = f", {row.point.times} times" if row.point.times > 1 else ""
        table.add_row(benchmark.label(row.point.shape) + times, *(show(row) for show in columns.values()))
    if point.set == "network":
        table.add_section()
        table.add_row("total", *(show(total) for show in columns.values()), style="bold")
    # A terminal may wrap what is too wide for it, and a file has room; rich would squeeze it.
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, crop=False, highlight=False)
    for line in benchmark.remarks(rows):
        _print_line(line)


LEGEND = (
    "Times are medians; ratios are those of the minima and of the medians. The floor reads and writes each tensor "
    "once, + read reads the inputs once more; * marks the one that applies. (2.0x) is twice bnbp's time. bnbp and the "
    "floor write into results that exist, all others make new ones."
)
