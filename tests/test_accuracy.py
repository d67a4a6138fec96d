"""The accuracy contract on hostile data, against exact sums.

``gamma_delta`` and ``beta_delta`` are within 1 unit in the last place of the exact value for float32 and within 4 for
float64 wherever the sum's condition number is below 2^20, whatever the number of elements.
"""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

import bnbp

ULPS = {np.float32: 1, np.float64: 4}
LAYOUTS = {
    "one run": lambda v: v.reshape(1, 1, -1),
    "rows": lambda v: v.reshape(-1, 1),
    "planes": lambda v: v.reshape(-1, 1, 50),
}


def ulps_off(value, exact: Fraction) -> float:
    unit = (
        Fraction(float(np.spacing(abs(value)))) if value else Fraction(float(np.finfo(value.dtype).smallest_subnormal))
    )
    return float(abs(Fraction(float(value)) - exact) / unit)


def condition(terms) -> float:
    total = sum(terms)
    return float(sum(map(abs, terms)) / abs(total)) if total else np.inf


def cancelling(rng, dtype, n, bits):
    """Values that cancel in pairs but for one, which is about 2^-bits of the sum of their sizes."""
    half = rng.normal(size=n // 2).astype(dtype)
    values = np.concatenate([half, -half])
    values[0] += dtype(np.abs(values).sum() * 2.0**-bits)
    return values[rng.permutation(n)]


def hostile(case, dtype, n):
    """x, dy and mean of one channel."""
    rng = np.random.default_rng(5)
    x, dy, mean = rng.normal(size=n), rng.normal(0.1, 1, size=n), 0.0
    if case == "a mean of a million":
        x, mean = x + 1e6, 1e6
    elif case == "cancelling sums":
        dy = cancelling(rng, dtype, n, 18)
    elif case == "magnitudes from 1e-30 to 1e30":
        x, dy = x * 10.0 ** rng.uniform(-15, 15, n), dy * 10.0 ** rng.uniform(-15, 15, n)
    elif case == "subnormal deltas":
        dy = dy * np.finfo(dtype).smallest_normal / 8
    elif case == "large and small by turns":
        x[::2] *= 1e10
        dy[::2] *= 1e-10
    return x.astype(dtype), dy.astype(dtype), dtype(mean)


CASES = [
    "nothing special",
    "a mean of a million",
    "cancelling sums",
    "magnitudes from 1e-30 to 1e30",
    "subnormal deltas",
    "large and small by turns",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ULPS)
def test_sums_are_right_to_the_last_place(case, layout, dtype):
    x, dy, mean = hostile(case, dtype, 3000)
    # A variance and epsilon whose inverse root is a power of two, so that gamma_delta is an exact fraction as well.
    got = bnbp.batch_norm_training_backprop(
        LAYOUTS[layout](x), None, None, np.array([mean]), np.array([3.75], dtype), LAYOUTS[layout](dy), 0.25
    )
    delta = [Fraction(float(value)) for value in dy]
    product = [d * (Fraction(float(value)) - Fraction(float(mean))) / 2 for d, value in zip(delta, x, strict=True)]
    for value, terms in ((got.beta_delta[0], delta), (got.gamma_delta[0], product)):
        assert condition(terms) < 2**20
        if terms is product and case == "subnormal deltas" and dtype == np.float64:
            # Each product is below the normal numbers, and loses up to half of the smallest one there is.
            assert abs(Fraction(float(value)) - sum(terms)) <= len(terms) * Fraction(5e-324) / 2
        else:
            assert ulps_off(value, sum(terms)) <= ULPS[dtype]
    if case == "cancelling sums":
        assert condition(delta) > 2**16  # it does cancel


@pytest.mark.parametrize("dtype", ULPS)
def test_ten_million_elements_a_channel(dtype):
    rng = np.random.default_rng(6)
    # Whole numbers, so that int64 sums are exact. The mean is far from zero, and float32 sums would stop growing.
    x, dy = rng.integers(900, 1100, 10_000_000), rng.integers(-3, 5, 10_000_000)
    got = bnbp.batch_norm_training_backprop(
        x.astype(dtype).reshape(1, 1, -1), None, None, np.array([1000], dtype), np.array([3.75], dtype),
        dy.astype(dtype).reshape(1, 1, -1), 0.25,
    )  # fmt: skip
    assert ulps_off(got.beta_delta[0], Fraction(int(dy.sum()))) <= ULPS[dtype]
    assert ulps_off(got.gamma_delta[0], Fraction(int((dy * (x - 1000)).sum()), 2)) <= ULPS[dtype]
    forward = bnbp.batch_norm_training(x.astype(dtype).reshape(1, 1, -1), None, None)
    mean = Fraction(int(x.sum()), x.size)
    variance = Fraction(int((x * x).sum()), x.size) - mean * mean
    assert ulps_off(forward.batch_mean[0], mean) <= 1
    assert ulps_off(forward.batch_variance[0], variance) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", ULPS)
def test_statistics_are_right_to_the_last_place(dtype, offset, layout):
    rng = np.random.default_rng(7)
    x = (rng.normal(size=3000) + offset).astype(dtype)
    x[0] += 40  # the shift of the first chunk is a poor guess
    got = bnbp.batch_norm_training(LAYOUTS[layout](x), None, None)
    values = [Fraction(float(value)) for value in x]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert ulps_off(got.batch_mean[0], mean) <= 1
    assert ulps_off(got.batch_variance[0], variance) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ULPS)
def test_input_delta_keeps_its_bound(case, layout, dtype):
    x, dy, mean = hostile(case, dtype, 1000)
    gamma, variance = np.array([1.7], dtype), np.array([2.3], dtype)
    got = bnbp.batch_norm_training_backprop(
        LAYOUTS[layout](x), gamma, None, np.array([mean]), variance, LAYOUTS[layout](dy), 1e-3
    ).input_delta.ravel()
    u = Fraction(float(np.finfo(dtype).eps)) / 2
    tiny = Fraction(float(np.finfo(dtype).smallest_subnormal))  # below which no bound can be relative
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
        if abs(exact) > Fraction(float(np.finfo(dtype).max)):
            assert abs(value) == np.inf
            continue
        bound = 6 * u * abs(scale) * (abs(d) + abs(mean_delta) + abs(e * slope)) + 4 * tiny
        assert abs(Fraction(float(value)) - exact) <= bound
