"""Which build of the kernels this process uses."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["LEVELS", "load_kernels"]

#: Levels of the instruction set, in order of preference. Everywhere but on x86-64 there is one.
LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64", "baseline")


def load_kernels(supported: Callable[[str], bool]) -> tuple[Any, dict[str, Any]]:
    """The capsule of the first build that this CPU supports, or of the one that ``BNBP_ISA`` names; and what there was.

    Parameters
    ----------
    supported : callable
        Whether the CPU supports a level.

    Returns
    -------
    capsule : object
        Of the C function table.
    report : dict
        For :func:`bnbp.show_config`.

    Raises
    ------
    ImportError
        If ``BNBP_ISA`` names a level that was not built, or that this CPU does not support.
    """
    built = [level for level in LEVELS if find_spec(_module(level))]
    usable = [level for level in built if supported(level)]
    forced = os.environ.get("BNBP_ISA", "")
    if forced and forced not in usable:
        reason = "not supported by this CPU" if forced in built else "not one that bnbp was built for"
        raise ImportError(f"BNBP_ISA: expected one of {', '.join(usable)}, got {forced!r}, which is {reason}")
    if not usable:
        raise ModuleNotFoundError("no kernels for this CPU", name="bnbp.engine.kernels")
    used = forced or usable[0]
    report = {"used": used, "forced": bool(forced), "usable": usable, "built": built}
    return import_module(_module(used)).kernels, report


def _module(level: str) -> str:
    return f"bnbp.engine.kernels.kernels_{level.replace('-', '_')}"
