"""The accuracy contract on hostile data, against exact sums.

``gamma_delta`` and ``beta_delta`` are within 1 unit in the last place of the exact value for types up to float32 and
within 4 for float64 wherever the sum's condition number is below 2^20, whatever the number of elements.
"""

from fractions import Fraction

import ml_dtypes
import mpmath
import numpy as np
import pytest
from conftest import eps, sum_bound, tiny, unit_of

import bnbp

LAYOUTS = {
    "one run": lambda v: v.reshape(1, 1, -1),
    "rows": lambda v: v.reshape(-1, 1),
    "planes": lambda v: v.reshape(-1, 1, 50),
    "small planes": lambda v: v.reshape(-1, 1, 25),  # of 16-bit types these are rows
}


def off(value, exact: Fraction) -> Fraction:
    return abs(Fraction(float(value)) - exact)


def ulps_off(value, exact: Fraction) -> float:
    return float(off(value, exact) / unit_of(value))


def condition(terms) -> float:
    total = sum(terms)
    return float(sum(map(abs, terms)) / abs(total)) if total else np.inf


def cancelling(rng, dtype, n, bits):
    """Values that cancel in pairs but for one, which is about 2^-bits of the sum of their sizes."""
    half = rng.normal(size=n // 2 - 1).astype(dtype)
    rest = np.array([2 * np.abs(half.astype(np.float64)).sum() * 2.0**-bits, 0]).astype(dtype)
    return np.concatenate([half, -half, rest])[rng.permutation(n)]


def hostile(case, dtype, n):
    """x, dy and mean of one channel."""
    rng = np.random.default_rng(5)
    x, dy, mean = rng.normal(size=n), rng.normal(0.1, 1, size=n), 0.0
    far, decades = {np.float16: (1e3, 2), ml_dtypes.bfloat16: (1e2, 15)}.get(dtype, (1e6, 15))
    if case == "a mean far from zero":
        x, mean = x + far, far
    elif case == "cancelling sums":
        dy = cancelling(rng, dtype, n, 18)
    elif case == "all magnitudes":
        x, dy = x * 10.0 ** rng.uniform(-decades, decades, n), dy * 10.0 ** rng.uniform(-decades, decades, n)
    elif case == "subnormal deltas":
        dy = dy * float(ml_dtypes.finfo(dtype).smallest_normal) / 8
    elif case == "large and small by turns":
        x[::2] *= 10.0 ** (2 * decades // 3)
        dy[::2] *= 10.0 ** -(2 * decades // 3)
    return x.astype(dtype), dy.astype(dtype), dtype(mean)


CASES = [
    "nothing special",
    "a mean far from zero",
    "cancelling sums",
    "all magnitudes",
    "subnormal deltas",
    "large and small by turns",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_sums_are_right_to_the_last_place(case, layout, types):
    dtype, parameters = types
    x, dy, mean = hostile(case, dtype, 3000)
    # A variance and epsilon whose inverse root is a power of two, so that gamma_delta is an exact fraction as well.
    statistics = np.array([mean], parameters), np.array([3.75], parameters)
    got = bnbp.batch_norm_training_backprop(LAYOUTS[layout](x), None, None, *statistics, LAYOUTS[layout](dy), 0.25)
    delta = [Fraction(float(value)) for value in dy]
    product = [d * (Fraction(float(value)) - Fraction(float(mean))) / 2 for d, value in zip(delta, x, strict=True)]
    for value, terms in ((got.beta_delta[0], delta), (got.gamma_delta[0], product)):
        assert condition(terms) < 2**20
        if terms is product and case == "subnormal deltas" and dtype == np.float64:
            # Each product is below the normal numbers, and loses up to half of the smallest one there is.
            assert off(value, sum(terms)) <= len(terms) * Fraction(5e-324) / 2
        else:
            assert off(value, sum(terms)) <= sum_bound(value, sum(map(abs, terms)), dtype)
    if case == "cancelling sums":
        assert condition(delta) > 2**16  # it does cancel


def test_ten_million_elements_a_channel(types):
    dtype, parameters = types
    rng = np.random.default_rng(6)
    # Whole numbers, so that int64 sums are exact. The mean is far from zero, and float32 sums would stop growing.
    center = 1000 if np.dtype(dtype).itemsize > 2 else 100
    x, dy = rng.integers(center * 9 // 10, center * 11 // 10, 10_000_000), rng.integers(-3, 5, 10_000_000)
    gamma, statistics = np.ones(1, parameters), (np.array([center], parameters), np.array([3.75], parameters))
    flat = x.astype(dtype).reshape(1, 1, -1), gamma, None
    got = bnbp.batch_norm_training_backprop(*flat, *statistics, dy.astype(dtype).reshape(1, 1, -1), 0.25)
    for (value,), terms, scale in zip(got[1:], (dy * (x - center), dy), (2, 1), strict=True):
        exact, magnitude = Fraction(int(terms.sum()), scale), Fraction(int(abs(terms).sum()), scale)
        if abs(exact) > Fraction(float(ml_dtypes.finfo(parameters).max)):
            assert value == np.inf * np.sign(float(exact))
        else:
            assert off(value, exact) <= sum_bound(value, magnitude, dtype)
    forward = bnbp.batch_norm_training(*flat)
    mean = Fraction(int(x.sum()), x.size)
    variance = Fraction(int((x * x).sum()), x.size) - mean * mean
    assert off(forward.batch_mean[0], mean) <= sum_bound(forward.batch_mean[0], mean, dtype, ulps=1)
    assert off(forward.batch_variance[0], variance) <= sum_bound(forward.batch_variance[0], variance, dtype, ulps=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_statistics_are_right_to_the_last_place(types, offset, layout):
    dtype, parameters = types
    rng = np.random.default_rng(7)
    x = (rng.normal(size=3000) + min(offset, float(ml_dtypes.finfo(dtype).max) / 2)).astype(dtype)
    x[0] += dtype(40)  # the shift of the first chunk is a poor guess
    got = bnbp.batch_norm_training(LAYOUTS[layout](x), np.ones(1, parameters), None)
    values = [Fraction(float(value)) for value in x]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    magnitude = sum(map(abs, values)) / len(values)
    assert off(got.batch_mean[0], mean) <= sum_bound(got.batch_mean[0], magnitude, dtype, ulps=1)
    assert off(got.batch_variance[0], variance) <= sum_bound(got.batch_variance[0], variance, dtype, ulps=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_input_delta_keeps_its_bound(case, layout, types):
    dtype, parameters = types
    x, dy, mean = hostile(case, dtype, 1000)
    gamma, variance = np.array([1.7], parameters), np.array([2.3], parameters)
    got = bnbp.batch_norm_training_backprop(
        LAYOUTS[layout](x), gamma, None, np.array([mean], parameters), variance, LAYOUTS[layout](dy), 1e-3
    ).input_delta.ravel()
    u = Fraction(eps(dtype)) / 2
    smallest = Fraction(tiny(dtype))  # below which no bound can be relative
    with mpmath.workdps(50):
        total = Fraction(float(variance[0])) + Fraction(1e-3)
        inv_std = mpmath.sqrt(mpmath.mpf(total.denominator) / total.numerator)
        scale = Fraction(*map(int, mpmath.libmp.to_rational(inv_std._mpf_))) * Fraction(float(gamma[0]))
    delta = [Fraction(float(value)) for value in dy]
    centered = [Fraction(float(value)) - Fraction(float(mean)) for value in x]
    mean_delta = sum(delta) / len(delta)
    slope = sum(d * e for d, e in zip(delta, centered, strict=True)) / len(delta) / total
    for value, d, e in zip(got, delta, centered, strict=True):
        exact = scale * (d - mean_delta - e * slope)
        if abs(exact) > Fraction(float(ml_dtypes.finfo(dtype).max)):
            assert abs(value) == np.inf
            continue
        bound = 6 * u * abs(scale) * (abs(d) + abs(mean_delta) + abs(e * slope)) + 4 * smallest
        assert abs(Fraction(float(value)) - exact) <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bits_do_not_overflow_on_the_way(layout):
    """300 over 200,000 elements: neither their sum, 6e7, nor their squares, 9e4, are numbers of float16."""
    x = np.full(200_000, 300, np.float16)
    x[::2] = -300
    shape = LAYOUTS[layout]
    forward = bnbp.batch_norm_training(shape(x), None, None)
    assert forward.batch_mean[0] == 0
    assert forward.batch_variance[0] == np.inf  # 90,000, as far as float16 is concerned
    forward = bnbp.batch_norm_training(shape(x), np.ones(1, np.float32), None)
    assert forward.batch_variance[0] == 90_000
    assert set(forward.normalized.ravel()) == {-1, 1}
    parameters = np.ones(1, np.float32), None, *forward[1:]
    got = bnbp.batch_norm_training_backprop(shape(x), *parameters, shape(x), 0.0)
    assert got.beta_delta[0] == 0
    assert got.gamma_delta[0] == 6e7
    assert (got.input_delta == 0).all()  # what normalising takes away: the gradient along the data itself


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "times"), [(2.0**100, 1), (2.0**126, 1.5)])
def test_bfloat16_sums_do_not_overflow_in_float32(layout, size, times):
    """Products of 2^200, and sums of 2^128 that come down again: float32 has no number for them, their sums do fit."""
    x = np.tile(np.array([2.0**-10, -(2.0**-10), 1, -1], ml_dtypes.bfloat16), 300)
    dy = np.repeat(np.array([1, 1, 1, -1], ml_dtypes.bfloat16), 300)
    x, dy = (x * np.float32(2.0**100)).astype(x.dtype), (dy * np.float32(size * times)).astype(dy.dtype)
    statistics = np.zeros(1, np.float32), np.full(1, 2.0**-120, np.float32)
    got = bnbp.batch_norm_training_backprop_reduce(LAYOUTS[layout](x), statistics[0], LAYOUTS[layout](dy))
    delta, product = (
        sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(dy, other, strict=True)) for other in (x * 0 + 1, x)
    )
    terms = [abs(Fraction(float(a)) * Fraction(float(b))) for a, b in zip(dy, x, strict=True)]
    assert max(terms) > 2**128  # or float32 would have done
    assert Fraction(float(got.delta_sum[0])) == delta
    assert abs(Fraction(float(got.delta_centered_sum[0])) - product) <= sum(terms) / 2**20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_sums_do_not_overflow_where_the_mean_is_huge(layout):
    x, dy = np.ones(1200, np.float16), np.tile(np.array([30000, -30000, 3, -2], np.float16), 300)
    mean = np.array([1e35], np.float32)
    got = bnbp.batch_norm_training_backprop_reduce(LAYOUTS[layout](x), mean, LAYOUTS[layout](dy))
    terms = [Fraction(float(d)) * (1 - Fraction(float(mean[0]))) for d in dy]
    assert max(terms) > 2**128
    assert abs(Fraction(float(got.delta_centered_sum[0])) - sum(terms)) <= sum(map(abs, terms)) / 2**20


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_number_is_read_and_rounded_once(half):
    """`dx = dy * scale` for every number there is, with a scale that float64 alone keeps; and ties go to even."""
    everything = np.arange(1 << 16, dtype=np.uint16).view(half)
    for scale in (1.0, 1.5, 1 / 3, 2.0**-8):
        got = bnbp.batch_norm_inference_backprop(
            everything.reshape(-1, 1), np.array([scale], np.float32), None, *np.array([[0], [1]], np.float32),
            everything.reshape(-1, 1), 0.0, output_mask=(True, False, False),
        ).input_delta.ravel()  # fmt: skip
        with np.errstate(all="ignore"):
            expected = (everything.astype(np.float32) * np.float32(scale)).astype(half)
        numbers = ~np.isnan(expected)
        assert np.array_equal(np.isnan(got), ~numbers)
        assert np.array_equal(got[numbers].view(np.uint16), expected[numbers].view(np.uint16))


@pytest.mark.parametrize(
    ("half", "exact", "expected"),
    [
        (np.float16, 2049 + 2.0**-14, 2050),
        (np.float16, -2049 + 2.0**-14, -2048),
        (np.float16, 2049.0, 2048),
        (ml_dtypes.bfloat16, 257 + 2.0**-18, 258),
        (ml_dtypes.bfloat16, -257 + 2.0**-18, -256),
        (ml_dtypes.bfloat16, 259.0, 260),
    ],
)
def test_a_float64_sum_is_rounded_to_16_bits_once(half, exact, expected):
    """Rounded to float32 in between, it would be half way between two numbers, and then be one or the other."""
    x, one = np.ones((4, 1), half), np.ones(1, half)
    sums = np.array([exact]), np.array([exact])
    got = bnbp.batch_norm_training_backprop_apply(x, one, None, one, one, x, *sums, 4, 0.0)
    assert got.beta_delta[0] == expected
    assert got.gamma_delta[0] == expected


@pytest.mark.parametrize("shape", [(40, 1), (1, 1, 40)], ids=str)
def test_an_element_computed_in_float64_is_rounded_to_16_bits_once(shape):
    """1 + 2^-8 + 2^-30, a little more than half way, times a power of two; the scale is beyond float32."""
    gamma, mean, variance = np.array([[(1 + 2.0**-8) * 2.0**127], [0], [2.0**-6 * (1 - 2.0**-20)]], np.float32)
    epsilon = 2.0**-6 / (1 + 2.0**-30) ** 2 - float(variance[0])
    delta = np.full(shape, 2.0**-60, ml_dtypes.bfloat16)
    got = bnbp.batch_norm_inference_backprop(delta, gamma, None, mean, variance, delta, epsilon).input_delta
    assert (got == ml_dtypes.bfloat16((1 + 2.0**-7) * 2.0**70)).all()
