"""The operators on a batch in parts, which are on the devices along a mapped axis.

Each device computes the operators' halves. Two collectives, one in the forward pass and one in the gradient, exchange
two numbers for each channel and device. The numbers are float64, and travel as bytes, because JAX has no float64 unless
it is told to. Each device merges them in the order of the devices, and rounds once. So mean, variance and sums are as
right as for a whole batch, and are bit-for-bit identical on every device. The rounded mean is subtracted.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._calls import Options, Shape, call, vector

__all__ = ["training", "training_backprop"]


def training(options: Options, input: Any, gamma: Any, beta: Any, addend: Any, dtype: str) -> tuple[Any, Any, Any]:
    """Normalise this device's part with the statistics of all parts."""
    plain = options._replace(activation=None, addend=False)
    (own,) = call("batch_norm_training_statistics", plain, [input], [_pair(options, input)])
    statistic = vector(input, options, dtype)
    count = _count(options, input)
    mean, variance = call("merge_statistics", plain, [_gathered(options, own)], [statistic] * 2, count=count)
    operands = input, gamma, beta, mean, variance, addend
    (normalized,) = call("batch_norm_inference", options, operands, [Shape(input.shape, input.dtype)])
    return normalized, mean, variance


def training_backprop(
    options: Options,
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    normalized: Any,
) -> tuple[Any, ...]:
    """The gradient of this device's part, and what this part adds to the gradients of gamma and beta."""
    operands = input, mean, normalized_delta, gamma, beta, variance, normalized
    (own,) = call("batch_norm_training_backprop_reduce", options, operands, [_pair(options, input)])
    count = _count(options, input) * jax.lax.psum(1, options.axis_name)
    tensor, parameter = Shape(input.shape, input.dtype), Shape(mean.shape, mean.dtype)

    def gradients(sums: Any, results: list[Shape], wanted: int) -> Any:
        tensors = input, gamma, beta, mean, variance, normalized_delta
        # The handler takes both sums as one operand.
        operands = *tensors, sums, None, normalized
        name = "batch_norm_training_backprop_apply"
        return call(name, options, operands, results, count=count, wanted=wanted)

    masks = options.addend and options.activation is not None
    input_delta, *addend_delta = gradients(_gathered(options, own), [tensor] * (1 + masks), 0b1001 if masks else 0b0001)
    gamma_delta, beta_delta = gradients(own, [parameter] * 2, 0b0110)
    return input_delta, gamma_delta, beta_delta, addend_delta[0] if masks else None


def _count(options: Options, input: Any) -> int:
    """The elements of a channel in this device's part, of the same size on every device."""
    channels = input.shape[options.channel_axis]
    return math.prod(input.shape) // channels  # type: ignore[no-any-return]


def _pair(options: Options, input: Any) -> Shape:
    """Two vectors of float64, as bytes."""
    return Shape((2, input.shape[options.channel_axis], 2), np.dtype(np.uint32))


def _gathered(options: Options, own: Any) -> Any:
    """The numbers of each device, in order. Each device adds zeros, except in its own place.

    This is a sum instead of an `all_gather`, so that every version of JAX knows that the result is the same on all
    devices.
    """
    size = jax.lax.psum(1, options.axis_name)
    places = jnp.arange(size).reshape(size, 1, 1, 1)
    mine = places == jax.lax.axis_index(options.axis_name)
    return jax.lax.psum(jnp.where(mine, own, jnp.zeros((), own.dtype)), options.axis_name)
