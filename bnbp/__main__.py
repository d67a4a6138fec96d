"""Entry point of the command line: ``bnbp``, or ``python -m bnbp``."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line.

    Returns
    -------
    int
        The exit code: 0; 1 if something is wrong with a file or its data; 2 if the command was not understood.
    """
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        print("bnbp: the command line needs two more packages; run: pip install 'bnbp[cli]'", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
