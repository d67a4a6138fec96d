"""New files, written whole or not at all, and never over a file that nobody said to replace."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import typer

from .terminal import Failure, or_fail_to

__all__ = ["check_output", "new_files", "plot_format", "write_file"]


def check_output(output: Path, force: bool) -> Path:
    """Refuse an output that could not or must not be written, before any work; return the file to write."""
    action = f"write {output}"
    with or_fail_to(action):
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


def write_file(output: Path, target: Path, force: bool, write: Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all: the data go to a temporary file beside it, which then takes its name."""
    temporary = target.with_name(f".bnbp-{secrets.token_hex(8)}.tmp")
    with or_fail_to(f"write {output}"):
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


def plot_format(path: Path) -> str:
    """The format that the name of a plot asks for."""
    file_format = path.suffix[1:].lower()
    if file_format not in ("png", "pdf", "svg"):
        raise typer.BadParameter("expected a name that ends in .png, .pdf or .svg", param_hint="--plot")
    return file_format


@contextmanager
def new_files(folder: Path, names: Iterable[str], force: bool) -> Iterator[dict[str, BinaryIO]]:
    """Write .npy files whole or not at all, and all or none: in the end each takes its name in the folder."""
    with or_fail_to(f"write {folder}"), ExitStack() as undo:
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
