"""What to say where the compiled core is missing, or has no kernels for this process."""

import sys

__all__ = ["explained"]

MISSING = (
    "bnbp: the compiled core is missing. If this is the source folder, build it with `pip install -e .`, "
    "or leave the folder to import an installed bnbp."
)


def explained(error: ImportError) -> BaseException:
    """What to raise instead: the same in words or, on the command line, one line and exit code 1."""
    if error.name in ("bnbp.engine.boundary", "bnbp.engine.kernels"):
        error = ImportError(MISSING)
    elif not str(error).startswith("BNBP_ISA:"):
        return error
    # The command's own code is part of the package, and is not reached.
    return SystemExit(f"bnbp: {str(error).removeprefix('bnbp: ')}") if _is_command() else error


def _is_command() -> bool:
    """Whether this process is ``bnbp`` or ``python -m bnbp``, not a program that imports it."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # as long as Python looks for the module
        module = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else 0
        return sys.orig_argv[module : module + 1] == ["bnbp"]
    name = program.replace("\\", "/").rpartition("/")[2]
    return name in ("bnbp", "bnbp.exe", "bnbp-script.py")
