"""The border: the gradient is 0 where the forward output says so, bit for bit.

The gradient need not be given that output. It finds out again from `input` on which side of 0 and of 6 the output was,
and the data here lies where that can go wrong. Each channel has the two adjacent numbers between which the output
passes 0, and those between which it passes 6, both found with the forward operator itself. There are channels whose
mean is much larger than their spread, whose scale vanishes or is none of float32's numbers, or whose parameters are not
finite.

Which elements pass is seen in three ways: as the elements of `input_delta` that are not 0, as sums of whole numbers,
which are exact in each channel, and as the addend's gradient where the output is given.
"""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from conftest import MIXED, make_batch, same_bits, tiny
from test_activation import ACTIVATIONS, flat
from test_layouts import VIEWS
from test_schedule import caches

import bnbp

# ---------------------------------------------------------------- numbers in their order


def place_of(x):
    """An integer for each number, in their order; adjacent ones for adjacent numbers."""
    integer = f"i{x.dtype.itemsize}"
    bits = x.view(integer).astype(np.int64)
    return np.where(bits < 0, np.iinfo(integer).min - bits, bits)


def number_at(place, dtype):
    integer = f"i{np.dtype(dtype).itemsize}"
    return np.where(place < 0, np.iinfo(integer).min - place, place).astype(integer).view(dtype)


def test_numbers_have_their_places():
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        x = np.array([-np.inf, -1e4, -1, -tiny(dtype), 0, tiny(dtype), 1, 6, np.inf]).astype(dtype)
        assert (np.diff(place_of(x)) > 0).all()
        assert place_of(x)[3:6].tolist() == [-1, 0, 1]
        assert same_bits([number_at(place_of(x), dtype)], [x])


# ---------------------------------------------------------------- channels


def ordinary(dtype, parameters):
    """Means that are near, or far from zero beside the spread, and of these half with a border next to zero."""
    rng = np.random.default_rng(1)
    gamma = rng.uniform(0.2, 2, 40) * rng.choice([-1, 1], 40)
    mean, variance = rng.normal(size=40) * rng.choice([0, 1, 1000], 40), rng.uniform(0.1, 4, 40)
    beta = np.where(rng.random(40) < 0.5, rng.uniform(-3, 9, 40), gamma * mean / np.sqrt(variance))
    return [vector.astype(parameters) for vector in (gamma, beta, mean, variance)]


def strange(dtype, parameters):
    """What can be made of the smallest and largest numbers, of zeros, and of what is not finite; gamma, beta, ..."""
    info = ml_dtypes.finfo(parameters)
    big, small = float(info.max) / 4, float(info.smallest_normal) * 4
    inf, nan, least = math.inf, math.nan, tiny(dtype)
    channels = [
        (1, 0, 0, 1), (1, -0.0, 0, 1), (-1, -0.0, 0, 1), (1, 6, 0, 1), (-1, 6, 0, 1), (1, -6, 2, 1), (1, 5.9, 0, 1e-3),
        (small, 0, 0.5, 1), (small, small, 0, 1), (-small, 3, 100, 2), (least, 0, 0, 1), (1, least, 0, 1),
        (1e-3, 1e-6, 1e-3, 1), (1e-6, 1e-6, 1, 1), (1e-4, 6, 0, 1), (-1e-6, 6, 3, 1), (1e-7, -1e-7, 1, 1),
        (big, 0, 1, 1), (big, -big, 1, 1), (-big, big, 1, 2), (big, 1, 0, small), (-big, 0, 3, small),
        (small, 0, 0, big), (small, small, 0, big), (-small, 1, 0, big), (least, least, 0, big), (1, 0, 0, small),
        (-0.0, -1, 0, 1), (-0.0, 7, 0, 1), (-1, -1, 0, inf), (-small, 7, 1, big), (-0.0, 1, 2, 1), (-0.0, 6, 2, 1),
        (0, 1, 0, 1), (0, 0, 2, 1), (0, -1, 2, 1), (-0.0, 6, 0, 1), (0, 7, 5, 1), (0, 5.9, 0, 1), (-0.0, -0.0, 0, 1),
        (1, 0, 1, 0), (-1, 1, 1, 0), (0, 1, 1, 0), (1, 0, 0, -1), (1, 0, big, 1), (1, 1, -big, big),
        (inf, 0, 1, 1), (-inf, 1, 1, 1), (nan, 1, 1, 1), (1, inf, 0, 1), (1, -inf, 0, 1), (-1, inf, 0, 1),
        (1, nan, 0, 1), (1, 0, inf, 1), (-1, 0, -inf, 1), (1, 0, nan, 1), (1, 1, 0, inf), (1, 0, 0, nan),
        (0, inf, 0, 1),
    ]  # fmt: skip
    return list(np.array(channels).T.astype(parameters))


def mixed(dtype, parameters):
    """Strange channels between ordinary ones."""
    pairs = zip(ordinary(dtype, parameters), strange(dtype, parameters), strict=True)
    return [np.ascontiguousarray(np.stack([a[:40], b[:40]], 1).ravel()) for a, b in pairs]


KINDS = {"ordinary": ordinary, "strange": strange, "mixed": mixed}


def has_no_scale(channels, epsilon):
    """Where a channel's scale is 0: there, and nowhere else, the output is not monotone at an infinite input."""
    gamma, _, _, variance = (vector.astype(np.float64) for vector in channels)
    with np.errstate(all="ignore"):
        return gamma / np.sqrt(variance + epsilon) == 0


def borders(channels, epsilon, dtype, level):
    """The numbers next to which the forward output of each channel passes a level; (8, channels), by bisection."""
    most = place_of(np.array(ml_dtypes.finfo(dtype).max, dtype).reshape(1))

    def is_above(place):
        y = bnbp.batch_norm_inference(number_at(place, dtype)[None], *channels, epsilon)[0].astype(np.float64)
        return y > 0 if level == 0 else y >= 6

    low, high = np.full(len(channels[0]), -most), np.full(len(channels[0]), most)
    at_low = is_above(low)
    for _ in range(8 * np.dtype(dtype).itemsize):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        same = is_above(middle) == at_low
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return number_at(np.clip(low + np.arange(-3, 5)[:, None], -most, most), dtype)


def hostile_numbers(channels, epsilon, dtype):
    """For each channel, numbers next to its borders and its mean, and the extreme ones; shape (count, channels)."""
    info, count = ml_dtypes.finfo(dtype), len(channels[0])
    ends = [0, float(info.smallest_subnormal), float(info.smallest_normal), 1, float(info.max), np.inf]
    special = np.array([*ends, *(-end for end in ends), np.nan]).astype(dtype)
    with np.errstate(all="ignore"):
        mean = np.nan_to_num(channels[2].astype(np.float64), nan=0, posinf=1, neginf=-1)
        near = np.random.default_rng(2).normal(mean, 1 + abs(mean) * 1e-3, (20, count)).astype(dtype)
        mean = number_at(place_of(mean.astype(dtype)) + np.array([[-1], [0], [1]]), dtype)
    at = [borders(channels, epsilon, dtype, level) for level in (0, 6)]
    values = np.concatenate([*at, mean, np.repeat(special[:, None], count, 1), near])
    infinite = np.isinf(values.astype(np.float64)) & has_no_scale(channels, epsilon)
    values[infinite] = 1
    return values


def arranged(values, shape, axis):
    """A tensor of which each channel has its values, in an order of its own and again and again."""
    rng = np.random.default_rng(3)
    count, channels = values.shape
    order = rng.permuted(np.tile(np.arange(math.prod(shape) // channels) % count, (channels, 1)), axis=1)
    rest = [length for k, length in enumerate(shape) if k != axis % len(shape)]
    return np.moveaxis(np.take_along_axis(values.T, order, 1).reshape(channels, *rest), 0, axis).copy()


# ---------------------------------------------------------------- what passes


def same_numbers(got, expected):
    """The same bits, but for those of a NaN."""
    for a, b in zip(got, expected, strict=True):
        a, b = a.copy("C"), b.copy("C")
        a[np.isnan(a)] = b[np.isnan(b)] = np.nan
        if not same_bits([a], [b]):
            return False
    return True


def assert_mask(x, channels, epsilon, activation, axis=1, view="plain", **options):
    """The gradient of every operator passes where the forward output is not flat, and only there; how many do."""
    options |= {"channel_axis": axis}
    forward = bnbp.batch_norm_inference(x, *channels, epsilon, activation=activation, **options)
    passes = ~flat(forward, activation)
    others = tuple(k for k in range(x.ndim) if k != axis % x.ndim)
    gamma, beta, mean, variance = channels

    weights = VIEWS[view](np.random.default_rng(4).integers(1, 200, x.shape).astype(x.dtype))
    through = np.where(passes, weights, weights.dtype.type(0))
    whole = through.astype(np.float64).sum(others)
    again = {"gamma": gamma, "beta": beta, "variance": variance, "epsilon": epsilon, "activation": activation}
    sums = bnbp.batch_norm_training_backprop_reduce(x, mean, weights, **again, **options)
    assert np.array_equal(sums.delta_sum, whole)

    ones = np.ones_like(weights)
    inference, place = bnbp.batch_norm_inference_backprop, {"output_mask": (True, False, False), **options}
    expected = inference(x, *channels, passes.astype(x.dtype), epsilon, **place).input_delta
    got = inference(x, *channels, ones, epsilon, activation=activation, **place).input_delta
    wrong = np.argwhere((got != expected) & ~(np.isnan(got) & np.isnan(expected)))
    assert same_numbers([got], [expected]), (wrong[:3], [x[tuple(at)] for at in wrong[:3]])

    given = {"normalized": VIEWS[view](forward), "activation": activation}
    for backprop in (bnbp.batch_norm_training_backprop, inference):
        recomputed = backprop(x, *channels, weights, epsilon, activation=activation, **options)
        told = backprop(x, *channels, weights, epsilon, addend=True, **given, **options)
        assert same_numbers(recomputed, told[:3])
        assert same_bits([told.addend_delta], [through])
        with np.errstate(over="ignore"):  # more than float16 has numbers for
            assert same_bits([recomputed.beta_delta], [whole.astype(recomputed.beta_delta.dtype)])
    return passes


# Runs, short and in several chunks; rows of many channels, of several positions and of few channels, which are merged;
# and both as views with gaps and reversed. Of those with a `None`, as many channels at a time as there are.
LAYOUTS = {
    "runs": ((5, None, 17), 1, "plain"),
    "runs for a team": ((12, None, 71), 1, "plain"),
    "runs in several chunks": ((2, 5, 9001), 1, "plain"),
    "a channel at a time": ((1, 1, 700), 1, "plain"),
    "rows": ((90, None), 1, "plain"),
    "rows for a team": ((850, None), 1, "plain"),
    "rows of several positions": ((30, None, 3), 1, "plain"),
    "rows of few channels": ((700, 5), 1, "plain"),
    "rows of three channels": ((300, 3, 2), 1, "plain"),
    "channels last": ((3, 5, 6, None), -1, "plain"),
    "gaps": ((5, None, 17), 1, "gaps"),
    "reversed rows": ((90, None), 1, "reversed"),
    "unaligned": ((5, None, 17), 1, "unaligned"),
    "channels last, seen as first": ((5, None, 17), 1, "channels last"),
}


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_is_that_of_the_forward_output_on_its_border(layout, kind, types, activation, epsilon, l2_size):
    dtype, parameters = types
    shape, axis, view = LAYOUTS[layout]
    channels = KINDS[kind](dtype, parameters)
    values = hostile_numbers(channels, epsilon, dtype)
    at_once = shape[axis] or len(channels[0])
    schedules = itertools.cycle(itertools.product((1 << 40, 1, 1 << 12), (1, 2)))
    passing = []
    for first in range(0, len(channels[0]) - at_once + 1, at_once):
        some = slice(first, first + at_once)
        of_some = [vector[some].copy() for vector in channels]
        x = VIEWS[view](arranged(values[:, some], [length or at_once for length in shape], axis))
        size, threads = next(schedules)
        l2_size(size)
        passes = assert_mask(x, of_some, epsilon, activation, axis, view, num_threads=threads)
        passing.append(passes.mean())
    assert 0.2 < np.mean(passing) < 0.8


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_data_lies_on_both_sides_of_the_border(kind, types, epsilon):
    """Of adjacent numbers one passes and the other does not, in about every channel that has such a pair."""
    dtype, parameters = types
    channels = KINDS[kind](dtype, parameters)
    values = hostile_numbers(channels, epsilon, dtype)
    for activation, rows in (("relu", (slice(8),)), ("relu6", (slice(8), slice(8, 16)))):
        y = bnbp.batch_norm_inference(values, *channels, epsilon, activation=activation)
        passes = ~flat(y, activation)
        for some in rows:
            places = np.diff(place_of(values[some]), axis=0)
            assert ((places == 1) | (places == 0)).all()
            share = np.mean(passes[some].any(0) & ~passes[some].all(0))
            assert share > {"ordinary": 0.8, "mixed": 0.5, "strange": 0.25}[kind], share


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", [types for types in MIXED if np.dtype(types[0]).itemsize == 2], ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "strange"])
def test_every_16_bit_number_is_on_its_side(kind, types, activation):
    """All numbers there are, in each channel."""
    everything = np.arange(1 << 16, dtype=np.uint16).view(types[0])
    for epsilon, start in ((0.0, 0), (1e-5, 1)):
        channels = [np.ascontiguousarray(vector[start::2]) for vector in KINDS[kind](*types)]
        x = np.repeat(everything[:, None], len(channels[0]), 1)
        x[np.isinf(x.astype(np.float32)) & has_no_scale(channels, epsilon)] = 1
        assert_mask(x, channels, epsilon, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_an_output_that_is_rounded_to_a_border_is_on_it(activation, offset, types):
    """What is a little above 0 or below 6 in the arithmetic, and 0 or 6 as it is returned, passes nothing."""
    dtype, parameters = types
    shifts = [0, 6]  # to which a product is added that vanishes
    if np.dtype(dtype).itemsize == 2:  # a quarter of the smallest number; 6, but for a tenth of its last place
        shifts = [tiny(dtype) / 4, 6 - 0.1 * float(np.spacing(dtype(6)))]
    small = tiny(np.float32 if np.dtype(dtype).itemsize < 8 else dtype)
    x = np.full((30, 2), offset, dtype)
    x[::2] += dtype(1)
    gamma, variance = np.full(2, small, np.float64), np.full(2, 100.0)
    channels = [v.astype(parameters) for v in (gamma, np.array(shifts), np.full(2, offset), variance)]
    if parameters == np.float16 or (parameters == ml_dtypes.bfloat16 and dtype == parameters):
        channels[0] = np.zeros(2, parameters)  # whose parameters cannot say it
        channels[1] = np.array([0, 6], parameters)
    y = bnbp.batch_norm_inference(x, *channels, 0.0)
    assert (y.astype(np.float64) == [0, 6]).all()
    passes = assert_mask(x, channels, 0.0, activation)
    assert not passes[:, 0].any()
    assert passes[:, 1].all() == (activation == "relu")


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mask_of_training_is_that_of_its_own_output(layout, types, activation, offset):
    """With the batch's own statistics; the shift is made so that an element of each channel is on the border.

    The statistics are rounded when they are returned, and only with the rounded ones can it be computed again.
    """
    shape, axis = layout
    dtype, parameters = types
    batch = make_batch(shape, axis, dtype, parameters=parameters, offset=offset)
    x, gamma = batch.input, batch.gamma
    channels = np.moveaxis(x, axis, 0)
    flattened = channels.reshape(shape[axis], -1).copy()
    at, count = flattened[:, :1].copy(), flattened.shape[1]
    steps = np.random.default_rng(5).choice([-64, -16, -4, -2, -1, 0, 1, 2, 4, 16, 64], flattened[:, ::3].shape)
    flattened[:, ::3] = number_at(place_of(at) + steps, dtype)
    channels[...] = flattened.reshape(channels.shape)

    options = {"channel_axis": axis}
    _, mean, variance = bnbp.batch_norm_training(x, gamma, **options)
    wide = [vector.astype(np.float64) for vector in (gamma, mean, variance)]
    level = np.random.default_rng(6).choice([0, 6] if activation == "relu6" else [0], shape[axis])
    beta = (level - (at[:, 0].astype(np.float64) - wide[1]) * wide[0] / np.sqrt(wide[2] + 1e-5)).astype(parameters)
    forward = bnbp.batch_norm_training(x, gamma, beta, activation=activation, **options)
    assert same_bits(forward[1:], (mean, variance))
    again = bnbp.batch_norm_inference(x, gamma, beta, mean, variance, activation=activation, **options)
    assert same_bits([forward.normalized], [again])
    assert_mask(x, [gamma, beta, mean, variance], 1e-5, activation, axis)
    if count > 60:
        beside = np.moveaxis(~flat(forward.normalized, activation), axis, 0).reshape(shape[axis], -1)[:, ::3]
        assert np.mean(beside.any(1) & ~beside.all(1)) > 0.6


@pytest.mark.parametrize(("shape", "axis"), [((12, 6, 900), 1), ((4000, 10), 1), ((700, 60), 1), ((5, 3, 9001), 1)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mask_does_not_depend_on_the_schedule(shape, axis, types, activation, l2_size):
    channels = [vector[: shape[axis]].copy() for vector in mixed(*types)]
    x = arranged(hostile_numbers(channels, 1e-5, types[0]), shape, axis)
    for size, threads in itertools.product(caches(shape, types[0]), (1, 2)):
        l2_size(size)
        assert_mask(x, channels, 1e-5, activation, axis, num_threads=threads)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mask_of_a_part_is_that_of_the_whole(types, activation):
    """A part has another shape, and its elements are taken in other groups."""
    channels = ordinary(*types)
    x = arranged(hostile_numbers(channels, 1e-5, types[0]), (64, 40, 3), 1)
    delta = np.ones_like(x)
    options = {"activation": activation, "output_mask": (True, False, False)}
    whole = bnbp.batch_norm_inference_backprop(x, *channels, delta, **options).input_delta
    for axis, step in ((0, 1), (0, 7), (2, 1)):
        parts = np.split(x, range(step, x.shape[axis], step), axis)
        results = [bnbp.batch_norm_inference_backprop(p, *channels, np.ones_like(p), **options)[0] for p in parts]
        assert same_bits([np.concatenate(results, axis)], [whole])
    for c in range(40):
        one = [vector[c : c + 1].copy() for vector in channels]
        result = bnbp.batch_norm_inference_backprop(x[:, c : c + 1].copy(), *one, delta[:, c : c + 1].copy(), **options)
        assert same_bits([result.input_delta], [whole[:, c : c + 1]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gamma", [0.0, -0.0])
@pytest.mark.parametrize("beta", [0.0, -0.0, -1.0, 1.0, 6.0, 7.0])
def test_without_a_scale_the_shift_alone_decides(beta, gamma, activation, types):
    """Every finite input of a channel is on the same side; many networks begin with scales of 0."""
    x = np.array([[-3.0], [0.0], [2.0], [60000.0]]).astype(types[0])
    channels = [np.array([value], types[1]) for value in (gamma, beta, 2.0, 1.0)]
    passes = assert_mask(x, channels, 0.0, activation)
    assert passes.all() == passes.any() == (beta > 0 and (beta < 6 or activation == "relu"))
