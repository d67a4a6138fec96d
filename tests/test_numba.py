"""Numba callers: the example of the page calls a kernel from compiled code, and checks what the kernel does not."""

import runpy

import numba
import numpy as np
import pytest
from building import EXAMPLES

import bnbp
from bnbp import kernels, reference


@pytest.fixture(scope="module")
def gradient():
    return runpy.run_path(str(EXAMPLES / "numba_gradient.py"))["gradient"]


def batch():
    rng = np.random.default_rng(15)
    x, dy = rng.normal(3, 2, (5, 3, 4)), rng.normal(1, 1, (5, 3, 4))
    return x, np.array([1.5, -2.0, 0.5]), x.mean((0, 2)), x.var((0, 2)), dy


def test_the_example_for_numba_is_the_reference(gradient):
    x, gamma, mean, variance, dy = batch()
    expected = reference.batch_norm_training_backprop(x, gamma, None, mean, variance, dy, 0.5)
    assert np.ptp(expected.input_delta) > 1
    for got, exact in zip(gradient(x, gamma, mean, variance, dy, 0.5), expected, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-12)


def test_compiled_code_calls_the_example(gradient):
    @numba.njit
    def length(x, gamma, mean, variance, dy):
        dx, dgamma, _ = gradient(x, gamma, mean, variance, dy, 0.5)
        return (dx * dx).sum() + (dgamma * dgamma).sum()

    x, *others = batch()
    expected = reference.batch_norm_training_backprop(x, others[0], None, *others[1:], 0.5)
    exact = (expected.input_delta**2).sum() + (expected.gamma_delta**2).sum()
    assert length(x, *others) == pytest.approx(exact, rel=1e-12)


def test_a_batch_without_elements(gradient):
    _, gamma, mean, variance, _ = batch()
    empty = np.empty((5, 3, 0))
    dx, dgamma, dbeta = gradient(empty, gamma, mean, variance, empty, 0.5)
    assert dx.shape == (5, 3, 0)
    assert dgamma.tolist() == dbeta.tolist() == [0, 0, 0]


def test_the_example_refuses_what_the_kernel_would_believe(gradient):
    x, gamma, mean, variance, dy = batch()
    for arguments in (
        (x, gamma[:2], mean, variance, dy, 0.5),
        (x, gamma, mean[:2], variance, dy, 0.5),
        (x, gamma, mean, variance[:2], dy, 0.5),
        (x, gamma, mean, variance, dy[:4], 0.5),
        (x[:, :0].copy(), gamma[:0], mean[:0], variance[:0], dy[:, :0].copy(), 0.5),
    ):
        with pytest.raises(ValueError, match=r"^expected x and dy of one shape"):
            gradient(*arguments)
    for epsilon in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^epsilon: expected"):
            gradient(x, gamma, mean, variance, dy, epsilon)
    for others in ((x.astype(np.float32), dy), (x[:, :, ::2], dy), (np.asfortranarray(x), dy), (x[0], dy)):
        with pytest.raises(TypeError, match="No matching definition"):
            gradient(others[0], gamma, mean, variance, others[1], 0.5)


@pytest.mark.parametrize("name", ["training", "training_backprop", "inference", "inference_backprop"])
def test_each_kernel_is_the_one_of_its_name(name):
    x, gamma, mean, variance, dy = batch()
    function = getattr(bnbp, f"batch_norm_{name}")
    inputs = (x, gamma, None) if name == "training" else (x, gamma, None, mean, variance)
    backward = "backprop" in name
    expected = function(*inputs, *([dy] if backward else []), epsilon=0.5)
    expected = (expected,) if name == "inference" else expected
    results = (
        ["input_delta", "gamma_delta", "beta_delta"] if backward else ["normalized", "batch_mean", "batch_variance"]
    )[: len(expected)]
    arguments = np.zeros(1, kernels.ARGUMENTS)
    arguments["type"] = arguments["parameter_type"] = kernels.F64
    arguments["n"], arguments["c"], arguments["s"] = x.shape
    arguments["count"], arguments["epsilon"] = 20, 0.5
    outputs = [np.empty_like(result) for result in expected]
    for operand, array in {
        "input": x, "gamma": gamma, "mean": mean, "variance": variance, "normalized_delta": dy,
        **dict(zip(results, outputs, strict=True)),
    }.items():  # fmt: skip
        arguments[operand] = array.ctypes.data
    assert getattr(kernels, name)(arguments.ctypes.data) == kernels.OK
    for got, same in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(got, same)
