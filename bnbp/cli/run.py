"""``bnbp run``: an operator on the arrays of a file, or of a folder of files that may be larger than memory."""

import difflib
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.table import Table

import bnbp

from . import outofcore
from .files import check_output, new_files, write_file
from .operators import TENSORS, Activation, Operator, inputs, is_backprop, optional, outputs
from .team import Comm, Team, team_of
from .terminal import Failure, console, or_fail_to, print_line, progress_bar

__all__ = ["run"]

Arrays = dict[str, Any]


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.npz|FOLDER", help="Arrays by the operator's input names.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where to save the results, by output name.")
    ],
    op: Annotated[
        Operator, typer.Option(metavar="OP", help=f"The operator: {', '.join(Operator)}.")
    ] = Operator.training_backprop,
    activation: Annotated[
        Activation | None, typer.Option(help="What follows the batch norm as a part of it.", show_default="none")
    ] = None,
    addend: Annotated[
        bool, typer.Option("--addend", help="Save the gradient of an addend as well; for the backprop operators.")
    ] = False,
    epsilon: Annotated[float, typer.Option(metavar="E", help="Added to the variance.")] = 1e-5,
    channel_axis: Annotated[int, typer.Option(metavar="K", help="The axis of the channels; -1 is channels-last.")] = 1,
    num_threads: Annotated[
        int | None, typer.Option(metavar="N", help="Upper limit of threads.", show_default="as bnbp info says")
    ] = None,
    comm: Annotated[
        Comm | None,
        typer.Option(
            metavar="none|mpi",
            help="Share the work among the processes of mpirun, or have each do all of it.",
            show_default="mpi, if mpirun has started several",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that exist.")] = False,
) -> None:
    """Run an operator on the arrays of an .npz file, or of a folder of .npy files, and save its results in another.

    The inputs are input, gamma, beta, mean, variance and normalized_delta; training takes the first three and
    inference the first five, and gamma and beta may be left out (1 and 0). The results are input_delta, gamma_delta and
    beta_delta; or normalized, with batch_mean and batch_variance in training.

    Training and inference add the array addend, if there is one, before the activation. With an activation, the
    backprop operators take the array normalized as well, the forward operator's result. It may be left out where there
    was no addend. With --addend they also save addend_delta.

    In a folder the arrays are input.npy, mean.npy and so on, and the tensors may be larger than memory: a small part of
    each is there at a time. The results may go into the same folder. Results that lie there already and are no inputs
    of the operator are left alone.

    With a folder, `mpirun -n 4 bnbp run FOLDER -o OUT` shares the work among 4 processes, which all must see the same
    folders. Each reads and writes its part of the tensors. The results have the same bits on any number of processes.
    A program that runs under mpirun, and starts bnbp run for itself, needs `--comm none`.
    """
    options: dict[str, Any] = {"epsilon": epsilon, "channel_axis": channel_axis, "num_threads": num_threads}
    options["activation"] = str(activation) if activation else None
    if is_backprop(op):
        options["addend"] = addend
    elif addend:
        raise typer.BadParameter(f"{op} adds the array addend if there is one", param_hint="--addend")
    team = team_of(comm)
    if os.path.isdir(file):
        results = _run_folder(file, output, op, force, options, team)
    elif team.size == 1:
        results = _run_file(file, output, op, force, options)
    else:
        raise typer.BadParameter(
            f"{team.size} processes share the work on a folder of .npy files, not on a single file; "
            "--comm none lets each do all of it",
            param_hint="FILE",
        )
    if team.rank:
        return
    table = Table("result", "shape", "type", box=box.SIMPLE_HEAD)
    for name, array in results.items():
        table.add_row(name, str(array.shape), str(array.dtype))
    console.print(table)
    print_line(f"saved in {output}")


def _run_file(file: Path, output: Path, op: Operator, force: bool, options: dict[str, Any]) -> Arrays:
    with suppress(OSError):  # one of them is not there
        if output.samefile(file):
            raise typer.BadParameter("it is the input file", param_hint="--output")
    target = check_output(output, force)
    with _or_refuse():
        arrays: Arrays = dict.fromkeys(inputs(op, options["activation"]))
        arrays |= _read(file, op, options)
        result = getattr(bnbp, f"batch_norm_{op}")(**arrays, **options)
    results: Arrays = {"normalized": result} if isinstance(result, np.ndarray) else result._asdict()
    write_file(output, target, force, lambda stream: np.savez(stream, **results))
    return results


def _run_folder(folder: Path, output: Path, op: Operator, force: bool, options: dict[str, Any], team: Team) -> Arrays:
    results = outputs(op, options.get("addend", False))
    with team, ExitStack() as opened, _or_refuse():
        if team.rank == 0:
            _check_output_folder(output, results, force)
        names = _npy_names(folder, op, options)
        files = {name: opened.enter_context(_open_npy(folder / f"{name}.npy")) for name in names}
        outofcore.check(op, files, **options)
        _check_agreement(team, op, files, options)
        with _new_files(team, output, results, force) as streams, progress_bar(team.rank == 0) as progress:
            task = progress.add_task(op, total=outofcore.steps(op, files, team))
            return outofcore.compute(op, files, streams, lambda: progress.advance(task), team, **options)


def _check_agreement(team: Team, op: Operator, files: dict[str, outofcore.NpyFile], options: dict[str, Any]) -> None:
    """Refuse processes that were told, or see, different things."""
    told = {"operator": str(op), **options, "num_threads": None}
    vectors = {name: file.read().tobytes() for name, file in files.items() if name not in TENSORS}
    seen = {
        name: (
            file.like.shape,
            str(file.like.dtype),
            file.fortran_order,
            hashlib.sha256(vectors.get(name, b"")).digest(),
        )
        for name, file in files.items()
    }
    first, *others = team.share((told, seen))
    for rank, other in enumerate(others, 1):
        for mine, its, verb in zip(first, other, ("was given", "sees"), strict=True):
            for name in sorted(mine.keys() | its.keys()):
                if mine.get(name) != its.get(name):
                    raise Failure(f"process {rank} {verb} another {name} than process 0")


@contextmanager
def _new_files(team: Team, folder: Path, names: Iterable[str], force: bool) -> Iterator[dict[str, BinaryIO]]:
    """The files of :func:`new_files`, which the first process makes, and all write to."""
    with ExitStack() as opened:
        streams = opened.enter_context(new_files(folder, names, force)) if team.rank == 0 else {}
        paths = team.share({name: os.path.abspath(stream.name) for name, stream in streams.items()})[0]
        with or_fail_to(f"write {folder}"):
            if team.rank:
                streams = {name: opened.enter_context(open(path, "r+b")) for name, path in paths.items()}
            yield streams
            for stream in streams.values():
                stream.flush()
                if team.rank:  # the first process does so later
                    os.fsync(stream.fileno())
        team.share(None)  # all is written; now the files get their names


def _check_output_folder(output: Path, results: Iterable[str], force: bool) -> None:
    """Refuse a folder for results as :func:`check_output` refuses a file."""
    action = f"write {output}"
    with or_fail_to(action):
        if output.is_dir():
            for name in results:
                check_output(output / f"{name}.npy", force)
        elif os.path.lexists(output):
            raise Failure(f"cannot {action}: it is not a folder")
        elif not output.absolute().parent.is_dir():
            raise Failure(f"cannot {action}: there is no folder {output.parent}")


def _read(path: Path, op: Operator, options: dict[str, Any]) -> Arrays:
    """The arrays of an .npz file, which must be those that the operator takes."""
    with or_fail_to(f"read {path}"), path.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # NumPy and zipfile have many ways to say it
            raise Failure(f"cannot read {path}: not an .npz file, or a damaged one") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise Failure(f"cannot read {path}: not an .npz file but a single array (.npy); numpy.savez names arrays")
        return {name: _read_array(path, archive, name) for name in _taken(path, op, archive.files, options)}


def _taken(path: Path, op: Operator, names: list[str], options: dict[str, Any]) -> list[str]:
    """Those of some arrays that the operator takes; all must be known, and none that it needs may be missing.

    What only the forward operator takes, or what it has returned, may lie among the arrays of its gradient.
    """
    activation, has_addend = options["activation"], is_backprop(op) and (options["addend"] or "addend" in names)
    known, may_be_left_out = inputs(op, activation), optional(op, activation, has_addend)
    case = f" with an activation{' and an addend' * has_addend}" if activation else ""
    takes = f"{op}{case} takes {', '.join(known)}"
    for name in names:
        if name not in known and not (is_backprop(op) and name in ("addend", "normalized")):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (is it {close[0]}?)" if close else ""
            raise Failure(f"{path}: unknown array {name!r}{hint}; {takes}")
    missing = [name for name in known if name not in names and name not in may_be_left_out]
    if missing:
        *most, last = may_be_left_out
        raise Failure(f"{path}: missing {', '.join(missing)}; {takes} ({', '.join(most)} and {last} may be left out)")
    return [name for name in names if name in known]


def _npy_names(folder: Path, op: Operator, options: dict[str, Any]) -> list[str]:
    """The inputs that a folder has; results of earlier runs may lie beside them."""
    results = {name for each in Operator for name in outputs(each, is_backprop(each))}
    with or_fail_to(f"read {folder}"):
        names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".npy")
    names = [name for name in names if name not in results or name in inputs(op, options["activation"])]
    return _taken(folder, op, names, options)


@contextmanager
def _open_npy(path: Path) -> Iterator[outofcore.NpyFile]:
    with ExitStack() as opened:
        with or_fail_to(f"read {path}"):
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
