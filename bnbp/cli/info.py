"""``bnbp info``: what this installation is."""

from rich.markup import escape

import bnbp
from bnbp._config import describe

from .terminal import console

__all__ = ["info"]


def info() -> None:
    """Show the version, the instruction set, OpenMP, the number of threads, and where that number came from."""
    rows = describe(bnbp.show_config("dicts"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(f"[bold]{escape(name):<{width}}[/bold]  {escape(value)}", soft_wrap=True, highlight=False)
