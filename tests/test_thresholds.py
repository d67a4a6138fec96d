"""The thresholds: at each size from which the kernels work in another way, and on both sides of it.

Two kinds of data. Of small whole numbers with scales that are powers of two, sums and most results are exact in every
type: an element that is left out, taken twice or given another channel's coefficients changes a number. Numbers that
cancel tell in which order they were summed: the bits stay the same with any cache, team, place in memory and layout.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from conftest import DTYPES, Batch, make_telling, same_bits, sum_bound, sum_error, sums_of
from test_layouts import strided
from test_schedule import OPERATORS, assert_accurate, caches, out_of_line, results_of

import bnbp
from bnbp import reference

# What the kernels go by; see the constants of kernels.pyx and plan.pxi.
LANES = 16  # accumulators of a run, and positions of a row that are taken together
TERMS = 128  # that an accumulator takes before its sum is put aside
PIECE = TERMS * LANES  # elements of a run that are as many
CHUNK = 8192  # elements of a channel that are summed together
COLUMNS = 64  # positions of a row, below which rows are merged
SPAN = 512  # positions of merged rows, about
GROUP = 8  # rows that stay in registers
ROWS = 256  # rows of a chunk, about
FEW = 8  # channels that are finished together
POSITIONS = 2048  # of a task
NEARBY = 1024  # bytes of float32 of the rows that are reduced together, from memory; twice what is applied to
PAGE = 4096  # bytes of a row, from which on eight are reduced together
REGION = 32768  # elements from which on there is a team
FOREVER = 1 << 40  # a cache that everything fits


def shortest_run(size):
    """Elements from which a run is summed in lanes: no less than half a cache line."""
    return max(LANES, 64 // size)


def merged(c, s):
    """Rows that are taken as one."""
    rows = SPAN // (c * s) if c * s < COLUMNS else 1
    return rows - rows % LANES if rows > LANES else rows


def around(*sizes):
    return [size + more for size in sizes for more in (-1, 0, 1)]


# ---------------------------------------------------------------- shapes, (N, C, S) each

LENGTHS = around(16, 32, 48)
CHANNELS = [*range(1, FEW + 2), *around(LANES, COLUMNS)]
SMALL = [(3, c, s) for s in LENGTHS for c in CHANNELS]
# What is left of the lanes: in runs of every type, in rows of one position a channel or of several, in merged rows.
RESTS = [
    *((5, 3, s) for s in range(LANES + 1, 4 * LANES)),
    *((9, c, 1) for c in range(COLUMNS, COLUMNS + 2 * LANES + 1)),
    *((9, c, 3) for c in range(22, 22 + LANES)),
    *((21, c, 1) for c in range(1, COLUMNS)),
]
# Rows: groups of them, as many as are put aside, several chunks; of one position a channel, of several, and of runs.
HEIGHTS = [*around(GROUP, 2 * GROUP, TERMS, ROWS, 2 * ROWS), 5 * ROWS]
TALL = [
    *((n, c, 1) for n in HEIGHTS for c in (64, 65)),
    *((n, 5, 13) for n in HEIGHTS),
    *((n, 1, s) for n in around(TERMS, CHUNK // 32, CHUNK // 16) for s in (16, 32)),
    *((n, 2, 100) for n in around(TERMS // 7, CHUNK // 100)),  # of seven lanes each, the last with a rest
    *((n, 2, 1024) for n in around(2, CHUNK // 1024)),
    *((TERMS * merged(c, s) + more, c, s) for c, s in ((7, 9), (3, 1)) for more in (-1, 0, 1)),
    *((n, 21, 3) for n in (2 * ROWS * merged(21, 3) - 1, 2 * ROWS * merged(21, 3))),
    *((n, 1, 15) for n in (4369, 4370)),  # 2^16 elements, of which no chunk has more
]
LONG = [
    *((2, 2, s) for s in around(1024, PIECE, 2 * PIECE, CHUNK)),
    (3, 1, 2 * PIECE),
    (3, 1, CHUNK // 2 + 1),
    (2, 1, 2 * CHUNK + 1),
    (5, 1, CHUNK + 1),
]
WIDE = [
    *((23, c, 1) for c in around(COLUMNS, 2 * COLUMNS, 4 * COLUMNS, PAGE // 8, POSITIONS // 2, POSITIONS)),
    *((9, c, 2) for c in around(POSITIONS // 4, POSITIONS // 2)),
    (11, 150, 7),
]
# Where threads share the work out: from REGION elements on, by their own columns, channels or chunks.
TEAMS = [
    *((1, 1, s) for s in around(REGION)),
    *((n, COLUMNS, 1) for n in (REGION // COLUMNS - 1, REGION // COLUMNS)),
    *((260, c, 1) for c in around(2 * COLUMNS, 3 * COLUMNS)),
    *((2, c, 5500) for c in range(3, 7)),
    *((n, 3, 5500) for n in (1, 3, 5)),
    (7, 70, 70),
    (8, 64, 65),
    (16, 11, 190),
    (4, 9000, 1),
    (2, 5000, 2),
    (65537, 1, 1),
]
# Channels of which each is a small part of the whole: those that a cache has just no room for are taken in a sweep, one
# by one, several that end with a cache line, in pieces and in parts, each by a thread or all by a team.
MANY = [(2, 260, 17), (7, 70, 70), (1, 520, 100), (512, 40, 32), (1, 70, 2300), (2, 17, CHUNK + 1), (1, 33, CHUNK + 1)]


# ---------------------------------------------------------------- one shape


def whole_numbers(shape, dtype) -> Batch:
    """Exact numbers of every type; so are their sums, and of a channel's products. 1 / sqrt(3.75 + 0.25) is 1/2."""
    rng = np.random.default_rng(0)
    c = shape[1]
    gamma, beta, mean = rng.choice([-4, -2, -1, 1, 2, 4], c), rng.integers(-20, 20, c), rng.integers(-9, 10, c)
    x, dy = rng.integers(-40, 41, shape), rng.integers(-50, 51, shape)
    numbers = (x, gamma, beta, mean, np.full(c, 3.75), dy)
    return Batch(*(array.astype(dtype) for array in numbers))


EPSILON = 0.25


def exact_results(batch):
    """The sums, the statistics, and the tensors, of which the last two are exact too; in float64."""
    x, gamma, beta, mean, _, dy = (array.astype(np.float64) for array in batch)
    gamma, beta, mean = (vector[:, None] for vector in (gamma, beta, mean))
    m = x.shape[0] * x.shape[2]
    delta_sum, product_sum = dy.sum((0, 2)), (dy * (x - mean)).sum((0, 2))
    total, squares = x.sum((0, 2)), (x * x).sum((0, 2))
    m2 = (m * squares - total * total) / m
    own = (x - total[:, None] / m) / np.sqrt(m2[:, None] / m + EPSILON) * gamma + beta
    slope = (x - mean) * product_sum[:, None] / (4 * m)
    return (delta_sum, product_sum), (total / m, m2), {
        "training": own,
        "training_backprop": (dy - delta_sum[:, None] / m - slope) * gamma / 2,
        "inference": (x - mean) * gamma / 2 + beta,
        "inference_backprop": dy * gamma / 2,
    }  # fmt: skip


def assert_exact(batch, sums, statistics, tensors):
    exact_sums, (mean, m2), exact_tensors = exact_results(batch)
    assert np.array_equal(sums, exact_sums)
    dtype, m = batch.input.dtype.type, batch.input.size // batch.mean.size
    assert (abs(statistics[0] - mean) <= sum_error(dtype) * 40).all()
    assert (abs(statistics[1] - m2) <= sum_error(dtype) * 80**2 * m).all()
    for name, exact in exact_tensors.items():
        if "inference" in name:
            assert np.array_equal(tensors[name].astype(np.float64), exact), name
        elif m > 1 or name == "training":
            assert_accurate(tensors[name], exact, 1)
        else:
            assert (tensors[name] == 0).all()


def exact_product(a, b):
    """a * b as the sum of two arrays (Dekker)."""

    def split(v):
        high = v * 134217729.0
        high = high - (high - v)
        return high, v - high

    (ah, al), (bh, bl), p = split(a), split(b), a * b
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def assert_sums_accurate(batch, sums):
    """Against sums of floating-point numbers that are exact, and rounded once at the end."""
    x, dy, mean = (array.astype(np.float64) for array in (batch.input, batch.normalized_delta, batch.mean))
    dtype, shift = batch.input.dtype.type, -np.broadcast_to(mean[:, None], x.shape)
    centered = x + shift
    back = centered - x
    rest = (x - (centered - back)) + (shift - back)
    products = [*exact_product(dy, centered), *exact_product(dy, rest)]
    magnitudes = np.abs(dy).sum((0, 2)), np.abs(dy * centered).sum((0, 2))
    for c in range(0, x.shape[1], x.shape[1] // 40 + 1):
        exact = math.fsum(dy[:, c].ravel()), math.fsum(v for part in products for v in part[:, c].ravel().tolist())
        for value, right, magnitude in zip((sums[0][c], sums[1][c]), exact, (m[c] for m in magnitudes), strict=True):
            if dtype == np.float64:
                assert abs(Fraction(value) - Fraction(right)) <= sum_bound(value, Fraction(magnitude), dtype)
            else:
                assert abs(value - right) <= sum_error(dtype) * magnitude


def tensors_of(batch, shape, offset, **options):
    """The tensors of all operators, written between bytes that stay as they are."""
    tensors = {}
    for name in OPERATORS:
        out = out_of_line(shape, batch.input.dtype, offset)
        places = (out, *[None] * (0 if name == "inference" else 2))
        tensors[name], *_ = results_of(bnbp, name, batch, out=places, epsilon=EPSILON, **options)
        start = out.ctypes.data - out.base.ctypes.data
        assert (out.base[:start] == 7).all(), f"{name} wrote before the output"
        assert (out.base[start + out.nbytes :] == 7).all(), f"{name} wrote past the output"
    return tensors


def check(shape, dtype, l2_size, sizes=None, teams=(1,)):
    """Everything of one shape: what comes out, and that it always does."""
    batch, telling = whole_numbers(shape, dtype), make_telling(shape, 1, dtype)
    size = np.dtype(dtype).itemsize
    l2_size(FOREVER)
    tensors = tensors_of(batch, shape, 0, num_threads=1)
    reduce, statistics = bnbp.batch_norm_training_backprop_reduce, bnbp.batch_norm_training_statistics
    assert_exact(batch, reduce(batch.input, batch.mean, batch.normalized_delta), statistics(batch.input)[1:], tensors)
    sums = sums_of(telling, num_threads=1)
    assert_sums_accurate(telling, sums[2:])
    offsets = itertools.cycle([4 * size, 0, 1, 13 * size])
    for cache, threads in itertools.product(sizes or caches(shape, dtype), teams):
        l2_size(cache)
        what = (shape, cache, threads)
        assert same_bits(sums_of(telling, num_threads=threads), sums), what
        again = tensors_of(batch, shape, next(offsets), num_threads=threads)
        assert same_bits(again.values(), tensors.values()), what
    gapped = {name: strided(getattr(batch, name), 1, 2) for name in ("input", "normalized_delta")}
    gaps = {name: strided(getattr(telling, name), 1, 2) for name in gapped}
    for cache in (1, math.prod(shape) * size // 8 - 1, FOREVER):
        l2_size(cache)
        assert same_bits(sums_of(telling._replace(**gaps), num_threads=teams[-1]), sums), (shape, "gaps")
        for name in gapped:
            own = batch._replace(**{name: getattr(batch, name).copy()})
            out = (getattr(own, name), None, None)
            bnbp.batch_norm_training_backprop(*own, EPSILON, out=out, num_threads=teams[-1])
            assert same_bits(out[:1], [tensors["training_backprop"]]), (shape, name)
        result = bnbp.batch_norm_training_backprop(*batch._replace(**gapped), EPSILON, num_threads=teams[-1])[0]
        assert same_bits([result.copy("C")], [tensors["training_backprop"]]), (shape, "gaps")


@pytest.mark.parametrize("s", LENGTHS)
def test_lengths_of_runs_and_numbers_of_channels(s, dtype, l2_size):
    for shape in SMALL:
        if shape[2] == s:
            check(shape, dtype, l2_size, (1, math.prod(shape) * np.dtype(dtype).itemsize // 8))


def test_what_is_left_of_the_lanes(dtype, l2_size):
    for shape in RESTS:
        check(shape, dtype, l2_size, (1,))


@pytest.mark.parametrize("shapes", [TALL, LONG, WIDE], ids=["tall", "long", "wide"])
def test_shapes_on_both_sides_of_a_threshold(shapes, dtype, l2_size):
    for shape in shapes:
        check(shape, dtype, l2_size)


def test_teams_on_both_sides_of_a_threshold(dtype, l2_size):
    for shape in TEAMS:
        check(shape, dtype, l2_size, teams=(1, 2, 3))


def test_sweeps(dtype, l2_size):
    for shape in MANY:
        check(shape, dtype, l2_size, caches(shape, dtype)[1:5], teams=(1, 2, 3))


# ---------------------------------------------------------------- that they are


def ways(shape, size, cache, threads):
    """How a call with two tensors and a result is done, in words: what decides, from the shape and the cache alone."""
    n, c, s = shape
    elements, rows = n * c * s, merged(c, s)
    fits, streams = elements * size * 3 <= 24 * cache, elements * size >= 2 * cache
    kind = "runs" if s >= shortest_run(size) else "merged rows" if rows > 1 else "rows"
    yield kind, "fits the cache", fits
    yield kind, "streams", streams
    yield kind, "a team", threads > 1 and elements >= REGION
    yield kind, "channels are finished by eight", c % FEW == 0
    yield kind, "more than eight channels", c > FEW
    if kind == "runs":
        channel = n * s * size * 2
        yield kind, "lanes and a rest", s % LANES != 0
        yield kind, "longer than what is put aside", s > PIECE
        yield kind, "in parts", s > CHUNK
        yield kind, "several in a chunk", 2 * s <= CHUNK
        yield kind, "in several chunks", n > max(CHUNK // s, 1)
        yield kind, "rows put aside within a chunk", min(n, CHUNK // s) * -(-s // LANES) > TERMS
        if not fits:
            yield kind, "a sweep", channel <= cache // 2
            yield kind, "a sweep of parts", channel <= cache // 2 and s > CHUNK
            yield kind, "a sweep of pieces", channel <= cache // 2 and s > PIECE
            yield kind, "a sweep of several channels", 2 * channel <= cache // 4
        return
    taken = n // rows if rows > 1 else n
    yield kind, "positions and a rest", rows * c * s % LANES != 0
    yield kind, "pairs of columns", rows * c * s % (2 * LANES) < LANES
    yield kind, "more rows than stay in registers", taken > GROUP
    yield kind, "rows put aside", taken >= TERMS
    yield kind, "in several chunks", taken >= 2 * ROWS
    if kind == "merged rows":
        yield kind, "rows left over", n % rows != 0
        return
    yield kind, "several positions a channel", s > 1
    yield kind, "in several tasks", c * s > POSITIONS
    if not fits:
        yield kind, "rows reduced together", 2 * c * s * max(size, 4) <= NEARBY
        if size < 8:
            yield kind, "four of them", 4 * c * s * max(size, 4) <= NEARBY
            yield kind, "rows applied to together", 2 * c * s * size <= NEARBY // 2
        if size > 2:
            yield kind, "rows of a page", c * s * size >= PAGE
    if fits and threads > 1 and elements >= REGION and n < 2 * ROWS:
        yield kind, "columns of its own for each thread", c * s >= COLUMNS * threads


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_grid_is_on_both_sides_of_every_threshold(dtype):
    size, taken = np.dtype(dtype).itemsize, {}
    grid = [*itertools.product([*SMALL, *RESTS, *TALL, *LONG, *WIDE], (1,)), *itertools.product(TEAMS + MANY, (2, 3))]
    for shape, threads in grid:
        for cache in caches(shape, dtype):
            for kind, what, is_so in ways(shape, size, cache, threads):
                taken.setdefault((kind, what), set()).add(is_so)
    assert len(taken) == {2: 42, 4: 43, 8: 41}[size]
    assert {key for key, sides in taken.items() if sides != {False, True}} == set()
    lengths = {(s % LANES, s >= shortest_run(size)) for _, _, s in RESTS if s > LANES}
    assert {rest for rest, runs in lengths if runs} == set(range(LANES))
    assert {c * s * merged(c, s) % (2 * LANES) for _, c, s in RESTS if c * s >= COLUMNS} == set(range(2 * LANES))


# ---------------------------------------------------------------- not finite


NOT_FINITE = [
    *((2, 3, s) for s in (16, 17, 31, 33, 49, 2049)),
    *((9, c, 1) for c in (5, 33, 64, 67, 79)),
    *((n, 23, 3) for n in (9, 130)),
]


def classes(array):
    """What a number is, if it is not finite: NaN, or infinite with its sign."""
    array = np.asarray(array, np.float64)
    return np.where(np.isnan(array), 2, np.where(np.isinf(array), np.sign(array), 0))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", ["mean", "input", "normalized_delta"])
def test_what_is_not_finite_beside_a_rest(place, bad, dtype, l2_size):
    """Masked lanes have an element that is not there: with an infinite mean, 0 times infinity would be NaN."""
    for shape, cache in itertools.product(NOT_FINITE, (1, FOREVER)):
        l2_size(cache)
        clean = whole_numbers(shape, dtype)
        clean = clean._replace(normalized_delta=abs(clean.normalized_delta) + dtype(1))  # so that sums are infinite
        clean.mean[2] = 50  # beyond all elements
        batch = clean._replace(**{place: getattr(clean, place).copy()})
        vector = getattr(batch, place)
        vector[2 if vector.ndim == 1 else (-1, 2, -1)] = bad
        results = []
        for package, of in ((bnbp, clean), (bnbp, batch), (reference, batch)):
            with np.errstate(all="ignore"):
                sums = package.batch_norm_training_backprop_reduce(of.input, of.mean, of.normalized_delta)
                statistics = package.batch_norm_training_statistics(of.input)[1:]
                results.append([*sums, *statistics, *(results_of(package, name, of)[0] for name in OPERATORS)])
        for k, (before, after, exact) in enumerate(zip(*results, strict=True)):
            axis = 1 if before.ndim > 1 else 0
            others = np.arange(shape[1]) != 2
            assert same_bits([before.compress(others, axis)], [after.compress(others, axis)]), (shape, k)
            if k == 2:  # the mean of a channel with an infinite element is not finite, and may be NaN
                assert np.isfinite(after[2]) == np.isfinite(exact[2])
            else:
                assert np.array_equal(classes(after), classes(exact)), (shape, k)
