"""The operators in plain NumPy: slow, readable, and the oracle of the tests.

The functions have the names, arguments and results of :mod:`bnbp`'s own, and none of its checks, options and speed.
Everything is computed and returned in float64, whatever comes in. Read them beside the mathematical definitions in
the operator reference; each line is one formula.

>>> import numpy as np
>>> from bnbp import reference
>>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
>>> normalized, batch_mean, batch_variance = reference.batch_norm_training(x, None, None, epsilon=0.5)
>>> batch_mean, batch_variance
(array([ 2., 10.]), array([1., 0.]))
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._results import BatchNormTrainingBackpropResult, BatchNormTrainingResult

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
]

Array = NDArray[np.float64]


def batch_norm_training(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> BatchNormTrainingResult:
    """Normalise a batch with its own mean and (biased) variance; see :func:`bnbp.batch_norm_training`."""
    x = np.asarray(input, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # no elements, or none that are finite: NaN
        m = x.size // x.shape[channel_axis]
        batch_mean = np.sum(x, _others(x, channel_axis)) / np.float64(m)
        centered = x - _along(batch_mean, x, channel_axis)
        # In exact arithmetic the second sum is zero; here it takes out what rounding the mean has put in.
        squares = np.sum(centered**2, _others(x, channel_axis))
        batch_variance = (squares - np.sum(centered, _others(x, channel_axis)) ** 2 / m) / np.float64(m)
    normalized = batch_norm_inference(x, gamma, beta, batch_mean, batch_variance, epsilon, channel_axis=channel_axis)
    return BatchNormTrainingResult(normalized, batch_mean, batch_variance)


def batch_norm_training_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> BatchNormTrainingBackpropResult:
    """Gradient of :func:`batch_norm_training`; see :func:`bnbp.batch_norm_training_backprop`."""
    x, dy = np.asarray(input, np.float64), np.asarray(normalized_delta, np.float64)
    scale, xhat = _scale_and_xhat(x, gamma, mean, variance, epsilon, channel_axis)
    m = x.size // x.shape[channel_axis]

    beta_delta = np.sum(dy, _others(x, channel_axis))
    gamma_delta = np.sum(dy * xhat, _others(x, channel_axis))
    if m <= 1:  # the output does not depend on the only element there is
        input_delta = np.zeros_like(x)
    else:
        delta_mean = _along(beta_delta / m, x, channel_axis)
        delta_xhat_mean = _along(gamma_delta / m, x, channel_axis)
        input_delta = scale * (dy - delta_mean - xhat * delta_xhat_mean)
    return BatchNormTrainingBackpropResult(input_delta, gamma_delta, beta_delta)


def batch_norm_inference(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Array:
    """Normalise with a given mean and variance; see :func:`bnbp.batch_norm_inference`."""
    x = np.asarray(input, np.float64)
    scale, _ = _scale_and_xhat(x, gamma, mean, variance, epsilon, channel_axis)
    normalized: Array = scale * (x - _along(mean, x, channel_axis))
    return normalized if beta is None else normalized + _along(beta, x, channel_axis)


def batch_norm_inference_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> BatchNormTrainingBackpropResult:
    """Gradient of :func:`batch_norm_inference`; see :func:`bnbp.batch_norm_inference_backprop`."""
    x, dy = np.asarray(input, np.float64), np.asarray(normalized_delta, np.float64)
    scale, xhat = _scale_and_xhat(x, gamma, mean, variance, epsilon, channel_axis)
    beta_delta = np.sum(dy, _others(x, channel_axis))
    gamma_delta = np.sum(dy * xhat, _others(x, channel_axis))
    return BatchNormTrainingBackpropResult(scale * dy, gamma_delta, beta_delta)


def _scale_and_xhat(
    x: Array, gamma: ArrayLike | None, mean: ArrayLike, variance: ArrayLike, epsilon: float, channel_axis: int
) -> tuple[Array, Array]:
    """``gamma * inv_std``, and the input normalised but not yet scaled and shifted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        inv_std = 1 / np.sqrt(_along(variance, x, channel_axis) + epsilon)
        xhat: Array = (x - _along(mean, x, channel_axis)) * inv_std
        scale = inv_std if gamma is None else _along(gamma, x, channel_axis) * inv_std
    return scale, xhat


def _others(x: Array, channel_axis: int) -> tuple[int, ...]:
    """Every axis but the channel axis."""
    return tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim)


def _along(vector: ArrayLike, x: Array, channel_axis: int) -> Array:
    """A value for each channel, shaped so that it broadcasts against ``x``."""
    shape = [1] * x.ndim
    shape[channel_axis] = x.shape[channel_axis]
    return np.asarray(vector, np.float64).reshape(shape)
