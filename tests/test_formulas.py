"""The documented formulas: derived with SymPy from the forward definition, and checked by finite differences."""

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


def test_the_kernel_computes_the_derived_gradient():
    values = {**dict(zip(X, (1, -2, 3, 5), strict=True)), **dict(zip(DY, (2, 1, -1, 3), strict=True))}
    values |= {GAMMA: sympy.Rational(3, 2), BETA: 7, EPSILON: sympy.Rational(1, 4)}
    x, dy = (np.array([float(values[s]) for s in symbols])[:, None] for symbols in (X, DY))
    forward = bnbp.batch_norm_training(x, [1.5], [7.0], 0.25)
    got = bnbp.batch_norm_training_backprop(x, [1.5], [7.0], *forward[1:], dy, 0.25)
    exact = [float(sympy.diff(LOSS, symbol).subs(values).evalf(30)) for symbol in (*X, GAMMA, BETA)]
    np.testing.assert_allclose([*got.input_delta.ravel(), *got.gamma_delta, *got.beta_delta], exact, rtol=1e-14)


@pytest.mark.parametrize("module", [bnbp, reference], ids=["bnbp", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((5, 3), 1), ((2, 3, 2, 2), -1)])
def test_the_gradient_is_that_of_finite_differences(module, training, shape, axis):
    batch = make_batch(shape, axis, seed=3)
    x, gamma, beta, mean, variance, dy = batch

    def loss(x, gamma, beta):
        if training:
            y = module.batch_norm_training(x, gamma, beta, 1e-3, channel_axis=axis).normalized
        else:
            y = module.batch_norm_inference(x, gamma, beta, mean, variance, 1e-3, channel_axis=axis)
        return (y * dy).sum()

    name = "batch_norm_training_backprop" if training else "batch_norm_inference_backprop"
    got = getattr(module, name)(*batch, 1e-3, channel_axis=axis)
    for place, gradient in enumerate(got):
        assert np.abs(gradient).max() > 0.1  # there is something to find
        for index in np.ndindex(gradient.shape):
            ends = []
            for step in (1e-6, -1e-6):
                arguments = [x.copy(), gamma.copy(), beta.copy()]
                arguments[place][index] += step
                ends.append(loss(*arguments))
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient[index]) < 1e-6 * (1 + abs(gradient).max())
