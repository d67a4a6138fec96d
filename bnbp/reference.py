"""The operators in plain NumPy: slow, readable, and the oracle of the tests.

The functions have the same names, arguments and results as the functions of :mod:`bnbp`, but not their checks or their
speed. They have all options except `out` and `num_threads`. They compute and return everything in float64, whatever the
type of the input. Read them beside the mathematical definitions in the operator reference: each line is one formula.

>>> import numpy as np
>>> from bnbp import reference
>>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
>>> normalized, batch_mean, batch_variance = reference.batch_norm_training(x, None, None, epsilon=0.5)
>>> batch_mean, batch_variance
(array([ 2., 10.]), array([1., 0.]))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._results import (
    BatchNormStatistics,
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingBackpropSums,
    BatchNormTrainingResult,
)

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
    "batch_norm_training_backprop_apply",
    "batch_norm_training_backprop_reduce",
    "batch_norm_training_statistics",
    "merge_statistics",
]

Array = NDArray[np.float64]
Activation = Literal["relu", "relu6"]
# With an addend it is a BatchNormTrainingBackpropAddendResult. That is Any here, so that nobody must ask which it is.
GradientResult = BatchNormTrainingBackpropResult[Array, Array, Array] | Any


def batch_norm_training(
    input: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    addend: ArrayLike | None = None,
    channel_axis: int = 1,
) -> BatchNormTrainingResult[Array, Array]:
    """Normalise a batch with its own mean and (biased) variance; see :func:`bnbp.batch_norm_training`."""
    batch = batch_norm_training_statistics(input, channel_axis=channel_axis)
    normalized = batch_norm_inference(
        *(input, gamma, beta, batch.mean, batch.variance, epsilon),
        activation=activation,
        addend=addend,
        channel_axis=channel_axis,
    )
    return BatchNormTrainingResult(normalized, batch.mean, batch.variance)


def batch_norm_training_statistics(input: ArrayLike, *, channel_axis: int = 1) -> BatchNormStatistics:
    """Count, mean and squared deviations of a batch; see :func:`bnbp.batch_norm_training_statistics`."""
    x = np.asarray(input, np.float64)
    m = _count(x, channel_axis)
    with np.errstate(invalid="ignore", divide="ignore"):  # no elements, or none that are finite: NaN
        mean = np.sum(x, _others(x, channel_axis)) / np.float64(m)
        centered = x - _along(mean, x, channel_axis)
        # In exact arithmetic the second sum is zero; here it takes out what rounding the mean has put in.
        squares = np.sum(centered**2, _others(x, channel_axis))
        m2 = squares - np.sum(centered, _others(x, channel_axis)) ** 2 / max(m, 1)
    return BatchNormStatistics(m, mean, m2)


def merge_statistics(*parts: BatchNormStatistics | Iterable[BatchNormStatistics]) -> BatchNormStatistics:
    """Merge the statistics of the parts of a batch; see :func:`bnbp.merge_statistics`."""
    given = [part for group in parts for part in ([group] if isinstance(group, BatchNormStatistics) else group)]
    filled = [part for part in given if part.count]
    if not filled:
        return given[0]
    count = sum(part.count for part in filled)
    first = filled[0].mean  # the others are measured from it: if all are the same, nothing is rounded
    with np.errstate(invalid="ignore"):
        mean = first + np.sum([part.count * (part.mean - first) for part in filled], axis=0) / count
        m2 = np.sum([part.m2 + part.count * (part.mean - mean) ** 2 for part in filled], axis=0)
    return BatchNormStatistics(count, mean, m2)


def batch_norm_training_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
) -> GradientResult:
    """Gradient of :func:`batch_norm_training`; see :func:`bnbp.batch_norm_training_backprop`."""
    forward = input, gamma, beta, mean, variance
    dy = _delta_before_activation(*forward, normalized_delta, epsilon, activation, normalized, channel_axis)
    sums = batch_norm_training_backprop_reduce(input, mean, dy, channel_axis=channel_axis)
    return batch_norm_training_backprop_apply(
        *(*forward, dy, *sums, _count(np.asarray(input), channel_axis), epsilon),
        addend=addend,
        channel_axis=channel_axis,
        output_mask=output_mask,
    )


def batch_norm_training_backprop_reduce(
    input: ArrayLike,
    mean: ArrayLike,
    normalized_delta: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
) -> BatchNormTrainingBackpropSums:
    """Sums that the gradient needs, over a batch or a part; see :func:`bnbp.batch_norm_training_backprop_reduce`."""
    x, forward = np.asarray(input, np.float64), (input, gamma, beta, mean, variance)
    dy = _delta_before_activation(*forward, normalized_delta, epsilon, activation, normalized, channel_axis)
    with np.errstate(invalid="ignore"):
        delta_sum = np.sum(dy, _others(x, channel_axis))
        delta_centered_sum = np.sum(dy * (x - _along(mean, x, channel_axis)), _others(x, channel_axis))
    return BatchNormTrainingBackpropSums(delta_sum, delta_centered_sum)


def batch_norm_training_backprop_apply(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    delta_sum: ArrayLike,
    delta_centered_sum: ArrayLike,
    count: int,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
) -> GradientResult:
    """Gradient from the sums of the whole batch; see :func:`bnbp.batch_norm_training_backprop_apply`."""
    x, forward = np.asarray(input, np.float64), (input, gamma, beta, mean, variance)
    dy = _delta_before_activation(*forward, normalized_delta, epsilon, activation, normalized, channel_axis)
    scale, xhat = _scale_and_xhat(x, gamma, mean, variance, epsilon, channel_axis)
    beta_delta: Array = np.asarray(delta_sum, np.float64)
    gamma_delta = _gamma_delta(delta_centered_sum, variance, epsilon)
    if count <= 1:  # the output does not depend on the only element there is
        input_delta = np.zeros_like(x)
    else:
        delta_mean = _along(beta_delta / count, x, channel_axis)
        delta_xhat_mean = _along(gamma_delta / count, x, channel_axis)
        input_delta = scale * (dy - delta_mean - xhat * delta_xhat_mean)
    return _results(output_mask, input_delta, gamma_delta, beta_delta, *([dy] if addend else []))


def batch_norm_inference(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    addend: ArrayLike | None = None,
    channel_axis: int = 1,
) -> Array:
    """Normalise with a given mean and variance; see :func:`bnbp.batch_norm_inference`."""
    x = np.asarray(input, np.float64)
    scale, _ = _scale_and_xhat(x, gamma, mean, variance, epsilon, channel_axis)
    normalized: Array = scale * (x - _along(mean, x, channel_axis))
    if beta is not None:
        normalized = normalized + _along(beta, x, channel_axis)
    if addend is not None:
        normalized = normalized + np.asarray(addend, np.float64)
    return _activated(normalized, activation)


def batch_norm_inference_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
) -> GradientResult:
    """Gradient of :func:`batch_norm_inference`; see :func:`bnbp.batch_norm_inference_backprop`."""
    x, forward = np.asarray(input, np.float64), (input, gamma, beta, mean, variance)
    dy = _delta_before_activation(*forward, normalized_delta, epsilon, activation, normalized, channel_axis)
    scale, _ = _scale_and_xhat(x, gamma, mean, variance, epsilon, channel_axis)
    beta_delta, delta_centered_sum = batch_norm_training_backprop_reduce(x, mean, dy, channel_axis=channel_axis)
    gamma_delta = _gamma_delta(delta_centered_sum, variance, epsilon)
    return _results(output_mask, scale * dy, gamma_delta, beta_delta, *([dy] if addend else []))


def _activated(y: Array, activation: Activation | None) -> Array:
    """The activation of each element. Comparisons leave NaN and -0.0 as they are."""
    if activation is not None:
        y = np.where(y < 0, 0.0, y)
    return np.where(y > 6, 6.0, y) if activation == "relu6" else y


def _delta_before_activation(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike | None,
    normalized_delta: ArrayLike,
    epsilon: float,
    activation: Activation | None,
    normalized: ArrayLike | None,
    channel_axis: int,
) -> Array:
    """The gradient with respect to the input of the activation: 0 where the activation is flat."""
    dy = np.array(normalized_delta, np.float64)
    if activation is None:
        return dy
    if normalized is None:
        assert variance is not None, "variance: expected an array, because normalized is not given, got None"
        normalized = batch_norm_inference(input, gamma, beta, mean, variance, epsilon, channel_axis=channel_axis)
    y = np.asarray(normalized, np.float64)
    flat = (y <= 0) | (y >= 6) if activation == "relu6" else y <= 0  # not where y is NaN
    return np.where(flat, 0.0, dy)


def _results(output_mask: Sequence[bool] | None, *outputs: Array) -> GradientResult:
    """The outputs that are asked for, and None for the others."""
    mask = [True] * len(outputs) if output_mask is None else output_mask
    results: Any = [output if wanted else None for output, wanted in zip(outputs, mask, strict=True)]
    named = BatchNormTrainingBackpropAddendResult if len(outputs) == 4 else BatchNormTrainingBackpropResult
    return named(*results)


def _gamma_delta(delta_centered_sum: ArrayLike, variance: ArrayLike, epsilon: float) -> Array:
    with np.errstate(invalid="ignore"):
        gamma_delta: Array = np.asarray(delta_centered_sum, np.float64) * _inv_std(variance, epsilon)
    return gamma_delta


def _inv_std(variance: ArrayLike, epsilon: float) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        inv_std: Array = 1 / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    return inv_std


def _scale_and_xhat(
    x: Array, gamma: ArrayLike | None, mean: ArrayLike, variance: ArrayLike, epsilon: float, channel_axis: int
) -> tuple[Array, Array]:
    """``gamma * inv_std``, and the input normalised but not yet scaled and shifted."""
    inv_std = _along(_inv_std(variance, epsilon), x, channel_axis)
    with np.errstate(invalid="ignore"):
        xhat: Array = (x - _along(mean, x, channel_axis)) * inv_std
        scale = inv_std if gamma is None else _along(gamma, x, channel_axis) * inv_std
    return scale, xhat


def _count(x: NDArray[Any], channel_axis: int) -> int:
    """Elements of a channel: the product of every axis but the channel axis."""
    return x.size // int(x.shape[channel_axis])


def _others(x: Array, channel_axis: int) -> tuple[int, ...]:
    """Every axis but the channel axis."""
    return tuple(axis for axis in range(x.ndim) if axis != channel_axis % x.ndim)


def _along(vector: ArrayLike, x: Array, channel_axis: int) -> Array:
    """A value for each channel, shaped so that it broadcasts against ``x``."""
    shape = [1] * x.ndim
    shape[channel_axis] = x.shape[channel_axis]
    return np.asarray(vector, np.float64).reshape(shape)
