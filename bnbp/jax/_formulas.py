"""The operators in ``jax.numpy``, for other devices than CPUs and for second derivatives.

Each function is the formula of the operator reference. Sums are in float32, or in float64 for float64 tensors.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ._calls import Options

__all__ = ["batch_statistics", "inference", "inference_backprop", "inv_std", "training", "training_backprop", "wide"]


def training(options: Options, input: Any, gamma: Any, beta: Any, addend: Any) -> tuple[Any, Any, Any]:
    """Normalise with the batch's own statistics, over all devices along `axis_name`."""
    mean, variance = batch_statistics(options, input)
    dtype = _parameter_type(input, gamma, beta)
    normalized = inference(options, input, gamma, beta, mean, variance, addend)
    return normalized, mean.astype(dtype), variance.astype(dtype)


def batch_statistics(options: Options, input: Any) -> tuple[Any, Any]:
    """Mean and biased variance of each channel, before they are rounded to the parameters' type."""
    x, others = wide(input), _others(options, input)

    def average(values: Any) -> Any:
        mean = values.mean(others)
        return mean if options.axis_name is None else jax.lax.pmean(mean, options.axis_name)

    mean = average(x)
    return mean, average(jnp.square(x - _along(options, input, mean)))


def inference(options: Options, input: Any, gamma: Any, beta: Any, mean: Any, variance: Any, addend: Any) -> Any:
    """Normalise with given statistics."""
    x = wide(input)
    scale = inv_std(options, variance)
    scale = scale if gamma is None else gamma * scale
    y = (x - _along(options, input, mean)) * _along(options, input, scale)
    if beta is not None:
        y = y + _along(options, input, beta.astype(x.dtype))
    if addend is not None:
        y = y + addend.astype(x.dtype)
    if options.activation is not None:
        y = jnp.maximum(y, 0)
    if options.activation == "relu6":
        y = jnp.minimum(y, 6)
    return y.astype(input.dtype)


def training_backprop(
    options: Options,
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    normalized: Any,
) -> tuple[Any, Any, Any, Any]:
    """The gradient through the statistics of all devices. Gradients of gamma and beta are for this device's part."""
    delta, x_hat, scale = _factors(options, input, gamma, beta, mean, variance, normalized_delta, normalized)
    count = input.size // max(input.shape[options.channel_axis], 1)
    own = _sums(options, delta, x_hat)
    whole = own
    if options.axis_name is not None:
        whole = jax.lax.psum(own, options.axis_name)
        count *= jax.lax.psum(1, options.axis_name)
    delta_sum, product_sum = (_along(options, input, each) / count for each in whole)
    input_delta = scale * (delta - delta_sum - x_hat * product_sum)
    return _results(options, (input_delta, own[1], own[0], delta), input, mean)


def inference_backprop(
    options: Options,
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    normalized: Any,
) -> tuple[Any, Any, Any, Any]:
    """The gradient with statistics that are constants."""
    delta, x_hat, scale = _factors(options, input, gamma, beta, mean, variance, normalized_delta, normalized)
    delta_sum, product_sum = _sums(options, delta, x_hat)
    return _results(options, (scale * delta, product_sum, delta_sum, delta), input, mean)


def inv_std(options: Options, variance: Any) -> Any:
    """1 / sqrt(variance + epsilon), in float32 or wider."""
    variance = wide(variance)
    return 1 / jnp.sqrt(variance + jnp.asarray(options.epsilon, variance.dtype))


def wide(tensor: Any) -> Any:
    """A tensor in the type that its formula is computed in."""
    return tensor.astype(jnp.promote_types(tensor.dtype, jnp.float32))


def _factors(
    options: Options,
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    normalized: Any,
) -> tuple[Any, Any, Any]:
    """The factors of the gradients: the masked delta, the normalised input, and gamma / standard deviation."""
    delta = _masked(options, input, gamma, beta, mean, variance, normalized_delta, normalized)
    own = inv_std(options, variance)
    x_hat = (wide(input) - _along(options, input, mean)) * _along(options, input, own)
    return delta, x_hat, _along(options, input, own if gamma is None else gamma * own)


def _sums(options: Options, delta: Any, x_hat: Any) -> tuple[Any, Any]:
    others = _others(options, delta)
    return delta.sum(others), (delta * x_hat).sum(others)


def _results(options: Options, results: tuple[Any, Any, Any, Any], input: Any, mean: Any) -> tuple[Any, Any, Any, Any]:
    """The gradients in the types in which they are returned."""
    input_delta, gamma_delta, beta_delta, addend_delta = results
    return (
        input_delta.astype(input.dtype),
        gamma_delta.astype(mean.dtype),
        beta_delta.astype(mean.dtype),
        addend_delta.astype(input.dtype) if options.addend and options.activation is not None else None,
    )


def _masked(
    options: Options,
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    normalized: Any,
) -> Any:
    """The gradient that arrives, 0 where the activation is flat."""
    delta = wide(normalized_delta)
    if options.activation is None:
        return delta
    if normalized is None:
        plain = options._replace(activation=None)
        normalized = inference(plain, input, gamma, beta, mean, variance, None)
    flat = normalized <= 0
    if options.activation == "relu6":
        flat = flat | (normalized >= 6)
    return jnp.where(flat, jnp.zeros((), delta.dtype), delta)


def _parameter_type(input: Any, *parameters: Any) -> Any:
    return next((each.dtype for each in parameters if each is not None), input.dtype)


def _others(options: Options, input: Any) -> tuple[int, ...]:
    return tuple(k for k in range(input.ndim) if k != options.channel_axis % input.ndim)


def _along(options: Options, input: Any, vector: Any) -> Any:
    """A vector along the axis of the channels."""
    return jnp.expand_dims(vector, _others(options, input))
