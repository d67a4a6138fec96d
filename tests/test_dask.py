"""bnbp.dask: lazily, in chunks of any shape, the operators' results; no more in memory than a few chunks."""

import itertools
import math
import pickle
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from conftest import DTYPES, MIXED, eps, make_batch, make_telling, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbp
from bnbp import reference

pytestmark = pytest.mark.cluster

dask = pytest.importorskip("dask")
import dask.array as da  # noqa: E402

import bnbp.dask  # noqa: E402

dask.config.set(scheduler="synchronous")  # where a test does not say more


def cut(length, rng, parts=4):
    """Sizes of a few chunks, some of which may be empty."""
    places = np.sort(rng.integers(0, length + 1, rng.integers(0, parts)))
    return tuple(np.diff([0, *places, length]).tolist())


def chunked(array, chunks):
    return da.from_array(array, chunks=chunks)


def both(batch, chunks, axis=1, **options):
    """The results of the two training operators, computed together."""
    x, delta = (chunked(each, chunks) for each in (batch.input, batch.normalized_delta))
    forward = bnbp.dask.batch_norm_training(x, batch.gamma, batch.beta, channel_axis=axis, **options)
    backward = bnbp.dask.batch_norm_training_backprop(
        *(x, batch.gamma, batch.beta, forward.batch_mean, forward.batch_variance, delta), channel_axis=axis, **options
    )
    return dask.compute(*forward, *backward)


def assert_close(actual, expected, scale, dtype):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    bound = 8 * eps(dtype) * scale
    assert np.all(abs(actual.astype(np.float64) - expected) <= bound)


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis", "chunks"),
    [
        ((6, 4, 5, 3), 1, ((2, 4), (3, 1), (5,), (1, 2))),
        ((7, 3), 1, (1, 1)),
        ((5, 4, 6), -1, ((2, 3), (4,), (1, 5))),
        ((4, 9, 2), 0, ((1, 3), (4, 5), (2,))),
        ((9, 2, 3), 1, ((3, 0, 6), (2,), (3,))),
        ((6, 5, 2), 1, ((6,), (2, 0, 3), (2,))),
    ],
)
def test_results_are_those_of_the_whole_batch(shape, axis, chunks, types, reproducible):
    dtype, parameters = types
    batch = make_batch(shape, axis, dtype, parameters=parameters)
    results = both(batch, chunks, axis, reproducible=reproducible)
    forward = reference.batch_norm_training(batch.input, batch.gamma, batch.beta, channel_axis=axis)
    rounded = (each.astype(parameters) for each in forward[1:])
    backward = reference.batch_norm_training_backprop(
        *(batch.input, batch.gamma, batch.beta, *rounded, batch.normalized_delta), channel_axis=axis
    )
    count = math.prod(shape) // shape[axis]
    for actual, expected in zip(results, (*forward, *backward), strict=True):
        scale = count if actual.ndim == 1 else 8
        assert_close(actual, expected, scale + abs(expected), dtype if actual.ndim > 1 else parameters)
    assert all(np.std(each.astype(float)) > 0 for each in results)
