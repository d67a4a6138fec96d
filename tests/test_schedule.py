"""The schedule: caches, threads and alignment decide how the work is done, and never what comes out.

With a small enough cache every way to do it is taken by arrays that the reference is done with quickly: results that
are streamed past the caches, units shared by all threads, and passes that have nothing left in a cache.
"""

import itertools

import numpy as np
import pytest
from conftest import eps, make_batch, same_bits

import bnbp

# Long runs in part of a cache line, in several chunks, and in a channel alone; rows that are merged, that fill a task
# or need several, and units of them. All have enough elements for a team.
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
OPERATORS = {"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}


def out_of_line(shape, dtype, offset):
    """An array that begins `offset` elements after a cache line does."""
    size = int(np.prod(shape))
    memory = np.full(size + 64, 7, dtype)
    start = -memory.ctypes.data % 64 // memory.itemsize + offset
    return memory[start : start + size].reshape(shape)


def results_of(package, operator, batch, **options):
    results = getattr(package, f"batch_norm_{operator}")(*batch[: OPERATORS[operator]], **options)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_bits_do_not_depend_on_the_schedule(shape, axis, dtype, outlier, operator, l2_size):
    batch = make_batch(shape, axis, dtype)
    if outlier:  # below float32's range, so that this channel alone is computed in float64
        batch.gamma[shape[axis] // 2] = 1e-41
    l2_size(1 << 40)
    expected = results_of(bnbp, operator, batch, num_threads=1)
    for result, exact in zip(expected, results_of(bnbp.reference, operator, batch), strict=True):
        scale, most = np.abs(exact).max(), 1e3 if np.dtype(dtype).itemsize > 2 else 4
        np.testing.assert_allclose(result.astype(np.float64), exact, atol=scale * most * eps(dtype), rtol=0)
    for size, threads, offset in itertools.product((1 << 12, 1 << 17, 1 << 20), (1, 2, 3), (0, 4, 13)):
        l2_size(size)
        moved = batch._replace(
            input=out_of_line(shape, dtype, offset), normalized_delta=out_of_line(shape, dtype, offset // 2)
        )
        moved.input[:], moved.normalized_delta[:] = batch.input, batch.normalized_delta
        out = (out_of_line(shape, dtype, offset), *map(np.empty_like, expected[1:]))
        results = results_of(bnbp, operator, moved, num_threads=threads, out=out)
        assert same_bits(results, expected), (size, threads, offset)
        memory = out[0].base
        first = (out[0].ctypes.data - memory.ctypes.data) // memory.itemsize
        assert (memory[:first] == 7).all(), "it wrote before the output"
        assert (memory[first + out[0].size :] == 7).all(), "it wrote past the output"


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("name", ["input", "normalized_delta"])
def test_in_place_on_every_schedule(shape, axis, dtype, name, l2_size):
    batch = make_batch(shape, axis, dtype)
    expected = results_of(bnbp, "training_backprop", batch)
    for size, threads in itertools.product((1 << 12, 1 << 17), (1, 3)):
        l2_size(size)
        own = batch._replace(**{name: getattr(batch, name).copy()})
        results = results_of(bnbp, "training_backprop", own, out=(getattr(own, name), None, None), num_threads=threads)
        assert same_bits(results, expected)
