"""What this installation is, for bug reports and for those who build against it."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

from .engine import boundary, pool

__all__ = ["__version__", "get_include", "set_pool_limit", "show_config"]

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


def set_pool_limit(limit: int) -> None:
    """Say how many bytes of memory are kept for results at most.

    The system clears each page of new memory when it is first written, which takes as long as an operator does. So the
    memory of large results, from 1 MiB, is kept when the last reference to them goes, and the next result of such a
    size is made of it. ``show_config("dicts")["pool"]`` says how much is kept, and how often it was of use. The limit
    is 256 MiB, or what the environment variable ``BNBP_POOL_MIB`` says when bnbp is imported.

    Parameters
    ----------
    limit : int
        Bytes. 0 gives everything back to the system and keeps nothing; results with ``out=`` never need it.

    Raises
    ------
    TypeError
        If `limit` is not an integer.
    ValueError
        If `limit` is negative.

    Examples
    --------
    >>> import bnbp
    >>> bnbp.set_pool_limit(0)
    >>> bnbp.show_config("dicts")["pool"]["held"]
    0
    >>> bnbp.set_pool_limit(64 * 2**20)
    """
    pool.set_limit(min(boundary.integer_of("limit", limit, 0), sys.maxsize))


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Version, instruction set, caches, kept memory, OpenMP, and the number of threads with where it came from.

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
    ['caches', 'isa', 'openmp', 'pool', 'threads', 'version']
    """
    if not issubclass(type(mode), str) or mode not in ("stdout", "dicts"):
        raise ValueError(f"mode: expected 'stdout' or 'dicts', got {boundary.text_of(mode)}")
    config = {"version": __version__, **boundary.config()}
    if mode == "dicts":
        return config
    for key, value in config.items():
        fields = value if isinstance(value, dict) else {"": value}
        for name, field in fields.items():
            print(f"{f'{key} {name}'.strip() + ':':<16} {field}")
    return None
