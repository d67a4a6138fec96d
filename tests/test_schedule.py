"""The schedule: caches, threads and alignment decide how the work is done, and never what comes out.

With a small enough cache every way to do it is taken by arrays that the reference is done with quickly: results that
are streamed past the caches, units shared by all threads, and passes that have nothing left in a cache.
"""

import itertools
import math

import numpy as np
import pytest
from conftest import eps, make_batch, make_telling, same_bits, sums_of, tiny
from ml_dtypes import bfloat16

import bnbp

# Runs in part of a cache line, in several chunks, and in a channel alone; rows that are merged, that fill a task or
# need several, and units of them. All have enough elements for a team; others are in test_thresholds.py.
SHAPES = [
    ((9, 40, 10, 10), 1),
    ((37, 30, 33), 1),
    ((24, 32, 7, 7), 1),
    ((5, 3, 9001), 1),
    ((1, 1, 40_000), 1),
    ((1, 70, 500), 1),
    ((48, 64, 4, 4), 1),
    ((200, 20, 3, 3), 1),
    ((700, 60), 1),
    ((13_442, 60), 1),  # rows merged by eight, and two left over for the last chunk
    ((4000, 10), 1),
    ((90, 600), 1),
    ((20, 2999), 1),
    ((50_000, 1), 1),
    ((6, 5000, 2), 1),
]
# More rows, of too many channels to be merged, than there are in any other shape.
TALL = ((9000, 300), 1)
OPERATORS = {"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}


def out_of_line(shape, dtype, offset):
    """An array that begins `offset` bytes after a cache line does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 256, 7, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + size].view(dtype).reshape(shape)


def caches(shape, dtype):
    """Sizes of a cache: none to speak of, and then both sides of what two or three tensors fit, and what is streamed.

    In a cache that three tensors just do not fit, one of many channels does: that is where there are sweeps.
    """
    result = math.prod(shape) * np.dtype(dtype).itemsize
    two, three, half = -(-result * 2 // 24), -(-result * 3 // 24), result // 2
    return [size for size in (1, two - 1, two, three - 1, three, half, half + 1, 1 << 40) if size > 0]


def places(shape, dtype):
    """Where tensors begin: on a cache line, within one, and where none should; with which caches and threads."""
    size = np.dtype(dtype).itemsize
    none, _, two, less, three, half, more, _ = caches(shape, dtype)
    yield (0, 0), itertools.product((none, less, three), (1, 2, 3))
    yield (4 * size, 2 * size), itertools.product((two, less, half), (1, 2, 3))
    yield (13 * size, 6 * size), itertools.product((none, less, more), (1, 2, 3))
    for place in ((1, 0), (2 * size + 1, 1)):
        yield place, ((none, 1), (less, 3))


def moved(batch, first, second):
    """The same batch, `input` and `normalized_delta` elsewhere in memory."""
    dtype, shape = batch.input.dtype, batch.input.shape
    copy = batch._replace(input=out_of_line(shape, dtype, first), normalized_delta=out_of_line(shape, dtype, second))
    copy.input[...], copy.normalized_delta[...] = batch.input, batch.normalized_delta
    return copy


def assert_accurate(result, exact, axis):
    """Relative to the largest number, of a tensor that of each channel: one may have far smaller ones than others."""
    others = tuple(k for k in range(exact.ndim) if k != axis) if exact.ndim > 1 else None
    scale, most = np.abs(exact).max(others, keepdims=True), 1e3 if result.dtype.itemsize > 2 else 4
    error = np.abs(result.astype(np.float64) - exact)
    assert (error <= scale * most * eps(result.dtype) + tiny(result.dtype)).all()


def results_of(package, operator, batch, **options):
    results = getattr(package, f"batch_norm_{operator}")(*batch[: OPERATORS[operator]], **options)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_bits_do_not_depend_on_the_schedule(shape, axis, dtype, outlier, operator, l2_size):
    parameters = np.float32 if outlier and np.dtype(dtype).itemsize == 2 else dtype
    batch = make_batch(shape, axis, dtype, parameters=parameters)
    if outlier:  # below float32's range, so that this channel alone is computed in float64
        channel = shape[axis] // 2
        batch.gamma[channel], batch.beta[channel] = 1e-41 if dtype is not bfloat16 else 4e-39, 0
        batch.normalized_delta.swapaxes(0, axis)[channel] *= dtype(1000)
    l2_size(1 << 40)
    expected = results_of(bnbp, operator, batch, num_threads=1)
    for result, exact in zip(expected, results_of(bnbp.reference, operator, batch), strict=True):
        assert_accurate(result, exact, axis)
    if outlier and dtype is not np.float16:  # whose smallest number is larger
        assert np.ptp(expected[0].swapaxes(0, axis)[channel]) > 0
    for (first, second), schedules in places(shape, dtype):
        elsewhere = moved(batch, first, second)
        for size, threads in schedules:
            l2_size(size)
            out = (out_of_line(shape, dtype, first), *map(np.empty_like, expected[1:]))
            results = results_of(bnbp, operator, elsewhere, num_threads=threads, out=out)
            assert same_bits(results, expected), (size, threads, first, second)
            memory = out[0].base
            start = out[0].ctypes.data - memory.ctypes.data
            assert (memory[:start] == 7).all(), "it wrote before the output"
            assert (memory[start + out[0].nbytes :] == 7).all(), "it wrote past the output"


@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, TALL], ids=str)
def test_bits_of_sums_do_not_depend_on_the_schedule(shape, axis, dtype, l2_size):
    """In float64: what is rounded to the type of the data hides in which order it was summed."""
    batch = make_telling(shape, axis, dtype)
    l2_size(1 << 40)
    expected = sums_of(batch, axis, num_threads=1)
    other = batch._replace(**{name: np.flip(getattr(batch, name), 0).copy() for name in ("input", "normalized_delta")})
    if shape[0] > 1:  # two of the four tell, or more; of float16, one
        turned = sums_of(other, axis, num_threads=1)
        assert sum((a != b).any() for a, b in zip(turned, expected, strict=True)) > (dtype != np.float16)
    for (first, second), schedules in places(shape, dtype):
        elsewhere = moved(batch, first, second)
        for size, threads in schedules:
            l2_size(size)
            sums = sums_of(elsewhere, axis, num_threads=threads)
            assert same_bits(sums, expected), (size, threads, first, second)


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ["input", "normalized_delta"])
def test_in_place_on_every_schedule(shape, axis, dtype, name, l2_size):
    batch = make_batch(shape, axis, dtype)
    expected = results_of(bnbp, "training_backprop", batch)
    for size, threads in itertools.product((1, *caches(shape, dtype)[3:5]), (1, 3)):
        l2_size(size)
        own = batch._replace(**{name: getattr(batch, name).copy()})
        results = results_of(bnbp, "training_backprop", own, out=(getattr(own, name), None, None), num_threads=threads)
        assert same_bits(results, expected)
