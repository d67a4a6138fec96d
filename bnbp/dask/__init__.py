"""bnbp on Dask: the operators on dask arrays, lazily, chunk by chunk.

>>> import dask.array as da, bnbp.dask
>>> x = da.ones((8, 3, 4, 4), chunks=(2, 3, 4, 4))
>>> bnbp.dask.batch_norm_training(x).normalized
dask.array<bnbp-normalized, shape=(8, 3, 4, 4), dtype=float64, chunksize=(2, 3, 4, 4), chunktype=numpy.ndarray>

The files follow the steps of a call:

- ``_operators.py`` has the operators, and what each promises;
- ``_arguments.py`` checks the arguments, and cuts all operands to the chunks of `input`;
- ``_blocks.py`` has the functions that tasks run, each on one chunk;
- ``_again.py`` lets a second pass load the chunks again, so that they do not all stay in memory.
"""

from importlib.metadata import version as _version

try:
    import dask.array as _dask_array
except ModuleNotFoundError as _error:
    if _error.name not in ("dask", "dask.array", "tlz", "toolz"):
        raise
    raise ImportError("bnbp.dask needs Dask; run: pip install 'bnbp[dask]'") from None

if tuple(map(int, _version("dask").split(".")[:2])) < (2025, 1):
    raise ImportError(f"bnbp.dask: expected Dask 2025.1 or later, got {_version('dask')}")

if _dask_array._array_expr_enabled():
    raise ImportError("bnbp.dask: expected arrays of task graphs; set Dask's array.query-planning to False")

from ._operators import (
    batch_norm_inference,
    batch_norm_inference_backprop,
    batch_norm_training,
    batch_norm_training_backprop,
)

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
]
