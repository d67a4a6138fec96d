"""The operators: what each promises, and the checks, which run when a function is traced."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import partial
from typing import Any, Literal

import jax

from bnbp._results import (
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingResult,
)
from bnbp.engine.boundary import integer_of, text_of

from . import _gradients
from ._calls import Options, alike, check

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
]

Activation = Literal["relu", "relu6"]
GradientResult = BatchNormTrainingBackpropResult | BatchNormTrainingBackpropAddendResult


def batch_norm_training(
    input: jax.Array,
    gamma: jax.Array | None = None,
    beta: jax.Array | None = None,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
    axis_name: Hashable = None,
    activation: Activation | None = None,
    addend: jax.Array | None = None,
) -> BatchNormTrainingResult:
    r"""Normalise each channel with its own mean and variance, then scale and shift it: in JAX.

    Parameters
    ----------
    input : array, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch. At least two axes; the channels, at least one, are on ``channel_axis``.
    gamma, beta : array, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale and shift of each channel. None stands for ones and zeros. Both have one type, the parameters' type.
    epsilon : float, default 1e-5
        Added to the variance before the square root; finite and not negative. `epsilon` and the options after it,
        except `addend`, are constants of the compiled program.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. Pass -1 for channels-last.
    axis_name : hashable or tuple of hashables, optional
        The mapped axis, of ``jax.shard_map``, ``jax.pmap`` or ``jax.vmap``, over which the batch is spread. Each device
        has a part of the same shape, and mean and variance are computed from the whole batch.
    activation : {None, "relu", "relu6"}, default None
        What is applied to the result. NaN stays NaN.
    addend : array, shape and type of `input`, optional
        A tensor that is added before the activation.

    Returns
    -------
    BatchNormTrainingResult
        Named tuple of ``normalized`` (shape and type of `input`), ``batch_mean`` and ``batch_variance`` (shape (C,),
        the parameters' type; the biased variance). With `axis_name` the last two are the same on every device.

    Raises
    ------
    TypeError
        If an argument is not an array, an element type is not accepted, or the types of two do not match.
    ValueError
        If a shape, `epsilon`, `activation` or `channel_axis` is not acceptable. All checks run when the function is
        traced.

    See Also
    --------
    bnbp.batch_norm_training : The same for NumPy arrays, with the formulas and the numerical notes.

    Notes
    -----
    The function works under ``jit``, ``grad``, ``vmap``, ``checkpoint`` and in ``scan``. All three results may be
    differentiated, also twice, in reverse mode.

    With `axis_name`, the gradient is the gradient of the same formula written with ``jax.lax.pmean``. `input` gets the
    gradient through the statistics of the whole batch. `gamma` and `beta` get the gradient of the device's own part.
    ``jax.shard_map`` adds these up over the devices where `gamma` and `beta` are the same on all. Under ``jax.pmap``,
    add them up with ``jax.lax.psum``.

    On other devices than CPUs, the formula runs in ``jax.numpy``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, bnbp.jax
    >>> x = jnp.array([[1.0], [2.0], [3.0], [6.0]])
    >>> result = bnbp.jax.batch_norm_training(x, jnp.array([2.0]), epsilon=0.5)
    >>> result.normalized.ravel().tolist(), result.batch_variance.tolist()
    ([-2.0, -1.0, 0.0, 3.0], [3.5])
    >>> delta = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    >>> loss = lambda x: (delta * bnbp.jax.batch_norm_training(x, jnp.array([2.0]), epsilon=0.5).normalized).sum()
    >>> jax.grad(loss)(x).ravel().tolist()
    [0.625, -0.4375, -0.5, 0.3125]
    """
    options = _options(epsilon, channel_axis, activation, addend is not None, axis_name)
    return _training(input, gamma, beta, addend, options=options)  # type: ignore[no-any-return]


def batch_norm_training_backprop(
    input: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    normalized_delta: jax.Array,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
    axis_name: Hashable = None,
    activation: Activation | None = None,
    normalized: jax.Array | None = None,
    addend: bool = False,
) -> GradientResult:
    r"""Gradient of :func:`batch_norm_training`, for a backward pass that you write yourself.

    Parameters
    ----------
    input : array, float16, bfloat16, float32 or float64, shape (N, C, ...)
        What :func:`batch_norm_training` was given.
    gamma, beta : array, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale and shift of each channel. None stands for ones and zeros. `beta` only influences where an activation is
        flat.
    mean, variance : array, shape (C,), the parameters' type
        The batch's own mean and biased variance, as :func:`batch_norm_training` returned them.
    normalized_delta : array, shape and type of `input`
        Gradient of the loss with respect to the normalised output.
    epsilon : float, default 1e-5
        As in the forward operator; finite and not negative.
    channel_axis : int, default 1
        The axis of the channels; negative values count from the end. Pass -1 for channels-last.
    axis_name : hashable or tuple of hashables, optional
        As in the forward operator.
    activation : {None, "relu", "relu6"}, default None
        What the forward operator applied.
    normalized : array, shape and type of `input`, optional
        The forward operator's output. It is required with both an activation and an addend.
    addend : bool, default False
        Whether the forward operator had an addend. Its gradient, ``addend_delta``, is then the fourth output.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple of ``input_delta`` (shape and type of `input`), ``gamma_delta`` and ``beta_delta`` (shape (C,), the
        parameters' type). With `addend` it is a BatchNormTrainingBackpropAddendResult, which has ``addend_delta`` too.
        With `axis_name`, ``gamma_delta`` and ``beta_delta`` are the gradients of the device's own part. Their sums over
        the devices, as by ``jax.lax.psum``, are the gradients of the whole batch.

    Raises
    ------
    TypeError
        If an argument is not an array, an element type is not accepted, or the types of two do not match.
    ValueError
        If a shape, `epsilon`, `activation` or `channel_axis` is not acceptable, or `normalized` is missing.

    See Also
    --------
    bnbp.batch_norm_training_backprop : The same for NumPy arrays, with the formulas and the numerical notes.

    Examples
    --------
    >>> import jax.numpy as jnp, bnbp.jax
    >>> x, gamma = jnp.array([[1.0], [2.0], [3.0], [6.0]]), jnp.array([2.0])
    >>> _, mean, variance = bnbp.jax.batch_norm_training(x, gamma, epsilon=0.5)
    >>> delta = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    >>> backward = bnbp.jax.batch_norm_training_backprop(x, gamma, None, mean, variance, delta, epsilon=0.5)
    >>> backward.input_delta.ravel().tolist(), backward.gamma_delta.tolist(), backward.beta_delta.tolist()
    ([0.625, -0.4375, -0.5, 0.3125], [0.5], [2.0])
    """
    options = _options(epsilon, channel_axis, activation, addend, axis_name)
    operands = input, gamma, beta, mean, variance, normalized_delta, normalized
    return _training_backprop(*operands, options=options)  # type: ignore[no-any-return]


def batch_norm_inference(
    input: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: Activation | None = None,
    addend: jax.Array | None = None,
) -> jax.Array:
    r"""Normalise each channel with a given mean and variance, such as running averages: in JAX.

    Parameters
    ----------
    input : array, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch. At least two axes; the channels, at least one, are on ``channel_axis``.
    gamma, beta : array, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        Scale and shift of each channel. None stands for ones and zeros.
    mean, variance : array, shape (C,), the type of `gamma` and `beta`
        The mean and variance to normalise with.
    epsilon, channel_axis, activation, addend
        As in :func:`batch_norm_training`.

    Returns
    -------
    array, shape and type of `input`
        ``normalized``.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training`.

    Notes
    -----
    The result can be differentiated with respect to every array, `mean` and `variance` too, and twice.

    Examples
    --------
    >>> import jax.numpy as jnp, bnbp.jax
    >>> x, mean, variance = jnp.array([[1.0], [5.0]]), jnp.array([3.0]), jnp.array([3.5])
    >>> bnbp.jax.batch_norm_inference(x, jnp.array([2.0]), None, mean, variance, epsilon=0.5).ravel().tolist()
    [-2.0, 2.0]
    """
    options = _options(epsilon, channel_axis, activation, addend is not None)
    return _inference(input, gamma, beta, mean, variance, addend, options=options)  # type: ignore[no-any-return]


def batch_norm_inference_backprop(
    input: jax.Array,
    gamma: jax.Array | None,
    beta: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    normalized_delta: jax.Array,
    epsilon: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: Activation | None = None,
    normalized: jax.Array | None = None,
    addend: bool = False,
) -> GradientResult:
    r"""Gradient of :func:`batch_norm_inference`, with `mean` and `variance` as constants.

    Parameters
    ----------
    input, gamma, beta, mean, variance, normalized_delta, epsilon, channel_axis, activation, normalized, addend
        As in :func:`batch_norm_training_backprop`, with the mean and variance that :func:`batch_norm_inference` was
        given.

    Returns
    -------
    BatchNormTrainingBackpropResult
        As in :func:`batch_norm_training_backprop`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training_backprop`.

    Examples
    --------
    >>> import jax.numpy as jnp, bnbp.jax
    >>> x, mean, variance = jnp.array([[1.0], [5.0]]), jnp.array([3.0]), jnp.array([3.5])
    >>> delta = jnp.array([[1.0], [3.0]])
    >>> backward = bnbp.jax.batch_norm_inference_backprop(x, None, None, mean, variance, delta, epsilon=0.5)
    >>> backward.input_delta.ravel().tolist(), backward.gamma_delta.tolist(), backward.beta_delta.tolist()
    ([0.5, 1.5], [2.0], [4.0])
    """
    options = _options(epsilon, channel_axis, activation, addend)
    operands = input, gamma, beta, mean, variance, normalized_delta, normalized
    return _inference_backprop(*operands, options=options)  # type: ignore[no-any-return]


def _options(
    epsilon: object, channel_axis: object, activation: object, addend: object, axis_name: Hashable = None
) -> Options:
    """The attributes, as constants."""
    if activation is not None and not (isinstance(activation, str) and activation in ("relu", "relu6")):
        error = ValueError if isinstance(activation, str) else TypeError
        raise error(f'activation: expected None, "relu" or "relu6", got {text_of(activation)}')
    if type(epsilon) is not float:
        try:
            epsilon = math.ldexp(epsilon, 0)  # type: ignore[arg-type]  # unlike float(), it takes no text
        except Exception as error:
            got = (
                "a value that is not known when the function is traced"
                if isinstance(epsilon, jax.core.Tracer)
                else (text_of(epsilon))
            )
            kind = TypeError if type(error) is TypeError else ValueError
            raise kind(f"epsilon: expected a finite number >= 0, got {got}") from error
    if type(channel_axis) is not int:
        channel_axis = integer_of("channel_axis", channel_axis)
    if type(addend) is not bool:
        addend = integer_of("addend", addend, expected="a bool") != 0
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    return Options(epsilon, max(-(2**31), min(channel_axis, 2**31 - 1)), activation, addend, axis_name)


# Outside of jit, each is compiled on its own. Inside, it is part of the caller's program.
_compiled = partial(jax.jit, static_argnames=("options",), inline=True)


@_compiled
def _training(input: Any, gamma: Any, beta: Any, addend: Any, *, options: Options) -> BatchNormTrainingResult:
    check("batch_norm_training", options, input, gamma, beta, addend)
    operands = alike(input, gamma, beta, addend)
    return BatchNormTrainingResult(*_gradients.training(options, *operands))


@_compiled
def _training_backprop(*operands: Any, options: Options) -> GradientResult:
    check("batch_norm_training_backprop", options, *operands)
    return _result(_gradients.training_backprop, options, *alike(*operands))


@_compiled
def _inference(
    input: Any, gamma: Any, beta: Any, mean: Any, variance: Any, addend: Any, *, options: Options
) -> jax.Array:
    operands = input, gamma, beta, mean, variance, addend
    check("batch_norm_inference", options, *operands)
    return _gradients.inference(options, *alike(*operands))  # type: ignore[no-any-return]


@_compiled
def _inference_backprop(*operands: Any, options: Options) -> GradientResult:
    check("batch_norm_inference_backprop", options, *operands)
    return _result(_gradients.inference_backprop, options, *alike(*operands))


def _result(backprop: Any, options: Options, *operands: Any) -> GradientResult:
    input_delta, gamma_delta, beta_delta, addend_delta = backprop(options, *operands)
    if not options.addend:
        return BatchNormTrainingBackpropResult(input_delta, gamma_delta, beta_delta)
    delta = operands[5] if addend_delta is None else addend_delta
    return BatchNormTrainingBackpropAddendResult(input_delta, gamma_delta, beta_delta, delta)
