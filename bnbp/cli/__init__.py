"""The command line. Everything that can go wrong becomes one line on standard error; see :func:`main`.

A file uses only those below it in this list, and of bnbp only what its users may use.

``__init__.py``
    What the commands are, and what their failures become.
``info.py``, ``run.py``, ``demo.py``, ``bench.py``, ``train_bench.py``
    The commands: each its options, what it refuses, and what it prints.
``outofcore.py``
    The operators on tensors that may be larger than memory, for ``run``.
``network.py``
    The network that ``demo`` trains.
``benchmark/``
    What ``bench`` measures, and how; a map of its own.
``training/``
    What ``train-bench`` measures, and how; a map of its own. Only its command imports PyTorch, when it runs.
``team.py``
    The processes that ``run`` may be shared among.
``operators.py``
    The operators by name.
``files.py``
    New files, written whole or not at all.
``terminal.py``
    The console, and failures.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import bnbp

from . import bench, demo, info, run, train_bench
from .team import is_first_of_several
from .terminal import Failure, printable

__all__ = ["main"]


class Interrupted(BaseException):
    """Ctrl-C, or a request to end. Not a KeyboardInterrupt, which typer would turn into an exit without a word."""


class Command(TyperCommand):
    """A command whose help shows no type for a flag, and whose refusals know which command they belong to."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters; typer would show ``<bool>`` beside a flag, as if it took a value."""
        return _without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.ctx = error.ctx or ctx
            raise


class Group(TyperGroup):
    """The group of all commands. Its help shows no type for a flag either."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters, without types for flags."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: Sequence[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return list(parameters)


app = typer.Typer(
    cls=Group,
    help="Batch normalisation and its gradient on CPUs.",
    invoke_without_command=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        if not is_first_of_several():  # all of them were given the same command
            return 2
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "bnbp"
        return _complain(f"{error.format_message().rstrip('.')}; see {command} --help", code=2)
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
    """Print one line; return the exit code."""
    print("bnbp:", printable(message), file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bnbp {bnbp.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


for command in (info.info, run.run, demo.demo, bench.bench, train_bench.train_bench):
    app.command(cls=Command)(command)
