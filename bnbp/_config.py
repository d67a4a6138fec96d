"""What this installation is, for bug reports and for builds against it."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal, overload

from .engine import boundary, pool

__all__ = ["__version__", "get_include", "set_pool_limit", "show_config"]

# The version stands here alone. Asking importlib.metadata for it took 36 of the 63 ms of an import after NumPy's.
__version__ = "0.2.0"

#: The versions of OpenMP's specifications, by the date that a compiler reports for each.
_OPENMP = {
    200203: "2.0", 200505: "2.5", 200805: "3.0", 201107: "3.1", 201307: "4.0",
    201511: "4.5", 201811: "5.0", 202011: "5.1", 202111: "5.2", 202411: "6.0",
}  # fmt: skip


def get_include() -> str:
    """Return the directory of the C++ headers.

    Returns
    -------
    str
        The directory to pass to the compiler, so that it finds ``#include <bnbp/batch_norm.hpp>``.

    Examples
    --------
    >>> import bnbp, pathlib
    >>> pathlib.Path(bnbp.get_include(), "bnbp", "batch_norm.hpp").exists()
    True
    """
    return os.path.join(os.path.dirname(__file__), "include")


def set_pool_limit(limit: int) -> None:
    """Limit the memory that bnbp keeps for later results.

    The system clears each page of new memory when the page is first written, which takes as long as an operator does.
    So bnbp keeps the memory of large results, from 1 MiB, when the last reference to them goes, and uses it for the
    next result of such a size. ``show_config("dicts")["pool"]`` shows how much is kept, and how often it was used
    again. The default limit is 256 MiB. The environment variable ``BNBP_POOL_MIB`` sets another one when bnbp is
    imported.

    Parameters
    ----------
    limit : int
        Number of bytes. With 0, bnbp gives everything back to the system and keeps nothing. Results with ``out=`` never
        need kept memory.

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
    """Show this installation: version, instruction set, caches, kept memory, OpenMP and the number of threads.

    The last entry says where the number of threads came from. Include all entries in a report of a bug.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Whether to print the configuration or to return it, as in :func:`numpy.show_config`. Sizes are printed in MiB
        and returned in bytes. The version of OpenMP is printed as the number of the specification, such as 4.5, and
        returned as the compiler reports it, such as 201511.

    Returns
    -------
    dict or None
        The configuration if `mode` is "dicts".

    Raises
    ------
    ValueError
        If `mode` is neither "stdout" nor "dicts".

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
    for name, text in describe(config):
        print(f"{name + ':':<16} {text}")
    return None


def describe(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The configuration in words: what each entry is called, and its value as people write it."""
    sizes = ("pool limit", "pool held")
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        for field, each in value.items() if isinstance(value, dict) else [("", value)]:
            name = f"{key} {field}".strip()
            if key == "caches" or name in sizes:
                text = _size(each)
            elif name == "openmp version":
                text = _OPENMP.get(each, f"of {each}") if each else "none"
            elif isinstance(each, bool):
                text = "yes" if each else "no"
            elif isinstance(each, float):
                text = f"{each:.2f}"
            else:
                text = ", ".join(each) if isinstance(each, list) else str(each)
            rows.append((name, text))
    return rows


def _size(count: int) -> str:
    """A number of bytes: 512 bytes, 48 KiB, 2 MiB, 1.2 GiB."""
    size, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"
