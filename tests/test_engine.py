"""What only a few sizes show: tails, borders, and what lies beside an array or next to a channel.

Every length there is, up to some, stands for the sizes at which the kernels do something else, so that no test has to
know them. The oracles are whole numbers, exact fractions, the float64 reference, and the same call done otherwise.
"""

import itertools
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import DTYPES, eps, make_batch, make_telling, python, same_bits, sum_bound, sums_of, tiny

import bnbp

STREAMS = 1 << 6  # a cache so small that every result is written past it


def out_of_line(shape, dtype, offset):
    """An array that begins `offset` elements after a cache line does, and what is around it."""
    size, item = math.prod(shape) * np.dtype(dtype).itemsize, np.dtype(dtype).itemsize
    memory = np.full(size + 512, 7, np.uint8)
    start = 64 - memory.ctypes.data % 64 + 64 + offset * item
    return memory[start : start + size].view(dtype).reshape(shape), memory[:start], memory[start + size :]


# ---------------------------------------------------------------- what is beside an array

GUARDED = """
import ctypes, itertools, mmap, sys
import numpy as np
sys.path.insert(0, {tests!r})
from conftest import DTYPES, make_batch, same_bits
import bnbp
from bnbp.engine import boundary

libc, page, room = ctypes.CDLL(None), mmap.PAGESIZE, 1 << 17
regions = []
for _ in range(12):
    region = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
    for side in (0, room + page):
        assert libc.mprotect(ctypes.c_void_p(region.ctypes.data + side), ctypes.c_size_t(page), 0) == 0
    regions.append(region[page:-page])

def at(k, array, last):
    "A copy at the very start of memory, or at its end; to touch what is beside it ends the process."
    start = room - array.nbytes if last else 0
    view = regions[k][start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view

SHAPES = [(3, c, *rest) for c in range(1, 20) for rest in ((), (3,), (16,), (21,), (47,))]
SHAPES += [(n, 3) for n in range(4, 40, 5)] + [(130, 70), (300, 40), (9, 40, 33), (5, 2, 1501), (2, 2300), (900, 5)]
OPERATORS = {{"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}}
calls = 0
for dtype, shape in itertools.product(DTYPES, SHAPES):
    batch = make_batch(shape, 1, dtype)
    sums = bnbp.batch_norm_training_backprop_reduce(batch.input, batch.mean, batch.normalized_delta)
    count = batch.input.size // shape[1]
    todo = [(name, batch[:inputs], ()) for name, inputs in OPERATORS.items()]
    todo.append(("training_backprop_apply", (*batch, *sums), (count,)))
    for name, inputs, rest in todo:
        call = getattr(bnbp, "batch_norm_" + name)
        boundary.set_l2_size(1 << 40)
        expected = call(*inputs, *rest, num_threads=1)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for last, size in itertools.product((False, True), (1 << 6, 1 << 20)):
            boundary.set_l2_size(size)
            own = [at(k, array, last) for k, array in enumerate(inputs)]
            out = [at(9 + k, np.zeros_like(array), last) for k, array in enumerate(expected)]
            call(*own, *rest, out=out, num_threads=2)
            assert same_bits(out, expected), (dtype, shape, name, last, size)
            calls += 1
print(calls)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it forbids to touch memory by POSIX's mprotect")
def test_what_is_beside_an_array_is_not_touched():
    assert int(python(GUARDED.format(tests=str(Path(__file__).parent)))) > 5000


@pytest.mark.parametrize("s", [1, 2, 3, 16, 21], ids=lambda s: f"s={s}")
def test_every_number_of_rows_streamed(s, dtype, l2_size):
    """The bits of results in the cache, in their place and nowhere else, wherever in a line they begin."""
    for c, n in itertools.product((1, 2, 3, 5, 8, 9, 17, 24, 37, 80), (*range(1, 34), 40, 67, 128, 161)):
        batch = make_batch((n, c, s), 1, dtype)
        l2_size(1 << 40)
        expected = bnbp.batch_norm_inference(*batch[:5])
        l2_size(STREAMS)
        for offset in (0, 3, 9):
            out, before, after = out_of_line((n, c, s), dtype, offset)
            bnbp.batch_norm_inference(*batch[:5], out=out)
            assert same_bits([out], [expected]), (n, c, offset)
            assert (before == 7).all(), (n, c, offset)
            assert (after == 7).all(), (n, c, offset)


# ---------------------------------------------------------------- every length


@pytest.mark.parametrize("channels", [1, 2, 3, 17, 64, 70])
def test_sums_of_whole_numbers_are_exact_for_every_number_of_rows(channels, dtype):
    rng = np.random.default_rng(0)
    x, dy = rng.integers(-3, 4, (2, 300, channels))
    mean = rng.integers(-2, 3, channels)
    for n in (*range(1, 300), 300):
        got = bnbp.batch_norm_training_backprop_reduce(*(array.astype(dtype) for array in (x[:n], mean, dy[:n])))
        np.testing.assert_array_equal(got.delta_sum, dy[:n].sum(0), str(n))
        np.testing.assert_array_equal(got.delta_centered_sum, (dy[:n] * (x[:n] - mean)).sum(0), str(n))


def test_sums_of_whole_numbers_are_exact_for_every_length_of_a_run(dtype):
    rng = np.random.default_rng(0)
    whole = rng.integers(-3, 4, (2, 3, 5, 300))
    mean = rng.integers(-2, 3, 5)
    for s in range(1, 300):
        x, dy = whole[..., :s]
        got = bnbp.batch_norm_training_backprop_reduce(*(array.astype(dtype) for array in (x, mean, dy)))
        np.testing.assert_array_equal(got.delta_sum, dy.sum((0, 2)), str(s))
        np.testing.assert_array_equal(got.delta_centered_sum, (dy * (x - mean[:, None])).sum((0, 2)), str(s))


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_an_infinite_mean_gives_an_infinite_sum_at_every_length(dtype):
    """Not NaN, as nothing times infinity would be: where there is no element, there is no term."""
    for n, s in itertools.product((1, 3, 20), (*range(1, 50), 130)):
        x, dy = np.ones((2, n, 3, s), dtype)
        got = bnbp.batch_norm_training_backprop_reduce(x, np.array([1, np.inf, -np.inf], dtype), dy)
        np.testing.assert_array_equal(got.delta_centered_sum, [0, -np.inf, np.inf], str((n, s)))
        np.testing.assert_array_equal(got.delta_sum, n * s, str((n, s)))


# ---------------------------------------------------------------- many chunks


@pytest.mark.parametrize("shape", [(1, 2, 60_000), (3000, 2, 20), (4000, 64), (3, 2, 20_000)], ids=str)
def test_float64_sums_of_many_chunks_are_right_to_the_last_place(shape):
    """Numbers that cancel all over the channel: what each part of the sum has rounded off is still there."""
    rng, count = np.random.default_rng(8), math.prod(shape) // shape[1]
    x, dy = np.empty((2, *shape))
    mean = rng.normal(size=shape[1])
    for c in range(shape[1]):
        half, order = rng.normal(size=count // 2 - 1), rng.permutation(count)
        rest = 2 * abs(half).sum() * 2.0**-18
        dy[:, c] = np.concatenate([half, -half, [rest, 0]])[order].reshape(x[:, c].shape)
        x[:, c] = mean[c] + np.concatenate([half, half, [1, 0]])[order].reshape(x[:, c].shape)
    got = bnbp.batch_norm_training_backprop_reduce(x, mean, dy)
    for c in (0, shape[1] - 1):
        delta = [Fraction(value) for value in dy[:, c].ravel().tolist()]
        center = Fraction(mean[c])
        terms = [d * (Fraction(value) - center) for d, value in zip(delta, x[:, c].ravel().tolist(), strict=True)]
        for value, addends in ((got.delta_sum[c], delta), (got.delta_centered_sum[c], terms)):
            bound = sum_bound(value, sum(map(abs, addends)), np.float64)
            assert abs(Fraction(float(value)) - sum(addends)) <= bound


@pytest.mark.parametrize(
    "shape",
    [(300, 400, 3), (140, 700, 3), (260, 350, 5), (1100, 130, 2), (20_000, 64), (900, 5, 40), (333, 7, 65)],
    ids=str,
)
def test_bits_of_sums_of_many_rows(shape, dtype, l2_size):
    """Where a task ends depends on the cache, and on nothing that shows."""
    batch = make_telling(shape, 1, dtype)
    l2_size(1 << 40)
    expected = sums_of(batch, num_threads=1)
    for size, threads in itertools.product((1 << 12, 1 << 17, 1 << 20), (1, 2, 3)):
        l2_size(size)
        assert same_bits(sums_of(batch, num_threads=threads), expected), (size, threads)


@pytest.mark.parametrize(
    "shape", [(9, 40, 10, 10), (5, 70, 100), (40, 48, 33), (3, 50, 2100), (4, 60, 2048), (2, 40, 9000)], ids=str
)
@pytest.mark.parametrize("name", ["training", "training_backprop"])
def test_bits_of_whole_operators_with_every_size_of_the_cache(name, shape, dtype, l2_size):
    """By small steps: some ways to go about it need a cache that holds one channel and not all of them.

    The sums are next to nothing, so that in whatever type they are returned they tell in which order they were made.
    """
    batch = make_telling(shape, 1, dtype)
    inputs = batch[: {"training": 3, "training_backprop": 6}[name]]
    call = getattr(bnbp, f"batch_norm_{name}")
    l2_size(1 << 40)
    expected = call(*inputs, num_threads=1)
    for step, threads in itertools.product(range(30), (1, 3)):
        l2_size(int(1024 * 1.35**step))
        out, before, after = out_of_line(shape, dtype, step % 7)
        got = call(*inputs, num_threads=threads, out=(out, None, None))
        assert same_bits(got, expected), (step, threads)
        assert (before == 7).all(), (step, threads)
        assert (after == 7).all(), (step, threads)


def test_bits_with_many_threads_at_few_channels(l2_size):
    """More threads than there are CPUs here, in caches of several sizes: a unit is not wider than there is room for."""
    x = np.random.default_rng(0).normal(size=(48, 70, 4100)).astype(np.float32)
    l2_size(1 << 40)
    expected = bnbp.batch_norm_training(x, None, None, num_threads=1)
    for size in (1 << 20, 3 << 20, 4_400_000, 6 << 20):
        l2_size(size)
        assert same_bits(bnbp.batch_norm_training(x, None, None, num_threads=24), expected), size


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("shape", [(1, 2, 60_000), (3000, 2, 20), (4000, 64), (30_000, 3), (3, 2, 20_000)], ids=str)
def test_statistics_of_a_channel_that_drifts(shape, dtype):
    """Whole numbers that grow from one end of the channel to the other: the means of its parts are far apart."""
    count = math.prod(shape) // shape[1]
    ramp = np.arange(count) // 7 + np.arange(count) % 5
    x = np.moveaxis(np.broadcast_to(ramp.reshape(shape[0], *shape[2:], 1), (shape[0], *shape[2:], shape[1])), -1, 1)
    got = bnbp.batch_norm_training_statistics(np.ascontiguousarray(x, dtype))
    total, squares = int(ramp.sum()), int((ramp.astype(object) ** 2).sum())
    mean, m2 = Fraction(total, count), squares - Fraction(total * total, count)
    for value, exact in (*((value, mean) for value in got.mean), *((value, m2) for value in got.m2)):
        assert abs(Fraction(float(value)) - exact) <= 16 * Fraction(eps(np.float64)) * exact


# ---------------------------------------------------------------- channels beyond float32's range


@pytest.mark.parametrize("shape", [(2, 1040, 2), (2, 2080), (2, 130, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_a_channel_beyond_float32_changes_no_other(shape, dtype, l2_size):
    """Wherever it is, and wherever in a line the result begins."""
    batch = make_batch(shape, 1, dtype, parameters=np.float32)
    channels, rng = shape[1], np.random.default_rng(0)
    rest = (None, batch.mean, batch.variance, batch.normalized_delta)
    mask = (True, False, False)
    l2_size(1 << 40)
    plain = bnbp.batch_norm_inference_backprop(batch.input, batch.gamma, *rest, output_mask=mask).input_delta
    small = np.full_like(batch.gamma, 4e-39)
    tails = bnbp.batch_norm_inference_backprop(batch.input, small, *rest, output_mask=mask).input_delta
    l2_size(STREAMS)
    for c in range(channels):
        gamma = batch.gamma.copy()
        gamma[c] = small[c]
        out, before, after = out_of_line(shape, dtype, int(rng.integers(0, 32)))
        bnbp.batch_norm_inference_backprop(batch.input, gamma, *rest, output_mask=mask, out=(out, None, None))
        expected = plain.copy()
        expected[:, c] = tails[:, c]
        assert same_bits([out], [expected]), c
        assert (before == 7).all(), c
        assert (after == 7).all(), c


SHAPES = [(3, 4, 37), (111, 4), (37, 4, 3)]


def exact_gradient(batch, c, epsilon):
    """Of one channel, in Fractions but for the square root of a power of 4."""
    delta = [Fraction(float(value)) for value in batch.normalized_delta[:, c].ravel()]
    centered = [Fraction(float(value)) - Fraction(float(batch.mean[c])) for value in batch.input[:, c].ravel()]
    variance = Fraction(float(batch.variance[c])) + Fraction(epsilon)
    root = Fraction(float(np.sqrt(float(variance))))
    assert root * root == variance
    share, scale = sum(delta) / len(delta), Fraction(float(batch.gamma[c])) / root
    slope = sum(d * e for d, e in zip(delta, centered, strict=True)) / len(delta) / variance
    for d, e in zip(delta, centered, strict=True):
        yield scale * (d - share - e * slope), abs(scale) * (abs(d) + abs(share) + abs(e * slope))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("size_of_x", "size_of_delta", "gamma", "variance"),
    [(-60, -138, 40, -120), (60, -80, 100, 120), (-60, 60, -80, -120)],
    ids=["mean of delta", "small slope", "large slope"],
)
def test_a_gradient_whose_coefficients_float32_has_no_number_for(shape, size_of_x, size_of_delta, gamma, variance):
    """All are powers of 2 times numbers of moderate size, and so is what comes out."""
    batch = make_batch(shape, 1, np.float32, offset=0.0)
    batch = batch._replace(
        input=np.ldexp(batch.input, size_of_x),
        normalized_delta=np.ldexp(batch.normalized_delta + batch.input, size_of_delta),
        gamma=np.full(4, 2.0**gamma, np.float32),
        mean=np.zeros(4, np.float32),
        variance=np.full(4, 2.0**variance, np.float32),
    )
    got = bnbp.batch_norm_training_backprop(*batch, epsilon=0.0).input_delta
    assert 2.0**-100 < abs(got).max() < 2.0**100
    for c in range(4):
        for value, (exact, size) in zip(got[:, c].ravel(), exact_gradient(batch, c, 0.0), strict=True):
            assert abs(Fraction(float(value)) - exact) <= 3 * Fraction(eps(np.float32)) * size + Fraction(
                tiny(np.float32)
            )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_float32_lacks_of_a_small_mean_is_subtracted_too(shape):
    """Numbers that differ in their last three bits, whose mean lies in between: 2^-134 apart, and shown as 2^-20."""
    rng = np.random.default_rng(4)
    x = np.ldexp(1 + rng.integers(0, 8, shape) * 2.0**-23, -110).astype(np.float32)
    got = bnbp.batch_norm_training(x, np.full(4, 2.0**-20, np.float32), None, epsilon=0.0).normalized
    for c in range(4):
        values = [Fraction(float(value)) for value in x[:, c].ravel()]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        spread = math.sqrt(variance * 2**260)
        for value, normalized in zip(values, got[:, c].ravel().tolist(), strict=True):
            exact = float((value - mean) * 2**130) / spread * 2.0**-20
            assert abs(normalized - exact) <= 16 * eps(np.float32) * 2.0**-20


# ---------------------------------------------------------------- memory


def test_in_place_whatever_the_stride_of_an_axis_of_length_one(dtype):
    batch = make_batch((3, 2, 1, 8), 1, dtype)
    memory = np.zeros((3, 2, 1, 16), dtype)
    x = memory[..., ::2]
    x[...] = batch.input
    same = np.lib.stride_tricks.as_strided(x, strides=(*x.strides[:2], 24, x.strides[3]))
    expected = bnbp.batch_norm_training_backprop(*batch)
    got = bnbp.batch_norm_training_backprop(x, *batch[1:], out=(same, None, None))
    assert got.input_delta is same
    assert same_bits([np.ascontiguousarray(x), *got[1:]], expected)


@pytest.mark.parametrize("axes", [8, 9, 12, 25, 60])
def test_tensors_of_many_axes(axes, dtype):
    batch = make_batch((6, 4, 10), 1, dtype)
    expected = bnbp.batch_norm_training_backprop(*batch)
    shape = (2, 3, *[1] * (axes - 5), 4, 5, 2)
    order = (*reversed(range(axes - 3)), *range(axes - 3, axes))

    def spread(array):
        return np.ascontiguousarray(array.reshape(shape).transpose(order)[..., ::-1]).transpose(np.argsort(order))[
            ..., ::-1
        ]

    many = batch._replace(input=spread(batch.input), normalized_delta=spread(batch.normalized_delta))
    out = spread(np.zeros_like(batch.input))
    got = bnbp.batch_norm_training_backprop(*many, channel_axis=axes - 3, out=(out, None, None))
    for one, other in zip(got, expected, strict=True):
        scale = abs(other.astype(np.float64)).max()
        error = abs(one.astype(np.float64).reshape(other.shape) - other.astype(np.float64))
        assert (error <= 16 * eps(dtype) * scale).all()
