"""The documented formulas: derived with SymPy from the forward definition, and checked by finite differences.

With an activation all of this is away from its corners, where it has no derivative.
"""

from functools import cache

import numpy as np
import pytest
import sympy
from conftest import make_batch

import bnbp
from bnbp import reference

M = 4
X = sympy.symbols(f"x:{M}", real=True)
DY = sympy.symbols(f"dy:{M}", real=True)
GAMMA, BETA = sympy.symbols("gamma beta", real=True)
EPSILON = sympy.symbols("epsilon", positive=True)

MEAN = sum(X) / M
VARIANCE = sum((x - MEAN) ** 2 for x in X) / M
INV_STD = 1 / sympy.sqrt(VARIANCE + EPSILON)
XHAT = [(x - MEAN) * INV_STD for x in X]
LOSS = sum(dy * (GAMMA * xhat + BETA) for dy, xhat in zip(DY, XHAT, strict=True))

ADDEND = sympy.symbols(f"addend:{M}", real=True)
ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: sympy.Piecewise((0, y <= 0), (y, True)),
    "relu6": lambda y: sympy.Piecewise((0, y <= 0), (6, y >= 6), (y, True)),
}

BETA_DELTA = sum(DY)
GAMMA_DELTA = sum(dy * xhat for dy, xhat in zip(DY, XHAT, strict=True))


def assert_equal(first, second):
    assert sympy.simplify(first - second) == 0


def test_the_sums_are_the_derivatives_by_beta_and_gamma():
    assert_equal(sympy.diff(LOSS, BETA), BETA_DELTA)
    assert_equal(sympy.diff(LOSS, GAMMA), GAMMA_DELTA)


@pytest.mark.parametrize("i", range(M))
def test_input_delta_is_the_derivative_by_the_input(i):
    documented = GAMMA * INV_STD * (DY[i] - BETA_DELTA / M - XHAT[i] * GAMMA_DELTA / M)
    assert_equal(sympy.diff(LOSS, X[i]), documented)


def test_the_documented_steps_lead_to_input_delta():
    """The adjoints of the operator page, one after the other, on symbols of their own."""
    centered = [x - MEAN for x in X]
    gmul = GAMMA * INV_STD
    d_gmul = sum(dy * e for dy, e in zip(DY, centered, strict=True))  # with the factor centered_i
    d_inv_std = GAMMA * d_gmul
    d_variance = -d_inv_std * INV_STD**3 / 2
    d_centered = [dy * gmul for dy in DY]
    d_mean = -sum(d_centered)  # with its minus sign; the variance's part is 0, since sum centered_i = 0
    documented = [d + 2 * e * d_variance / M + d_mean / M for d, e in zip(d_centered, centered, strict=True)]
    assert_equal(documented[0], sympy.diff(LOSS, X[0]))


def values_of(beta):
    values = {**dict(zip(X, (1, -2, 3, 5), strict=True)), **dict(zip(DY, (2, 1, -1, 3), strict=True))}
    return values | {GAMMA: sympy.Rational(3, 2), BETA: beta, EPSILON: sympy.Rational(1, 4)}


def columns(values, *tuples):
    return [np.array([float(values[symbol]) for symbol in symbols])[:, None] for symbols in tuples]


def test_the_kernel_computes_the_derived_gradient():
    values = values_of(beta=7)
    x, dy = columns(values, X, DY)
    forward = bnbp.batch_norm_training(x, [1.5], [7.0], 0.25)
    got = bnbp.batch_norm_training_backprop(x, [1.5], [7.0], *forward[1:], dy, 0.25)
    exact = [float(sympy.diff(LOSS, symbol).subs(values).evalf(30)) for symbol in (*X, GAMMA, BETA)]
    np.testing.assert_allclose([*got.input_delta.ravel(), *got.gamma_delta, *got.beta_delta], exact, rtol=1e-14)


def test_behind_an_activation_and_an_addend_the_formulas_hold_for_the_masked_gradient():
    """For any slopes: away from the corners, the activation of each element is a slope times it, plus a constant."""
    slopes, constants = sympy.symbols(f"slope:{M}", real=True), sympy.symbols(f"constant:{M}", real=True)
    totals = [GAMMA * xhat + BETA + addend for xhat, addend in zip(XHAT, ADDEND, strict=True)]
    loss = sum(dy * (s * y + c) for dy, s, y, c in zip(DY, slopes, totals, constants, strict=True))
    masked = dict(zip(DY, (s * dy for s, dy in zip(slopes, DY, strict=True)), strict=True))
    assert_equal(sympy.diff(loss, BETA), BETA_DELTA.subs(masked, simultaneous=True))
    assert_equal(sympy.diff(loss, GAMMA), GAMMA_DELTA.subs(masked, simultaneous=True))
    assert_equal(sympy.diff(loss, X[0]), sympy.diff(LOSS, X[0]).subs(masked, simultaneous=True))
    assert [sympy.diff(loss, symbol) for symbol in ADDEND] == list(masked.values())


@cache
def derived_with_activation(activation, with_addend):
    """A point, the elements there before the activation, and the derivatives by input, gamma, beta and addend."""
    values = values_of(beta=5) | dict(zip(ADDEND, (-6, 8, 3, -1) if with_addend else (0, 0, 0, 0), strict=True))
    totals = [GAMMA * xhat + BETA + addend for xhat, addend in zip(XHAT, ADDEND, strict=True)]
    loss = sum(dy * ACTIVATIONS[activation](total) for dy, total in zip(DY, totals, strict=True))
    slopes = []
    for symbol in (*X, GAMMA, BETA, *ADDEND):
        others = {other: value for other, value in values.items() if other != symbol}
        slopes.append(float(sympy.diff(loss.subs(others), symbol).subs(symbol, values[symbol]).evalf(30)))
    return values, [float(total.subs(values)) for total in totals], slopes


@pytest.mark.parametrize("module", [bnbp, reference], ids=["bnbp", "reference"])
@pytest.mark.parametrize("with_addend", [False, True], ids=["alone", "addend"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_derived_gradient_with_an_activation_is_computed(activation, with_addend, module):
    values, at_point, exact = derived_with_activation(activation, with_addend)
    x, dy, z = columns(values, X, DY, ADDEND)
    assert min(min(abs(y), abs(y - 6)) for y in at_point) > 0.05
    assert len({y > 6 for y in at_point}) == 2  # flat for relu6 here, and not flat there
    assert not with_addend or min(at_point) < 0  # and for relu

    arguments = x, [1.5], [5.0]
    options = {"activation": activation, "addend": z if with_addend else None}
    forward = module.batch_norm_training(*arguments, 0.25, **options)
    expected = [float(ACTIVATIONS[activation](y)) for y in at_point]
    np.testing.assert_allclose(forward.normalized.ravel(), expected, rtol=1e-14)

    options |= {"addend": with_addend, "normalized": forward.normalized if with_addend else None}
    outputs = module.batch_norm_training_backprop(*arguments, *forward[1:], dy, 0.25, **options)
    got = np.concatenate([output.ravel() for output in outputs])  # in the order of the derivatives
    np.testing.assert_allclose(got, exact[: len(got)], rtol=1e-13, atol=1e-14)
    assert len(got) == (10 if with_addend else 6)


@pytest.mark.parametrize("module", [bnbp, reference], ids=["bnbp", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("activation", "with_addend"),
    [(None, False), ("relu", False), ("relu6", False), (None, True), ("relu", True), ("relu6", True)],
)
@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((5, 3), 1), ((2, 3, 2, 2), -1)])
def test_the_gradient_is_that_of_finite_differences(module, training, shape, axis, activation, with_addend):
    batch = make_batch(shape, axis, seed=3)
    x, gamma, beta, mean, variance, dy = batch
    tensors = [x, gamma, beta]
    if activation:  # elements on both sides of both corners
        gamma *= 3
        beta += 2
    if with_addend:
        tensors.append(np.random.default_rng(4).normal(0, 3, shape))

    def forward(x, gamma, beta, addend=None, activation=activation):
        options = {"channel_axis": axis, "activation": activation, "addend": addend}
        if training:
            return module.batch_norm_training(x, gamma, beta, 1e-3, **options).normalized
        return module.batch_norm_inference(x, gamma, beta, mean, variance, 1e-3, **options)

    y = forward(*tensors)
    options = {"activation": activation, "addend": with_addend, "normalized": y if with_addend else None}
    if activation:
        total = forward(*tensors, activation=None)
        assert {side.item() for side in np.digitize(total, [0, 6]).flat} == {0, 1, 2}
        assert min(abs(total).min(), abs(total - 6).min()) > 1e-4

    name = "batch_norm_training_backprop" if training else "batch_norm_inference_backprop"
    got = getattr(module, name)(*batch, 1e-3, channel_axis=axis, **options)
    assert len(got) == len(tensors)
    for place, gradient in enumerate(got):
        assert np.abs(gradient).max() > 0.1  # there is something to find
        for index in np.ndindex(gradient.shape):
            ends = []
            for step in (1e-6, -1e-6):
                arguments = [tensor.copy() for tensor in tensors]
                arguments[place][index] += step
                ends.append((forward(*arguments) * dy).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient[index]) < 1e-6 * (1 + abs(gradient).max())
