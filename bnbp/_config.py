"""What this installation is, for bug reports and for those who build against it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

from . import _core

__all__ = ["__version__", "get_include", "show_config"]

__version__ = version("bnbp")


def get_include() -> str:
    """Directory of the C++ headers.

    Returns
    -------
    str
        The directory to give to the compiler, so that ``#include <bnbp/batch_norm.hpp>`` is found.

    Examples
    --------
    >>> import bnbp, pathlib
    >>> pathlib.Path(bnbp.get_include(), "bnbp", "batch_norm.hpp").exists()
    True
    """
    return str(Path(__file__).parent / "include")


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Version, instruction set, caches, OpenMP and the number of threads, with where that number came from.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Whether to print the configuration or to return it, as in :func:`numpy.show_config`.

    Returns
    -------
    dict or None
        The configuration if `mode` is "dicts".

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import bnbp
    >>> sorted(bnbp.show_config("dicts"))
    ['caches', 'isa', 'openmp', 'threads', 'version']
    """
    config = {"version": __version__, **_core.config()}
    if mode == "dicts":
        return config
    if mode != "stdout":
        raise ValueError(f"mode: expected 'stdout' or 'dicts', got {mode!r}")
    for key, value in config.items():
        fields = value if isinstance(value, dict) else {"": value}
        for name, field in fields.items():
            print(f"{f'{key} {name}'.strip() + ':':<16} {field}")
    return None
