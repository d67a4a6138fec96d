"""The operator in halves: a batch in parts, reduced, merged and applied, against exact sums and against the whole."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from conftest import DTYPES, MIXED, eps, make_batch, same_bits, sum_bound, sum_error, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_accuracy import off, ulps_off

import bnbp
from bnbp import reference

SHAPE = (7, 3, 10)
places = {axis: st.lists(st.integers(0, SHAPE[axis]), min_size=1, max_size=4).map(sorted) for axis in (0, 2)}
splits = st.one_of(*(st.tuples(st.just(axis), at) for axis, at in places.items()))


def batch_of(dtype, parameters=None):
    """A batch with a variance whose inverse root is a power of two, so that all results are exact fractions."""
    batch = make_batch(SHAPE, 1, dtype, parameters=parameters)
    return batch._replace(variance=np.full(3, 3.75, parameters or dtype))


EPSILON = 0.25


def parts_of(tensor, split):
    """The parts of a tensor, some of which may be empty."""
    axis, at = split
    return np.split(tensor, at, axis)


def channel(tensor, c):
    return [Fraction(float(value)) for value in tensor[:, c].ravel()]


def in_parts(batch, split):
    """The results of the whole operator, computed in parts, and the sums of each part."""
    inputs, deltas = parts_of(batch.input, split), parts_of(batch.normalized_delta, split)
    sums = [bnbp.batch_norm_training_backprop_reduce(x, batch.mean, dy) for x, dy in zip(inputs, deltas, strict=True)]
    delta_sum, delta_centered_sum = (sum(values) for values in zip(*sums, strict=True))
    results = [
        bnbp.batch_norm_training_backprop_apply(
            x, *batch[1:5], dy, delta_sum, delta_centered_sum, batch.input.size // SHAPE[1], EPSILON
        )
        for x, dy in zip(inputs, deltas, strict=True)
    ]
    assert all(same_bits(result[1:], results[0][1:]) for result in results)
    return np.concatenate([result.input_delta for result in results], split[0]), *results[0][1:], sums


def check_contract(batch, input_delta, gamma_delta, beta_delta, sums=()):
    """The accuracy contract of the whole operator; a unit in the last place is one of the largest sum."""
    dtype = batch.input.dtype.type
    u = Fraction(eps(dtype)) / 2
    for c in range(SHAPE[1]):
        delta, mean = channel(batch.normalized_delta, c), Fraction(float(batch.mean[c]))
        centered = [value - mean for value in channel(batch.input, c)]
        products = [d * e / 2 for d, e in zip(delta, centered, strict=True)]
        beta, gamma = sum(delta), sum(products)
        for value, terms, parts in (
            (beta_delta[c], delta, [part.delta_sum[c] for part in sums]),
            (gamma_delta[c], products, [part.delta_centered_sum[c] / 2 for part in sums]),
        ):
            largest = dtype(max(map(abs, [value, *parts]))) if dtype == np.float64 else value
            assert off(value, sum(terms)) <= sum_bound(largest, sum(map(abs, terms)), dtype)
        scale, m = Fraction(float(batch.gamma[c])) / 2, len(delta)
        for value, d, e in zip(channel(input_delta, c), delta, centered, strict=True):
            bound = 6 * u * abs(scale) * (abs(d) + abs(beta / m) + abs(e / 2 * gamma / m)) + Fraction(tiny(dtype))
            assert abs(value - scale * (d - beta / m - e / 2 * gamma / m)) <= bound


@given(splits)
@pytest.mark.parametrize("types", MIXED, ids=str)
def test_a_batch_in_parts_is_as_accurate_as_the_whole(types, split):
    batch = batch_of(*types)
    *results, sums = in_parts(batch, split)
    check_contract(batch, *results, sums)
    assert np.ptp(results[0]) > 0.1  # not degenerate


def test_reduce_and_apply_make_the_operator(layout, types):
    shape, axis = layout
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    whole = bnbp.batch_norm_training_backprop(*batch, channel_axis=axis)
    sums = bnbp.batch_norm_training_backprop_reduce(batch.input, batch.mean, batch.normalized_delta, channel_axis=axis)
    count = batch.input.size // shape[axis]
    halves = bnbp.batch_norm_training_backprop_apply(*batch, *sums, count, channel_axis=axis)
    if types[0] != np.float64:
        assert same_bits(halves, whole)
        return
    for half, one in zip(halves[1:], whole[1:], strict=True):  # of float64, the sums were rounded in between
        np.testing.assert_array_max_ulp(half, one, 2)
    size = np.abs(whole.input_delta).max()
    np.testing.assert_allclose(halves.input_delta, whole.input_delta, rtol=0, atol=8 * eps(types[0]) * size)


def test_halves_agree_with_the_reference(layout, types):
    shape, axis = layout
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    arguments = (batch.input, batch.mean, batch.normalized_delta)
    sums = bnbp.batch_norm_training_backprop_reduce(*arguments, channel_axis=axis)
    expected = reference.batch_norm_training_backprop_reduce(*arguments, channel_axis=axis)
    count = batch.input.size // shape[axis]
    x, mean, delta = (abs(array.astype(np.float64)) for array in arguments)
    magnitude = reference.batch_norm_training_backprop_reduce(x, -mean, delta, channel_axis=axis)
    for value, exact, size in zip(sums, expected, magnitude, strict=True):
        assert value.dtype == np.float64
        assert (abs(value - exact) <= sum_error(types[0]) * size).all()
    arguments = (*batch, *expected, 3 * count, 0.5)  # a third of a batch
    got = bnbp.batch_norm_training_backprop_apply(*arguments, channel_axis=axis)
    expected = reference.batch_norm_training_backprop_apply(*arguments, channel_axis=axis)
    for value, exact in zip(got, expected, strict=True):
        error = 16 * eps(value.dtype)
        np.testing.assert_allclose(value.astype(np.float64), exact, rtol=error, atol=error * np.abs(exact).max())


def test_apply_of_one_element_gives_exactly_nothing():
    x = np.array([[3.0, -2.0]])
    sums = bnbp.batch_norm_training_backprop_reduce(x, [1.0, 2.0], x)
    result = bnbp.batch_norm_training_backprop_apply(x, None, None, [1.0, 2.0], [1.0, 1.0], x, *sums, 1)
    np.testing.assert_array_equal(result.input_delta, [[0.0, 0.0]])


@pytest.mark.parametrize("module", [bnbp, reference])
def test_apply_computes_what_is_asked_for(module):
    batch = batch_of(np.float64)
    sums = module.batch_norm_training_backprop_reduce(batch.input, batch.mean, batch.normalized_delta)
    whole = module.batch_norm_training_backprop_apply(*batch, *sums, 70)
    for k in range(3):
        mask = [k == j for j in range(3)]
        some = module.batch_norm_training_backprop_apply(*batch, *sums, 70, output_mask=mask)
        assert [result is not None for result in some] == mask
        np.testing.assert_array_equal(some[k], whole[k])


# Statistics


def statistics_of(x, split, module=bnbp):
    return [module.batch_norm_training_statistics(part) for part in parts_of(x, split)]


@given(splits)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_statistics_are_right_to_the_last_places(dtype, split):
    x = batch_of(dtype).input
    merged = bnbp.merge_statistics(*statistics_of(x, split))
    assert merged.count == 70
    for c in range(SHAPE[1]):
        values = channel(x, c)
        mean = sum(values) / len(values)
        magnitude = sum(map(abs, values)) / len(values)
        assert off(merged.mean[c], mean) <= sum_bound(merged.mean[c], magnitude, dtype, ulps=1)
        # Those of smaller types are summed in float64 and no more: far below a unit in their own last place.
        m2 = sum((value - mean) ** 2 for value in values)
        assert off(merged.m2[c], m2) <= sum_bound(merged.m2[c], m2, dtype, ulps=4 if dtype == np.float64 else 16)


@pytest.mark.parametrize("seed", range(40))
def test_merging_rounds_once(seed):
    """Parts of any counts, means and deviations: the results are the exact ones, rounded."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(rng.integers(2, 9)):
        mean, m2 = rng.normal(size=(2, 9)) * 10.0 ** rng.integers(-6, 7, (2, 9))
        parts.append((int(10 ** rng.uniform(0, 6)), mean, abs(m2)))
    merged = bnbp.merge_statistics(parts)
    for c in range(9):
        exact = [(count, Fraction(mean[c]), Fraction(m2[c])) for count, mean, m2 in parts]
        mean = sum(count * value for count, value, _ in exact) / merged.count
        assert ulps_off(merged.mean[c], mean) <= 0.501
        assert ulps_off(merged.m2[c], sum(m2 + count * (value - mean) ** 2 for count, value, m2 in exact)) <= 0.501


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((np.inf, 1.0), np.inf),
        ((1.0, -np.inf, 2.0), -np.inf),
        ((np.inf, np.inf), np.inf),
        ((np.inf, -np.inf), np.nan),
        ((1.0, np.nan), np.nan),
        ((np.inf, np.nan), np.nan),
    ],
)
def test_an_infinite_or_missing_mean_is_that_of_the_whole_channel(means, expected):
    merged = bnbp.merge_statistics((3, np.array([mean, 0.5]), np.array([1.0, 2.0])) for mean in means)
    np.testing.assert_array_equal(merged.mean, [expected, 0.5])
    np.testing.assert_array_equal(merged.m2, [np.nan, 2.0 * len(means)])


@given(splits)
def test_merging_does_not_move_a_constant_channel(split):
    x = np.full(SHAPE, 1 / 3)
    merged = bnbp.merge_statistics(statistics_of(x, split))
    np.testing.assert_array_equal(merged.mean, 1 / 3)
    np.testing.assert_array_equal(merged.m2, 0)
    np.testing.assert_array_equal(merged.variance, 0)


@given(splits)
@pytest.mark.parametrize("module", [bnbp, reference])
def test_parts_without_elements_change_nothing(module, split):
    x = batch_of(np.float64).input
    parts = statistics_of(x, split, module)
    empty = module.batch_norm_training_statistics(x[:0])
    assert empty.count == 0
    assert np.isnan(empty.mean).all()
    assert np.isnan(empty.variance).all()
    np.testing.assert_array_equal(empty.m2, 0)
    among = [part for one in parts for part in (empty, one)]
    assert same_bits(module.merge_statistics(*among, empty)[1:], module.merge_statistics(*parts)[1:])
    nothing = module.merge_statistics(empty, empty)
    assert nothing.count == 0
    assert np.isnan(nothing.variance).all()


@pytest.mark.parametrize("count", [0, 5])
def test_a_part_without_elements_still_has_gradients_of_the_parameters(count):
    x, v = np.zeros((0, 2)), np.ones(2)
    got, expected = (
        module.batch_norm_training_backprop_apply(x, v, v, v, 3 * v, x, 5 * v, 4 * v, count, 1.0)
        for module in (bnbp, reference)
    )
    assert same_bits(got[1:], expected[1:])
    np.testing.assert_array_equal(got.gamma_delta, 2)


@given(splits)
@pytest.mark.parametrize("module", [bnbp, reference])
def test_parts_may_be_given_one_by_one_or_together(module, split):
    parts = statistics_of(batch_of(np.float64).input, split, module)
    merged = module.merge_statistics(*parts)
    for same in (module.merge_statistics(parts), module.merge_statistics(iter(parts))):
        assert same.count == merged.count == sum(part.count for part in parts)
        assert same_bits(same[1:], merged[1:])
    alone = module.merge_statistics(parts[-1])
    assert same_bits(alone[1:], parts[-1][1:])


def test_what_is_merged_is_a_copy_of_what_was_checked():
    """`__array__` may give an array of which it keeps hold."""

    class Late:
        def __init__(self, act):
            self.act = act

        def __array__(self, dtype=None, copy=None):
            self.act()
            return mean

    mean, m2 = np.ones(2), np.zeros(2)
    parts = (5, Late(lambda: None), m2), (5, np.ones(2), Late(lambda: mean.resize(9, refcheck=False)))
    with pytest.raises(
        ValueError, match=r"^parts\[1\] \(m2\): expected shape \(2,\), that of parts\[0\] \(mean\), got \(9,\)"
    ):
        bnbp.merge_statistics(*parts)
    mean.resize(2, refcheck=False)
    parts = (5, Late(lambda: None), m2), (5, np.ones(2), Late(lambda: mean.fill(7)))
    assert bnbp.merge_statistics(*parts).mean.tolist() == [1, 1]


def test_one_part_has_the_statistics_of_the_operator(layout, dtype):
    shape, axis = layout
    x = make_batch(shape, axis, dtype).input
    part = bnbp.batch_norm_training_statistics(x, channel_axis=axis)
    whole = bnbp.batch_norm_training(x, None, None, channel_axis=axis)
    assert part.count == x.size // shape[axis]
    for value, one, ulps in zip((part.mean, part.variance), whole[1:], (1, 2), strict=True):
        assert (abs(value.astype(dtype) - one) <= ulps * np.abs(np.spacing(one))).all()


def test_bits_do_not_depend_on_threads():
    batch = make_batch((32, 6, 40, 40), 1, np.float32)
    sums = [
        bnbp.batch_norm_training_backprop_reduce(batch.input, batch.mean, batch.normalized_delta, num_threads=threads)
        for threads in (1, 2, 3)
    ]
    results = [
        (
            *bnbp.batch_norm_training_backprop_apply(*batch, *sums[0], 51200, num_threads=threads),
            *bnbp.batch_norm_training_statistics(batch.input, num_threads=threads)[1:],
        )
        for threads in (1, 2, 3)
    ]
    assert all(same_bits(one, sums[0]) for one in sums)
    assert all(same_bits(one, results[0]) for one in results)


def test_a_batch_of_many_parts_is_that_of_few():
    """Parts of one row each: nothing is lost where there are hundreds of them."""
    x = make_batch((400, 3), 1, np.float64, offset=1000.0).input
    rows = [bnbp.batch_norm_training_statistics(x[a:b]) for a, b in pairwise(range(401))]
    merged, whole = bnbp.merge_statistics(rows), bnbp.batch_norm_training_statistics(x)
    np.testing.assert_array_max_ulp(merged.mean, whole.mean, 1)
    np.testing.assert_array_max_ulp(merged.m2, whole.m2, 4)
