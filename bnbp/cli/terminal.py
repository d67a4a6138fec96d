"""What the commands have in common when they talk to the user: the console, failures in one line, a progress bar."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Failure", "console", "or_fail_to", "print_line", "printable", "progress_bar"]

console = Console()


class Failure(Exception):
    """Something is wrong with a file or its data; the message is for the user. Exit code 1."""


@contextmanager
def or_fail_to(action: str) -> Iterator[None]:
    """Say what could not be done, and why, when the operating system refuses."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot {action}: {error.strerror or error}") from error


def printable(text: object) -> str:
    """What may be printed on a line, whatever characters a file name may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def print_line(text: str) -> None:
    """Print a line with a path in it: not wrapped, and not taken for markup."""
    console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def progress_bar(visible: bool = True) -> Progress:
    """A progress bar, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not (visible and console.is_terminal))
