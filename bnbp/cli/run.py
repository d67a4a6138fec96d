"""``bnbp run``: an operator on the arrays of a file, or of a folder of files that may be larger than memory."""

import difflib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
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
from .operators import NAMES, STATISTICS, TENSORS, Activation, Operator, inputs, is_backprop, optional, outputs
from .team import Comm, Team, team_of
from .terminal import Failure, console, or_fail_to, print_line, progress_bar

__all__ = ["run"]

Arrays = dict[str, Any]


def run(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.npz|FOLDER",
            help="The operator's inputs by name: an .npz file, or a folder of .npy files.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Where to save the results by name: an .npz file if the input is a file, a folder if it is a folder. "
            "The name of the file may leave out .npz; the folder is made if need be. The output may be the input "
            "itself; the results are then added to it.",
        ),
    ],
    op: Annotated[
        Operator, typer.Option(metavar="OP", help=f"The operator: {', '.join(Operator)}.")
    ] = Operator.training_backprop,
    activation: Annotated[
        Activation | None,
        typer.Option(help="The activation that follows the batch norm, as part of the operator.", show_default="none"),
    ] = None,
    addend: Annotated[
        bool, typer.Option("--addend", help="Also save the gradient of an addend; for the backprop operators.")
    ] = False,
    epsilon: Annotated[float, typer.Option(metavar="E", help="Added to the variance.")] = 1e-5,
    channel_axis: Annotated[int, typer.Option(metavar="K", help="The axis of the channels; -1 is channels-last.")] = 1,
    num_threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Upper limit for the number of threads.", show_default="as bnbp info says"),
    ] = None,
    comm: Annotated[
        Comm | None,
        typer.Option(
            metavar="none|mpi",
            help="mpi: share the work among the processes of mpirun. none: each process does all of it.",
            show_default="mpi, if mpirun has started several",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace results that exist.")] = False,
) -> None:
    """Run an operator on the arrays of an .npz file, or of a folder of .npy files, and save its results.

    The inputs are input, gamma, beta, mean, variance and normalized_delta. training takes the first three, inference
    the first five, and the backprop operators take all six. gamma and beta may be left out; they are then 1 and 0.
    training returns normalized, batch_mean and batch_variance. inference returns normalized. The backprop operators
    return input_delta, gamma_delta and beta_delta.

    Runs can be chained. `bnbp run F -o F --op training` adds its results to F. Add normalized_delta to F, and
    `bnbp run F -o F` takes batch_mean and batch_variance for mean and variance. If F has a mean or a variance of its
    own, the operator takes that instead. Arrays that only other operators take or return are left alone. Results that
    exist are replaced only with --force.

    training and inference add the array addend, if there is one, before the activation. With an activation, the
    backprop operators also take the array normalized, the forward operator's result. It may be left out if there was no
    addend. With --addend, the backprop operators also save addend_delta.

    In a folder, the arrays are input.npy, mean.npy and so on. The tensors may be larger than memory, because only a
    small part of each is in memory at a time.

    With a folder, `mpirun -n 4 bnbp run FOLDER -o OUT` shares the work among 4 processes. All of them must see the same
    folders. Each reads and writes its part of the tensors. Results are bit-for-bit identical for any number of
    processes. If a program runs under mpirun, and each of its processes starts bnbp run for itself, use `--comm none`.
    """
    options: dict[str, Any] = {"epsilon": epsilon, "channel_axis": channel_axis, "num_threads": num_threads}
    options["activation"] = str(activation) if activation else None
    if is_backprop(op):
        options["addend"] = addend
    elif addend:
        raise typer.BadParameter(
            f"only the backprop operators take it; {op} adds the array addend if there is one", param_hint="--addend"
        )
    team = team_of(comm)
    if os.path.isdir(file):
        if output.suffix == ".npz" and not output.is_dir():
            raise typer.BadParameter(
                "the results of a folder are saved in a folder, not in a file", param_hint="--output"
            )
        results = _run_folder(file, output, op, force, options, team)
    elif team.size == 1:
        output = _with_suffix(output)
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
    print_line(f"saved in {'the folder ' * output.is_dir()}{output}")


def _with_suffix(output: Path) -> Path:
    """The file that is meant: .npz may be left out, as numpy.savez has it. A folder is refused where it is checked."""
    return output if output.suffix == ".npz" or output.is_dir() else output.with_name(f"{output.name}.npz")


def _run_file(file: Path, output: Path, op: Operator, force: bool, options: dict[str, Any]) -> Arrays:
    names = outputs(op, options.get("addend", False))
    adds = False
    with suppress(OSError):  # one of them is not there
        adds = output.samefile(file)
    target = check_output(output, force or adds)
    with _or_refuse():
        arrays: Arrays = dict.fromkeys(inputs(op, options["activation"]))
        arrays |= _read(file, op, options, names if adds and not force else ())
        result = getattr(bnbp, f"batch_norm_{op}")(**arrays, **options)
    results: Arrays = {"normalized": result} if isinstance(result, np.ndarray) else result._asdict()
    save = partial(_add, file, results) if adds else lambda stream: np.savez(stream, **results)
    write_file(output, target, force or adds, save)
    return results


def _add(path: Path, results: Arrays, stream: BinaryIO) -> None:
    """Write an .npz file again with these arrays in it. All that it has besides them stays as it is."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            if member.filename.removesuffix(".npy") not in results:
                try:
                    data = old.read(member)
                except Exception as error:  # a damaged array can raise almost anything
                    raise Failure(f"{path}: cannot read {member.filename}: {error}") from error
                new.writestr(member, data)
        for name, array in results.items():
            with new.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _run_folder(folder: Path, output: Path, op: Operator, force: bool, options: dict[str, Any], team: Team) -> Arrays:
    results = outputs(op, options.get("addend", False))
    with team, ExitStack() as opened, _or_refuse():
        if team.rank == 0:
            _check_output_folder(output, results, force)
        files = {name: opened.enter_context(_open_npy(path)) for name, path in _npy_files(folder, op, options).items()}
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
                    raise Failure(f"process {rank} {verb} a different {name} from process 0")


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


def _read(path: Path, op: Operator, options: dict[str, Any], new: Collection[str]) -> Arrays:
    """The arrays of an .npz file that the operator takes. It must not have those yet that are `new`."""
    with or_fail_to(f"read {path}"), path.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # NumPy and zipfile have many ways to say it
            raise Failure(f"cannot read {path}: not an .npz file, or a damaged one") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise Failure(f"cannot read {path}: a single array (.npy), not an .npz file; save with numpy.savez")
        for name in archive.files:
            if name in new:
                raise Failure(f"cannot write {path}: it has {name}; --force replaces it")
        taken = _taken(path, op, archive.files, options)
        return {operand: _read_array(path, archive, name) for operand, name in taken.items()}


def _taken(path: Path, op: Operator, names: list[str], options: dict[str, Any]) -> dict[str, str]:
    """Which array is which of the operator's inputs; none that it needs may be missing.

    What other operators take or return may lie among them, and is left alone; any other name is a mistake.
    """
    activation, has_addend = options["activation"], is_backprop(op) and (options["addend"] or "addend" in names)
    known, may_be_left_out = inputs(op, activation), optional(op, activation, has_addend)
    case = f" with an activation{' and an addend' * has_addend}" if activation else ""
    takes = f"{op}{case} takes {', '.join(known)}"
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise Failure(f"{path}: unknown array {name!r}{hint}; {takes}")
    taken = {name: name for name in names if name in known}
    if not STATISTICS.keys() & taken.keys():  # both or none: those of two runs would not go together
        taken |= {name: result for name, result in STATISTICS.items() if name in known and result in names}
    missing = [name for name in known if name not in taken and name not in may_be_left_out]
    if missing:
        *most, last = may_be_left_out
        raise Failure(f"{path}: missing {', '.join(missing)}; {takes} ({', '.join(most)} and {last} may be left out)")
    return taken


def _npy_files(folder: Path, op: Operator, options: dict[str, Any]) -> dict[str, Path]:
    """The files of a folder that are the operator's inputs."""
    with or_fail_to(f"read {folder}"):
        names = sorted(path.stem for path in folder.iterdir() if path.suffix == ".npy")
    return {operand: folder / f"{name}.npy" for operand, name in _taken(folder, op, names, options).items()}


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
