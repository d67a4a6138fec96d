"""Exact sums: they do not depend on how a batch is parted, and are what they are said to be."""

import contextlib
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from conftest import eps, make_batch, make_telling, same_bits, sum_bound, sum_error
from hypothesis import example, given
from hypothesis import strategies as st

import bnbp
from bnbp import exact

# Each kind of run and row that the kernels know, of samples: shorter and longer than the lanes and a chunk, of many
# rows, channels last with one and several chunks in a sample, one element, one channel, the batch on the second axis.
SHAPES = [
    ((12, 5), 1),
    ((9, 70), 1),
    ((12, 3, 2, 2), 1),
    ((11, 4, 7, 7), 1),
    ((10, 2, 5000), 1),
    ((5, 3, 9000), 1),
    ((10, 6, 5, 9), -1),
    ((4, 40, 60, 2), -1),
    ((3, 100, 100, 70), -1),
    ((3, 10, 4, 5), 0),
    ((8, 1, 6, 7), 1),
    ((8, 6, 7, 1), -1),
    ((6, 3, 5, 8), -2),
]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{'x'.join(map(str, shape[0]))}@{shape[1]}")
def shape(request):
    return request.param


def batch_axis(axis):
    return 1 if axis == 0 else 0


def sums_of(batch, axis, samples=slice(None), **options):
    """Both exact sums of some samples."""
    part = (slice(None),) * batch_axis(axis) + (samples,)
    x, dy = batch.input[part], batch.normalized_delta[part]
    return (
        exact.batch_norm_training_statistics(x, channel_axis=axis, **options),
        exact.batch_norm_training_backprop_reduce(x, batch.mean, dy, channel_axis=axis, **options),
    )


def rounded(sums):
    return [number for each in sums for number in each.round() if not isinstance(number, int)]


def random_parts(rng, samples):
    """The samples in some order, cut into some parts, of which some are empty."""
    cuts = np.sort(rng.integers(0, samples + 1, rng.integers(0, 6)))
    return np.split(rng.permutation(samples), cuts)


def merged_at_random(rng, sums):
    """Merged two by two or more at a time, as a tree that happens."""
    sums = list(sums)
    while len(sums) > 1:
        take = rng.permutation(len(sums))[: rng.integers(2, len(sums) + 1)]
        first, *others = (sums[k] for k in take)
        sums = [each for k, each in enumerate(sums) if k not in take] + [first.merge(*others)]
    return sums[0]


@pytest.mark.parametrize("seed", range(12))
def test_bits_do_not_depend_on_how_samples_are_spread(shape, dtype, seed):
    """Hostile numbers, whose plain sums are other ones for each way to add them."""
    shape, axis = shape
    rng = np.random.default_rng(seed)
    batch = make_telling(shape, axis, dtype, seed)
    whole = sums_of(batch, axis)
    parts = [sums_of(batch, axis, part) for part in random_parts(rng, shape[batch_axis(axis)])]
    for k in range(2):
        got = merged_at_random(rng, [part[k] for part in parts])
        assert got == whole[k]
        assert got.to_bytes() == whole[k].to_bytes()
    assert same_bits(rounded(merged_at_random(rng, [part[k] for part in parts]) for k in range(2)), rounded(whole))


def test_plain_sums_depend_on_it():
    """Or the test before this one would say nothing."""
    batch = make_telling((11, 4, 7, 7), dtype=np.float32)
    reduce = bnbp.batch_norm_training_backprop_reduce
    whole = reduce(batch.input, batch.mean, batch.normalized_delta)
    parts = [reduce(batch.input[part], batch.mean, batch.normalized_delta[part]) for part in (slice(3), slice(3, 11))]
    assert not same_bits([parts[0][1] + parts[1][1]], [whole[1]])


def test_bits_do_not_depend_on_threads_caches_or_strides(shape, dtype, l2_size):
    shape, axis = shape
    batch = make_telling(shape, axis, dtype)
    whole = rounded(sums_of(batch, axis, num_threads=1))
    gaps = np.empty([2 * length for length in shape], dtype)[tuple(slice(None, None, 2) for _ in shape)]
    gaps[...] = batch.input
    negative = batch.normalized_delta[::-1].copy()[::-1]
    for size in (1 << 20, 1 << 12):
        l2_size(size)
        for threads in (1, 2, 5):
            assert same_bits(rounded(sums_of(batch, axis, num_threads=threads)), whole)
    assert same_bits(rounded(sums_of(batch._replace(input=gaps, normalized_delta=negative), axis)), whole)


def test_sums_keep_the_contract(shape, dtype):
    """Against fractions: as near as the plain operators are."""
    shape, axis = shape
    if math.prod(shape) > 30000:
        shape = (*shape[:1], *(max(length // 5, 1) for length in shape[1:]))
    batch = make_batch(shape, axis, dtype, offset=0.0)
    statistics, sums = (each.round() for each in sums_of(batch, axis))
    assert statistics.count == math.prod(shape) // shape[axis]
    for c in range(shape[axis]):
        x, dy = (
            [Fraction(float(v)) for v in np.take(t, c, axis).ravel()] for t in (batch.input, batch.normalized_delta)
        )
        own = Fraction(float(batch.mean[c]))
        for got, terms in ((sums[0][c], dy), (sums[1][c], [a * (b - own) for a, b in zip(dy, x, strict=True)])):
            magnitude = sum(map(abs, terms))
            bound = sum_bound(got, magnitude, dtype) if dtype == np.float64 else magnitude * Fraction(sum_error(dtype))
            assert abs(Fraction(float(got)) - sum(terms)) <= bound
        mean = sum(x) / len(x)
        m2 = sum((a - mean) ** 2 for a in x)
        assert abs(Fraction(float(statistics.mean[c])) - mean) <= Fraction(eps(np.float64)) * sum(map(abs, x)) / len(x)
        assert abs(Fraction(float(statistics.m2[c])) - m2) <= 64 * Fraction(eps(np.float64)) * m2


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
@example([5e-324, -5e-324, 5e-324])
@example([1.7976931348623157e308] * 3 + [-1.7976931348623157e308] * 3 + [1e-308])
@example([2.0**1000, 1.0, -(2.0**1000), 2.0**-1000])
def test_single_elements_are_summed_exactly(numbers):
    """Samples of one element: the sum is Python's own exact one."""
    dy = np.array(numbers)[:, np.newaxis]
    sums = [exact.batch_norm_training_backprop_reduce(np.zeros_like(part), [0.0], part) for part in np.split(dy, [1])]
    right = Fraction(0)
    for number in numbers:
        right += Fraction(number)
    got = float(sums[0].merge(sums[1]).round().delta_sum[0])
    try:
        assert got == float(right)
    except OverflowError:
        assert got == (math.inf if right > 0 else -math.inf)


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=20))
@example([1e16, 1e16 + 2, 1e16 + 4])
@example([3.0] * 7)
@example([1e100, -1e100, 1e-100])
def test_statistics_of_single_elements_are_rounded_once(numbers):
    """Nothing cancels: the variance beside a mean of any size is right to the last place."""
    x = [Fraction(number) for number in numbers]
    mean = sum(x) / len(x)
    m2 = sum((number - mean) ** 2 for number in x)
    got = exact.batch_norm_training_statistics(np.array(numbers)[:, np.newaxis]).round()
    for number, right in ((got.mean[0], mean), (got.m2[0], m2)):
        assert abs(Fraction(float(number)) - right) <= Fraction(float(np.spacing(abs(number)))) * Fraction(51, 100)


def test_a_mean_far_away_costs_no_variance():
    """Of samples whose means are rounded: float64 keeps what is rounded off."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 2, 50)) + 1e12
    got = exact.batch_norm_training_statistics(x).round()
    for c in range(2):
        numbers = [Fraction(float(v)) for v in x[:, c].ravel()]
        mean = sum(numbers) / len(numbers)
        m2 = sum((number - mean) ** 2 for number in numbers)
        assert abs(Fraction(float(got.m2[c])) / m2 - 1) < 2.0**-45


def test_a_constant_channel_has_no_variance(dtype):
    x = np.full((7, 2, 5, 5), 1 / 3).astype(dtype)
    got = exact.batch_norm_training_statistics(x).round()
    assert np.array_equal(got.mean, x[0, :, 0, 0].astype(np.float64))
    assert not got.m2.any()


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("given", [False, True])
def test_an_activation_masks_the_sums(activation, given, dtype):
    """By the forward output where it is given, and by what it is computed from where it is not."""
    batch = make_batch((6, 4, 5, 5), dtype=dtype)
    x, gamma, beta, mean, variance, dy = batch
    y = bnbp.batch_norm_inference(x, gamma, beta, mean, variance, activation=activation)
    options = {"normalized": y} if given else {"gamma": gamma, "beta": beta, "variance": variance}
    reduce = exact.batch_norm_training_backprop_reduce
    got = reduce(x[:2], mean, dy[:2], activation=activation, **{**options, **({"normalized": y[:2]} if given else {})})
    got += reduce(x[2:], mean, dy[2:], activation=activation, **{**options, **({"normalized": y[2:]} if given else {})})
    flat = (y <= 0) | (y >= 6) if activation == "relu6" else y <= 0
    masked = np.where(flat, 0, dy.astype(np.float64))
    terms = masked * (x.astype(np.float64) - mean.astype(np.float64)[:, np.newaxis, np.newaxis])
    for sums, numbers in zip(got.round(), (masked, terms), strict=True):
        np.testing.assert_allclose(
            sums, numbers.sum((0, 2, 3)), rtol=0, atol=2.0**-19 * abs(numbers).sum((0, 2, 3)).max()
        )


# ---------------------------------------------------------------- what is no number


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([np.inf], np.inf),
        ([-np.inf], -np.inf),
        ([np.inf, -np.inf], np.nan),
        ([np.nan], np.nan),
        ([np.nan, np.inf], np.nan),
    ],
)
def test_what_is_no_number_stays_in_its_channel(values, total):
    x = np.ones((6, 3))
    x[: len(values), 1] = values
    dy = x[::-1].copy()
    parts = [exact.batch_norm_training_statistics(part).round() for part in (x,)]
    halves = [exact.batch_norm_training_statistics(part) for part in (x[:1], x[1:])]
    parts.append((halves[1] + halves[0]).round())
    for statistics in parts:
        np.testing.assert_array_equal(statistics.mean, [1, np.nan, 1])
        np.testing.assert_array_equal(statistics.m2, [0, np.nan, 0])
    sums = [
        exact.batch_norm_training_backprop_reduce(x[part], np.zeros(3), dy[part]) for part in (slice(2), slice(2, 6))
    ]
    for each in (sums[0] + sums[1], pickle.loads(pickle.dumps(sums[1] + sums[0]))):
        np.testing.assert_array_equal(each.round().delta_sum, [6, total, 6])
        np.testing.assert_array_equal(each[:1].round().delta_sum, [6])
        np.testing.assert_array_equal(each[1:2].round().delta_sum, [total])


def test_squares_that_overflow_leave_the_mean():
    got = exact.batch_norm_training_statistics(np.array([[[1e200, -1e200, 3.0]]])).round()
    assert got.mean[0] == 1.0
    assert not np.isfinite(got.m2[0])


def test_the_statistics_of_nothing():
    got = exact.batch_norm_training_statistics(np.zeros((0, 2, 4)))
    count, mean, m2 = got.round()
    assert count == 0
    assert np.isnan(mean).all()
    assert not m2.any()
    x = np.arange(12.0).reshape(2, 2, 3)
    whole = exact.batch_norm_training_statistics(x)
    assert got + whole == whole
    assert whole.merge() is whole
    sums = exact.batch_norm_training_backprop_reduce(np.zeros((3, 2, 0)), [0.0, 0.0], np.zeros((3, 2, 0)))
    assert same_bits(sums.round(), [np.zeros(2), np.zeros(2)])


# ---------------------------------------------------------------- as objects


def test_they_travel_as_bytes():
    batch = make_telling((5, 6, 4, 4))
    for sums in sums_of(batch, 1):
        for copy in (type(sums).from_bytes(sums.to_bytes()), pickle.loads(pickle.dumps(sums))):
            assert copy == sums
            assert hash(copy) == hash(sums)
            assert same_bits(rounded([copy]), rounded([sums]))
        assert sums[1:3].channels == 2
        assert same_bits([n[1:3] for n in rounded([sums])], rounded([sums[1:3]]))
        assert "6 channels" in repr(sums)


@given(st.data())
def test_other_bytes_are_refused(data):
    """Whatever they are: lengths in them are checked before they are believed."""
    good = exact.batch_norm_training_statistics(np.array([[1.0, 2.0], [3.0, 4.0]])).to_bytes()
    for bad in (b"", good[:-1], good + b"\0", b"x" + good[1:]):
        with pytest.raises(ValueError, match=r"data: expected what ExactStatistics\.to_bytes returned"):
            exact.ExactStatistics.from_bytes(bad)
    with pytest.raises(ValueError, match="data: expected"):
        exact.ExactSums.from_bytes(good)
    position, byte = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        exact.ExactStatistics.from_bytes(good[:position] + bytes([byte]) + good[position + 1 :]).round()


def test_what_does_not_belong_together_is_not_merged():
    statistics, sums = sums_of(make_batch((4, 3)), 1)
    with pytest.raises(TypeError, match=r"others\[0\]: expected ExactStatistics, got ExactSums"):
        statistics.merge(sums)
    with pytest.raises(TypeError):
        statistics + sums
    with pytest.raises(ValueError, match=r"others\[1\]: expected 3 channels, got 2"):
        sums.merge(sums, sums[:2])
    with pytest.raises(TypeError, match="expected a slice"):
        sums[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": np.zeros((4, 3), int)}, TypeError, "input: expected float16"),
        ({"input": np.zeros(4)}, ValueError, "input: expected at least 2 axes"),
        ({"normalized_delta": np.zeros((4, 2))}, ValueError, "normalized_delta: expected shape"),
        ({"mean": np.zeros(2)}, ValueError, "mean: expected shape"),
        ({"channel_axis": 2}, ValueError, "channel_axis: expected"),
        ({"activation": "tanh"}, ValueError, "activation: expected"),
        ({"activation": "relu"}, ValueError, "variance: expected"),
        ({"num_threads": 0}, ValueError, "num_threads: expected"),
    ],
)
def test_arguments_are_those_of_the_plain_operators(change, error, message):
    x = np.zeros((4, 3))
    arguments = {"input": x, "mean": np.zeros(3), "normalized_delta": x, **change}
    for function in (bnbp.batch_norm_training_backprop_reduce, exact.batch_norm_training_backprop_reduce):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_an_addend_is_asked_for_its_integer_as_by_the_plain_operators():
    class Odd:
        def __index__(self):
            return 1

        def __bool__(self):
            return 1  # which Python refuses

    x, mean = np.arange(12.0).reshape(4, 3), np.ones(3)
    for function in (bnbp.batch_norm_training_backprop_reduce, exact.batch_norm_training_backprop_reduce):
        function(x, mean, x, addend=Odd())


def test_lists_and_other_arrays_are_taken():
    lists = exact.batch_norm_training_backprop_reduce([[1.0], [2.0], [6.0]], [3.0], [[1.0], [0.0], [1.0]])
    assert [number[0] for number in lists.round()] == [2.0, 1.0]
    assert exact.batch_norm_training_statistics(memoryview(np.ones((2, 2)))).count == 2


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from bnbp import exact
from bnbp.engine import exact as engine

libc, blank, page = ctypes.CDLL(None), engine.blank, mmap.PAGESIZE
kept = []


def guarded(*kind):
    rows = blank(*kind)
    inside = -(-rows.nbytes // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    kept.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (begin, begin + page + inside):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    start = page if sys.argv[1] == "before" else page + inside - rows.nbytes
    return np.frombuffer(memory, np.int64, rows.size, start).reshape(rows.shape)


engine.blank = guarded
for dtype in (np.float32, np.float64):
    limits = np.finfo(dtype)
    least = limits.smallest_subnormal
    for low, high in ((0, 0), (-1, 1), (0, 1), (-least, least), (0, limits.max / 8)):
        x = np.empty((4, 3, 6), dtype)
        x[..., ::2], x[..., 1::2] = low, high
        mean = np.zeros(3, dtype)
        statistics = exact.batch_norm_training_statistics(x).round()
        assert statistics.mean.tolist() == [(float(low) + float(high)) / 2] * 3
        sums = exact.batch_norm_training_backprop_reduce(x, mean, np.ones_like(x)).round()
        assert sums.delta_sum.tolist() == [24] * 3
        exact.batch_norm_training_backprop_reduce(x, mean, x)
assert kept
"""


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect")
@pytest.mark.parametrize("where", ["before", "after"])
def test_digits_of_zero_and_of_the_smallest_and_largest_numbers_are_in_the_row(where):
    """A zero once added nothing to digits that a row of float32 does not have: memory before the row."""
    done = subprocess.run([sys.executable, "-c", GUARDED, where], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
