"""The operators' checks without the operators: for those who compute later, and part by part."""

from collections.abc import Mapping
from typing import Any

from . import ops

__all__ = ["check"]


def check(op: str, operands: Mapping[str, Any], **options: Any) -> None:
    """Raise what an operator raises about its arguments.

    It looks at its outputs last. So it is given none: by then it has checked all the rest, and it computes nothing.

    Parameters
    ----------
    op : str
        The operator; a function of bnbp has this name after ``batch_norm_``.
    operands : mapping of str to array_like
        Its arrays, or stand-ins of the same types and shapes.
    **options
        Its other arguments.
    """
    try:
        getattr(ops, f"batch_norm_{op}")(**operands, **options, out=())
    except ValueError as error:
        if not str(error).startswith("out:"):
            raise
