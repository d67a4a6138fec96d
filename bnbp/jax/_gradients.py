"""The operators with their derivatives: bnbp's code on CPUs, JAX's own formula on other devices.

Each is a function with its own rule for reverse differentiation. The rule of a gradient differentiates its formula, so
a second derivative is right, but not fast.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from . import _formulas, _synchronised
from ._calls import Options, Shape, alike, call, output_types, vector

__all__ = ["inference", "inference_backprop", "training", "training_backprop"]

_TENSORS = 0b0111, 0b1111  # the outputs of a gradient, without and with that of an addend


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def training(options: Options, input: Any, gamma: Any, beta: Any, addend: Any) -> tuple[Any, Any, Any]:
    """Normalise a batch."""

    def here(input: Any, gamma: Any, beta: Any, addend: Any) -> tuple[Any, Any, Any]:
        _, dtype, _ = output_types("batch_norm_training", options, input, gamma, beta, addend)
        if options.axis_name is not None:
            return _synchronised.training(options, input, gamma, beta, addend, dtype)
        results = [Shape(input.shape, input.dtype), *[vector(input, options, dtype)] * 2]
        return tuple(call("batch_norm_training", options, (input, gamma, beta, addend), results))

    return _placed(here, partial(_formulas.training, options), input, gamma, beta, addend)  # type: ignore[no-any-return]


def _training_forward(options: Options, input: Any, gamma: Any, beta: Any, addend: Any) -> Any:
    input, gamma, beta, addend = _values(input, gamma, beta, addend)
    results = training(options, input, gamma, beta, addend)
    normalized, mean, variance = results
    kept = normalized if options.activation is not None and options.addend else None
    return results, (input, gamma, beta, mean, variance, kept)


def _training_backward(options: Options, kept: Any, deltas: Any) -> Any:
    input, gamma, beta, mean, variance, normalized = kept
    delta, *others = deltas
    input_delta, gamma_delta, beta_delta, addend_delta = _gradient(
        training_backprop, options, (input, gamma, beta, mean, variance), delta, normalized
    )
    if not all(isinstance(each, SymbolicZero) for each in others):  # the loss depends on the statistics themselves
        statistics, pull = jax.vjp(partial(_formulas.batch_statistics, options), input)
        wide = tuple(_dense(each).astype(like.dtype) for each, like in zip(others, statistics, strict=True))
        input_delta = input_delta + pull(wide)[0]
    return (
        input_delta,
        None if gamma is None else gamma_delta,
        None if beta is None else beta_delta,
        addend_delta if options.addend else None,
    )


training.defvjp(_training_forward, _training_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
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
    """The gradients. The addend's is None if it is `normalized_delta` itself."""
    here = partial(_backprop, "batch_norm_training_backprop", options)
    if options.axis_name is not None:
        here = partial(_synchronised.training_backprop, options)
    operands = input, gamma, beta, mean, variance, normalized_delta, normalized
    return _placed(here, partial(_formulas.training_backprop, options), *operands)  # type: ignore[no-any-return]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def inference(options: Options, input: Any, gamma: Any, beta: Any, mean: Any, variance: Any, addend: Any) -> Any:
    """Normalise with given statistics."""

    def here(*operands: Any) -> Any:
        return call("batch_norm_inference", options, operands, [Shape(input.shape, input.dtype)])[0]

    return _placed(here, partial(_formulas.inference, options), input, gamma, beta, mean, variance, addend)


def _inference_forward(
    options: Options, input: Any, gamma: Any, beta: Any, mean: Any, variance: Any, addend: Any
) -> Any:
    operands = _values(input, gamma, beta, mean, variance, addend)
    normalized = inference(options, *operands)
    kept = normalized if options.activation is not None and options.addend else None
    return normalized, (*operands[:5], kept)


def _inference_backward(options: Options, kept: Any, delta: Any) -> Any:
    *statistics, normalized = kept
    _, gamma, beta, mean, variance = statistics
    input_delta, gamma_delta, beta_delta, addend_delta = _gradient(
        inference_backprop, options, statistics, delta, normalized
    )
    # normalized = gamma (input - mean) / sqrt(variance + epsilon) + beta, so these two are multiples of the others.
    scale = _formulas.inv_std(options, variance)
    factor = scale if gamma is None else gamma * scale
    return (
        input_delta,
        None if gamma is None else gamma_delta,
        None if beta is None else beta_delta,
        (-factor * beta_delta).astype(mean.dtype),
        (-factor * scale * gamma_delta / 2).astype(mean.dtype),
        addend_delta if options.addend else None,
    )


inference.defvjp(_inference_forward, _inference_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def inference_backprop(
    options: Options,
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    normalized: Any,
) -> tuple[Any, ...]:
    """The gradients with constant statistics. The addend's is None if it is `normalized_delta` itself."""
    here = partial(_backprop, "batch_norm_inference_backprop", options)
    operands = input, gamma, beta, mean, variance, normalized_delta, normalized
    return _placed(here, partial(_formulas.inference_backprop, options), *operands)  # type: ignore[no-any-return]


def _second(gradient: Any, formula: Any) -> tuple[Any, Any]:
    """The rule of a gradient, which differentiates its formula."""

    def forward(options: Options, *operands: Any) -> Any:
        return gradient(options, *operands), operands

    def backward(options: Options, operands: Any, deltas: Any) -> Any:
        return jax.vjp(partial(formula, options), *operands)[1](deltas)

    return forward, backward


training_backprop.defvjp(*_second(training_backprop, _formulas.training_backprop))
inference_backprop.defvjp(*_second(inference_backprop, _formulas.inference_backprop))


def _placed(here: Any, formula: Any, *operands: Any) -> Any:
    """Run bnbp's code on CPUs and the formula elsewhere. The choice is made when the program is compiled."""
    return jax.lax.platform_dependent(*operands, cpu=here, default=formula)


def _backprop(operator: str, options: Options, *operands: Any) -> tuple[Any, ...]:
    input, _, _, mean, *_ = operands
    tensor, parameter = Shape(input.shape, input.dtype), Shape(mean.shape, mean.dtype)
    masks = options.addend and options.activation is not None
    results = [tensor, parameter, parameter, tensor][: 3 + masks]
    return *call(operator, options, operands, results, wanted=_TENSORS[masks]), *(() if masks else (None,))


def _gradient(backprop: Any, options: Options, statistics: Any, delta: Any, normalized: Any) -> tuple[Any, ...]:
    operands = alike(*statistics, _dense(delta), normalized)
    delta = operands[-2]
    input_delta, gamma_delta, beta_delta, addend_delta = backprop(options, *operands)
    return input_delta, gamma_delta, beta_delta, delta if addend_delta is None else addend_delta


def _dense(delta: Any) -> Any:
    return jnp.zeros(delta.shape, delta.dtype) if isinstance(delta, SymbolicZero) else delta


def _values(*primals: Any) -> tuple[Any, ...]:
    """The values that `symbolic_zeros` has wrapped."""
    return tuple(None if each is None else each.value for each in primals)
