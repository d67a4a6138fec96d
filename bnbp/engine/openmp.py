"""Which OpenMP runtime the kernels use, where a process could come to have two."""

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["share_runtime"]


def share_runtime() -> None:
    """Load PyTorch's copy of GNU OpenMP, if PyTorch is installed, for the kernels to use as well.

    A wheel of PyTorch and one of bnbp each bring a copy. The threads of one copy wait in a loop for more work, in the
    way of those of the other one: a network that used both in turns took three times as long. The first copy that is
    loaded for all to see is the one that the kernels find. It is PyTorch's if PyTorch is imported first, and this is
    for when it is not.
    """
    if sys.platform != "linux":
        return
    try:
        spec = find_spec("torch")
    except (ImportError, ValueError):  # somebody's finder, or a module that stands in for it
        return
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for library in Path(folder, "lib").glob("libgomp*.so*"):
            _load(library)


def _load(library: Path) -> None:
    try:  # one of this name that is there already is the one that PyTorch will get
        ctypes.CDLL(library.name, mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    except OSError:
        try:
            ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL)
        except OSError:  # then the kernels use their own
            return
