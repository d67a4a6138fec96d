"""The operators' numbers: against the NumPy twin, against exact arithmetic, and against themselves."""

from fractions import Fraction

import hypothesis.extra.numpy as hnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from conftest import MIXED, Batch, eps, make_batch, same_bits, sum_bound, sum_error, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbp
from bnbp import reference


def along(vector, x, axis):
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(vector, np.float64).reshape(shape)


def assert_backprop_close(got, batch: Batch, axis, epsilon, expected, terms):
    """The accuracy contract: sums to the last place but for the float64 sums' own error, input_delta within 6 u."""
    u, u_sums = eps(batch.input.dtype) / 2, eps(batch.mean.dtype) / 2
    others = tuple(k for k in range(batch.input.ndim) if k != axis % batch.input.ndim)
    slack = sum_error(batch.input.dtype)
    for name, addends in zip(("beta_delta", "gamma_delta"), terms, strict=True):
        error = np.abs(getattr(got, name).astype(np.float64) - getattr(expected, name))
        assert (error <= 2 * u_sums * np.abs(getattr(expected, name)) + slack * np.abs(addends).sum(others)).all(), name
    x, dy = batch.input.astype(np.float64), batch.normalized_delta.astype(np.float64)
    m = x.size // x.shape[axis]
    inv_std = 1 / np.sqrt(along(batch.variance, x, axis) + epsilon)
    xhat = (x - along(batch.mean, x, axis)) * inv_std
    size = abs(dy) + abs(along(expected.beta_delta, x, axis) / m) + abs(xhat * along(expected.gamma_delta, x, axis) / m)
    bound = (6 * u + slack) * abs(along(batch.gamma, x, axis) * inv_std) * size + tiny(batch.input.dtype)
    assert (np.abs(got.input_delta.astype(np.float64) - expected.input_delta) <= bound).all()


def backprop_terms(batch, axis, epsilon):
    x, dy = batch.input.astype(np.float64), batch.normalized_delta.astype(np.float64)
    xhat = (x - along(batch.mean, x, axis)) / np.sqrt(along(batch.variance, x, axis) + epsilon)
    return dy, dy * xhat


def types_of(results):
    return [result.dtype for result in results]


@pytest.mark.parametrize("epsilon", [1e-5, 0.0, 0.5])
def test_backprop_agrees_with_the_reference(layout, types, epsilon):
    shape, axis = layout
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    if epsilon == 0:  # with one element a channel's own variance is 0, and its 1/sqrt is infinite
        batch = batch._replace(variance=batch.variance + types[1](0.25))
    got = bnbp.batch_norm_training_backprop(*batch, epsilon, channel_axis=axis)
    expected = reference.batch_norm_training_backprop(*batch, epsilon, channel_axis=axis)
    assert_backprop_close(got, batch, axis, epsilon, expected, backprop_terms(batch, axis, epsilon))
    assert types_of(got) == [types[0], types[1], types[1]]
    assert got.input_delta.shape == shape
    if batch.input.size > shape[axis]:
        assert np.ptp(got.input_delta) > 0.1  # the data is not degenerate


def test_inference_backprop_agrees_with_the_reference(layout, types):
    shape, axis = layout
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    got = bnbp.batch_norm_inference_backprop(*batch, channel_axis=axis)
    expected = reference.batch_norm_inference_backprop(*batch, channel_axis=axis)
    assert_backprop_close(got, batch, axis, 1e-5, expected, backprop_terms(batch, axis, 1e-5))


@pytest.mark.parametrize("far", [False, True])
def test_training_agrees_with_the_reference(layout, types, far):
    """Wherever the mean is: of it, more is subtracted than the type of the data has."""
    shape, axis = layout
    offset = 3.0 if not far else 1e5 if types[0] != np.float16 else 1e3
    batch = make_batch(shape, axis, types[0], offset=offset, parameters=types[1])
    got = bnbp.batch_norm_training(*batch[:3], channel_axis=axis)
    expected = reference.batch_norm_training(*batch[:3], channel_axis=axis)
    u, u_sums = (8 * eps(dtype) if dtype == np.float64 else eps(dtype) for dtype in types)
    u_sums += sum_error(np.float64)
    mean, variance = (vector.astype(np.float64) for vector in got[1:])
    spread = np.sqrt(expected.batch_variance + 1e-5)
    assert (abs(mean - expected.batch_mean) <= u_sums * (abs(expected.batch_mean) + spread)).all()
    assert (abs(variance - expected.batch_variance) <= 8 * u_sums * expected.batch_variance).all()
    # The arithmetic of the type, or of float32, and the mean's own error: nothing that grows with u and the mean.
    shift = sum_error(np.float64) * abs(expected.batch_mean / spread).max()
    normalized = got.normalized.astype(np.float64)
    np.testing.assert_allclose(normalized, expected.normalized, rtol=16 * u, atol=16 * u + shift)
    assert types_of(got) == [types[0], types[1], types[1]]


def test_inference_agrees_with_the_reference(layout, types):
    shape, axis = layout
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    got = bnbp.batch_norm_inference(*batch[:5], channel_axis=axis)
    expected = reference.batch_norm_inference(*batch[:5], channel_axis=axis)
    u = eps(types[0])
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=4 * u, atol=16 * u)
    assert got.dtype == types[0]


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_axis_agree_with_the_reference(data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=6, max_side=9))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype, parameters = data.draw(st.sampled_from(MIXED))
    epsilon = data.draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    threads = data.draw(st.integers(1, 4))
    batch = make_batch(shape, axis, dtype, seed=data.draw(st.integers(0, 2**16)), parameters=parameters)
    got = bnbp.batch_norm_training_backprop(*batch, epsilon, channel_axis=axis, num_threads=threads)
    expected = reference.batch_norm_training_backprop(*batch, epsilon, channel_axis=axis)
    assert_backprop_close(got, batch, axis, epsilon, expected, backprop_terms(batch, axis, epsilon))


@pytest.mark.parametrize("shape", [(3, 4, 50), (50, 4)], ids=str)
@pytest.mark.parametrize("types", [types for types in MIXED if eps(types[1]) < 1e-6 and types[0] != np.float16])
@pytest.mark.parametrize("gamma", [3e38, 1e-41])
def test_a_scale_that_float32_has_no_number_for(shape, types, gamma):
    """gamma / sqrt(variance) is 3e39, or subnormal; what comes out is not."""
    batch = make_batch(shape, 1, types[0], offset=0.0, parameters=types[1])
    size = types[0](3e-10 if gamma > 1 else 1e4)
    batch = batch._replace(input=batch.input * size, normalized_delta=batch.normalized_delta * size)
    batch.gamma[1:3], batch.mean[1:3], batch.variance[1:3], batch.beta[1:3] = gamma, 0, 1e-2, 0
    for name, count in (("training_backprop", 6), ("inference_backprop", 6), ("inference", 5)):
        got, exact = (getattr(m, f"batch_norm_{name}")(*batch[:count], epsilon=0.0) for m in (bnbp, reference))
        got, exact = (result if isinstance(result, np.ndarray) else result.input_delta for result in (got, exact))
        for c in range(4):
            scale = abs(exact[:, c]).max()
            assert (abs(got[:, c].astype(np.float64) - exact[:, c]) <= 8 * eps(types[0]) * scale).all(), (name, c)
        assert scale > 0
        assert 1e-38 < abs(exact[:, 1:3]).max() < 1e38


# ---------------------------------------------------------------- exact arithmetic


def exact_backprop(batch: Batch, epsilon: float, axis: int):
    """Sums in exact fractions, the square root to 60 digits: results as mpmath numbers, a list for each channel."""
    with mpmath.workdps(60):
        x, dy = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (batch[0], batch[5]))
        m = x.shape[1]
        for c in range(len(x)):
            gamma, mean, variance = (Fraction(float(vector[c])) for vector in (batch.gamma, batch.mean, batch.variance))
            centered = [Fraction(float(value)) - mean for value in x[c]]
            delta = [Fraction(float(value)) for value in dy[c]]
            delta_sum = sum(delta)
            product_sum = sum(d * e for d, e in zip(delta, centered, strict=True))
            total = variance + Fraction(epsilon)
            inv_std = 1 / mpmath.sqrt(mpmath.mpf(total.numerator) / total.denominator)
            inner = [d - delta_sum / m - e * product_sum / (total * m) for d, e in zip(delta, centered, strict=True)]
            yield (
                [_mpf(gamma) * inv_std * _mpf(value) for value in inner],
                inv_std * _mpf(product_sum),
                _mpf(delta_sum),
            )


def _mpf(fraction: Fraction):
    return mpmath.mpf(fraction.numerator) / fraction.denominator


@pytest.mark.parametrize("shape", [(5, 3, 7), (40, 2, 31)])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_backprop_agrees_with_exact_arithmetic(shape, offset, types):
    epsilon = 1e-3
    batch = make_batch(shape, 1, types[0], seed=1, offset=offset, parameters=types[1])
    got = bnbp.batch_norm_training_backprop(*batch, epsilon)
    u = eps(types[0]) / 2
    with mpmath.workdps(60):
        for c, (input_delta, gamma_delta, beta_delta) in enumerate(exact_backprop(batch, epsilon, 1)):
            inv_std = 1 / np.sqrt(float(batch.variance[c]) + epsilon)
            terms = backprop_terms(batch, 1, epsilon)[::-1]
            for value, exact, addends in zip(got[1:], (gamma_delta, beta_delta), terms, strict=True):
                bound = sum_bound(value[c], Fraction(abs(addends[:, c]).sum()), types[0])
                assert abs(mpmath.mpf(float(value[c])) - exact) <= _mpf(bound)
            for value, exact, x, dy in zip(
                got.input_delta[:, c].ravel(),
                input_delta,
                batch.input[:, c].ravel(),
                batch.normalized_delta[:, c].ravel(),
                strict=True,
            ):
                m = len(input_delta)
                xhat = (float(x) - float(batch.mean[c])) * inv_std
                size = abs(float(dy)) + abs(float(beta_delta) / m) + abs(xhat * float(gamma_delta) / m)
                bound = 6 * u * abs(float(batch.gamma[c]) * inv_std) * size + tiny(types[0])
                assert abs(mpmath.mpf(float(value)) - exact) <= bound


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_training_statistics_agree_with_exact_arithmetic(offset, types):
    batch = make_batch((60, 2, 41), 1, types[0], seed=2, offset=offset, parameters=types[1])
    got = bnbp.batch_norm_training(*batch[:3])
    for c in range(2):
        values = [Fraction(float(value)) for value in batch.input[:, c].ravel()]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        magnitude = sum(map(abs, values)) / len(values)
        for value, exact, size in ((got.batch_mean, mean, magnitude), (got.batch_variance, variance, variance)):
            assert abs(Fraction(float(value[c])) - exact) <= sum_bound(value[c], size, types[0], ulps=1)


@pytest.mark.parametrize("value", [0.0, 0.1, -6e4, 1e30])
def test_a_constant_channel_has_variance_exactly_zero(value, layout, dtype):
    shape, axis = layout
    if value > float(ml_dtypes.finfo(dtype).max):
        value = -0.3
    x = np.full(shape, value, dtype)
    got = bnbp.batch_norm_training(x, None, None, channel_axis=axis)
    assert (got.batch_variance == 0).all()
    assert (got.batch_mean == dtype(value)).all()
    assert (got.normalized == 0).all()


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "name", ["batch_norm_training", "batch_norm_training_backprop", "batch_norm_inference_backprop"]
)
@pytest.mark.parametrize("axis", [1, -1])
def test_bits_do_not_depend_on_threads(name, axis, dtype):
    batch = make_batch((7, 13, 29, 31), axis, dtype)  # 81,809 elements: enough for a team
    inputs = batch[:3] if name == "batch_norm_training" else batch
    one, *others = (getattr(bnbp, name)(*inputs, channel_axis=axis, num_threads=count) for count in (1, 2, 3, 5))
    for other in others:
        assert same_bits(one, other)


def test_bits_do_not_depend_on_alignment_out_or_place(layout, dtype):
    shape, axis = layout
    batch = make_batch(shape, axis, dtype)
    plain = bnbp.batch_norm_training_backprop(*batch, channel_axis=axis)

    def unaligned(array):
        memory = np.empty(array.nbytes + 1, np.uint8)
        view = memory[1:].view(dtype).reshape(array.shape)
        view[...] = array
        assert not view.flags.aligned
        return view

    results = [
        bnbp.batch_norm_training_backprop(*map(unaligned, batch), channel_axis=axis),
        bnbp.batch_norm_training_backprop(*batch, channel_axis=axis, out=[unaligned(output) for output in plain]),
    ]
    for place in (0, 5):
        inputs = [array.copy() for array in batch]
        result = bnbp.batch_norm_training_backprop(*inputs, channel_axis=axis, out=(inputs[place], None, None))
        assert result.input_delta is inputs[place]
        results.append(result)
    for result in results:
        assert same_bits(plain, result)


# ---------------------------------------------------------------- out, masks and None


def test_an_earlier_result_can_be_passed_back(dtype):
    first, second = make_batch((4, 3, 5), dtype=dtype, seed=1), make_batch((4, 3, 5), dtype=dtype, seed=2)
    for function, count in [
        (bnbp.batch_norm_training, 3),
        (bnbp.batch_norm_training_backprop, 6),
        (bnbp.batch_norm_inference_backprop, 6),
    ]:
        result = function(*first[:count])
        again = function(*second[:count], out=result)
        assert all(a is b for a, b in zip(result, again, strict=True))
        assert same_bits(again, function(*second[:count]))
    y = bnbp.batch_norm_inference(*first[:5])
    assert bnbp.batch_norm_inference(*second[:5], out=y) is y
    assert bnbp.batch_norm_inference(*second[:5], out=(y,)) is y
    assert same_bits([y], [bnbp.batch_norm_inference(*second[:5])])


def test_training_can_be_done_in_place(dtype):
    batch = make_batch((4, 3, 5), dtype=dtype)
    plain = bnbp.batch_norm_training(*batch[:3])
    x = batch.input.copy()
    assert same_bits(plain, bnbp.batch_norm_training(x, *batch[1:3], out=(x, None, None)))


@pytest.mark.parametrize("mask", [(m & 1, m & 2, m & 4) for m in range(8)])
@pytest.mark.parametrize("name", ["batch_norm_training_backprop", "batch_norm_inference_backprop"])
def test_masked_outputs_are_none_and_the_others_unchanged(mask, name, dtype):
    batch = make_batch((4, 3, 5), dtype=dtype)
    full = getattr(bnbp, name)(*batch)
    masked = getattr(bnbp, name)(*batch, output_mask=tuple(map(bool, mask)))
    for wanted, whole, part in zip(mask, full, masked, strict=True):
        assert same_bits([whole], [part]) if wanted else part is None


def test_gamma_none_is_ones_and_beta_none_is_zeros(dtype):
    x, gamma, beta, *rest = make_batch((4, 3, 5), dtype=dtype)
    ones, zeros = np.ones_like(gamma), np.zeros_like(beta)
    assert same_bits(bnbp.batch_norm_training(x, None, None), bnbp.batch_norm_training(x, ones, zeros))
    assert same_bits(
        bnbp.batch_norm_training_backprop(x, None, None, *rest), bnbp.batch_norm_training_backprop(x, ones, beta, *rest)
    )
    assert same_bits(
        [bnbp.batch_norm_inference(x, None, None, *rest[:2])], [bnbp.batch_norm_inference(x, ones, zeros, *rest[:2])]
    )


# ---------------------------------------------------------------- empty, tiny and not finite


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 3, 2**28, 2**28)])
def test_an_empty_batch_has_no_input_delta_and_zero_sums(shape, dtype):
    vector = np.zeros(3, dtype)  # a variance of 0 and epsilon 0: inv_std is infinite, and the sums still 0
    got = bnbp.batch_norm_training_backprop(
        np.empty(shape, dtype), vector, vector, vector, vector, np.empty(shape, dtype), 0
    )
    assert got.input_delta.shape == shape
    assert (got.gamma_delta == 0).all()
    assert (got.beta_delta == 0).all()
    forward = bnbp.batch_norm_training(np.empty(shape, dtype), vector, vector)
    assert np.isnan(forward.batch_mean).all()
    assert np.isnan(forward.batch_variance).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1, 1)])
def test_one_element_has_input_delta_exactly_zero(shape, epsilon, dtype):
    batch = make_batch(shape, dtype=dtype)
    forward = bnbp.batch_norm_training(*batch[:3], epsilon + 1)
    got = bnbp.batch_norm_training_backprop(*batch[:3], *forward[1:], batch.normalized_delta, epsilon)
    assert (got.input_delta == 0).all()
    assert (got.beta_delta == batch.normalized_delta.ravel()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["input", "normalized_delta", "gamma", "mean", "variance"])
@pytest.mark.parametrize("axis", [1, -1])
def test_what_is_not_finite_stays_in_its_channel(place, bad, axis, dtype):
    batch = make_batch((8, 6, 6, 6), axis, dtype)
    clean = bnbp.batch_norm_training_backprop(*batch, channel_axis=axis)
    spoiled = getattr(batch, place).copy()
    target = np.moveaxis(spoiled, axis, 0) if spoiled.ndim > 1 else spoiled
    target[(2,) + (0,) * (target.ndim - 1)] = bad
    got = bnbp.batch_norm_training_backprop(*batch._replace(**{place: spoiled}), channel_axis=axis)
    others = [c for c in range(6) if c != 2]
    for whole, part in zip(clean, got, strict=True):
        axis_of = axis if whole.ndim > 1 else 0
        assert same_bits([whole.take(others, axis_of)], [part.take(others, axis_of)])
    assert not np.isfinite(got.input_delta.take(2, axis)).all() or place == "variance"


@pytest.mark.parametrize("shape", [(3, 10, 50), (60, 10)], ids=str)
@pytest.mark.parametrize("place", ["gamma", "beta", "mean", "variance"])
def test_a_nan_is_one_whatever_its_bits(place, shape, types):
    batch = make_batch(shape, 1, types[0], parameters=types[1])
    bits, vector = np.dtype(f"u{batch.gamma.itemsize}"), getattr(batch, place)
    infinity, sign = int(vector.dtype.type(np.inf).view(bits)), 1 << 8 * bits.itemsize - 1
    nans = [infinity + 1, (infinity + sign) // 2, sign - 2, sign - 1]
    vector.view(bits)[1:9] = [*nans, *(sign + value for value in nans)]
    with np.errstate(invalid="ignore"):  # says ml_dtypes of one that signals
        assert np.isnan(vector).tolist() == [False] + [True] * 8 + [False]
    names = {"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}
    for name, count in names.items():
        if place in batch._fields[:count] and not (place == "beta" and "backprop" in name):
            result = getattr(bnbp, f"batch_norm_{name}")(*batch[:count])
            tensor = result if isinstance(result, np.ndarray) else result[0]
            if (name, place) != ("inference_backprop", "mean"):  # which does not need it for this output
                assert np.isnan(tensor[:, 1:9]).all(), name
            assert np.isfinite(tensor[:, [0, 9]]).all(), name


def test_zero_variance_and_epsilon_follow_ieee_in_that_channel_alone(dtype):
    batch = make_batch((5, 3, 4), dtype=dtype)
    x, variance = batch.input.copy(), batch.variance.copy()
    x[:, 1], variance[1] = batch.mean[1], 0
    got = bnbp.batch_norm_training_backprop(x, batch.gamma, None, batch.mean, variance, batch.normalized_delta, 0)
    assert np.isnan(got.gamma_delta[1])
    assert np.isfinite(got.input_delta[:, [0, 2]]).all()
    variance[1] = -1
    got = bnbp.batch_norm_training_backprop(x, batch.gamma, None, batch.mean, variance, batch.normalized_delta, 0)
    assert np.isnan(got.input_delta[:, 1]).all()
    assert np.isfinite(got.input_delta[:, [0, 2]]).all()


def test_inference_backprop_does_not_look_at_the_input_for_input_delta(dtype):
    batch = make_batch((5, 3, 4), dtype=dtype)
    x = batch.input.copy()
    x[0, 1, 0] = np.nan
    delta = batch.normalized_delta.copy()
    delta[0, 0, 0] = -0.0
    got = bnbp.batch_norm_inference_backprop(x, None, *batch[2:5], delta)
    assert np.isfinite(got.input_delta).all()
    assert np.signbit(got.input_delta[0, 0, 0])
    assert np.isnan(got.gamma_delta[1])
