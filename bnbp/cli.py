"""The command line. Everything that can go wrong becomes one line on standard error; see :func:`main`."""

import difflib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, BinaryIO, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bnbp

from . import demo as network

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
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="Arrays by the operator's input names.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.npz", help="Where to save the results, by output name.")
    ],
    op: Annotated[
        Operator, typer.Option(metavar="OP", help=f"The operator: {', '.join(Operator)}.")
    ] = Operator.training_backprop,
    epsilon: Annotated[float, typer.Option(metavar="E", help="Added to the variance.")] = 1e-5,
    channel_axis: Annotated[int, typer.Option(metavar="K", help="The axis of the channels; -1 is channels-last.")] = 1,
    num_threads: Annotated[
        int | None, typer.Option(metavar="N", help="Upper limit of threads.", show_default="as bnbp info says")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.npz if it exists.")] = False,
) -> None:
    """Run an operator on the arrays of an .npz file, and save its results in another.

    The inputs are input, gamma, beta, mean, variance and normalized_delta; training takes the first three and
    inference the first five, and gamma and beta may be left out (1 and 0). The results are input_delta, gamma_delta and
    beta_delta; or normalized, with batch_mean and batch_variance in training.
    """
    with suppress(OSError):  # one of them is not there
        if output.samefile(file):
            raise typer.BadParameter("it is the input file", param_hint="--output")
    target = _check_output(output, force)
    arrays = _read(file, op)
    results = _compute(op, arrays, epsilon=epsilon, channel_axis=channel_axis, num_threads=num_threads)
    _write(output, target, force, lambda stream: np.savez(stream, **results))

    table = Table("result", "shape", "type", box=box.SIMPLE_HEAD)
    for name, array in results.items():
        table.add_row(name, str(array.shape), str(array.dtype))
    console.print(table)
    _print_line(f"saved in {output}")


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


def _read_array(path: Path, archive: Any, name: str) -> NDArray[Any]:
    try:
        array = archive[name]
    except OSError:
        raise
    except Exception as error:  # a damaged array can raise almost anything
        if "allow_pickle" in str(error):
            raise Failure(f"{path}: {name} holds Python objects, which are not read") from error
        raise Failure(f"{path}: cannot read {name}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise Failure(f"{path}: {name} is not an array")
    return array


def _compute(op: Operator, arrays: Arrays, **options: Any) -> Arrays:
    """Results of the operator by their names."""
    inputs = {name: arrays.get(name) for name in INPUTS[op]}
    try:
        result = getattr(bnbp, f"batch_norm_{op}")(**inputs, **options)
    except (TypeError, ValueError) as error:  # the operator's own checks name the argument
        raise Failure(str(error)) from error
    except MemoryError as error:
        raise Failure("there is not enough memory for the results") from error
    return {"normalized": result} if isinstance(result, np.ndarray) else result._asdict()


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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
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
