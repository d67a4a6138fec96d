"""The operators on dask arrays: what each promises, and the graph that it builds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import dask.array
import numpy as np
from dask.base import tokenize

from bnbp._results import (
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingResult,
)

from . import _blocks as blocks
from ._again import WHOLE, again
from ._arguments import Arguments, arguments

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
]

Activation = Literal["relu", "relu6"]

da: Any = dask.array  # whose functions have no type hints
GradientResult = BatchNormTrainingBackpropResult | BatchNormTrainingBackpropAddendResult


def batch_norm_training(
    input: Any,
    gamma: Any = None,
    beta: Any = None,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    addend: Any = None,
    channel_axis: int = 1,
    reproducible: bool = True,
    recompute: bool = True,
    num_threads: int | None = 1,
) -> BatchNormTrainingResult:
    """Normalise each channel with its own mean and variance: :func:`bnbp.batch_norm_training`, lazily.

    Parameters
    ----------
    input : dask array, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch, in chunks of any shape. The channels may be in chunks too, and sizes may be unknown.
    gamma, beta : dask array or array_like, shape (C,), type of `input` or, if that has 16 bits, float32; or None
        As in :func:`bnbp.batch_norm_training`.
    epsilon, activation, channel_axis
        Likewise.
    addend : dask array or array_like, shape and type of `input`, optional
        Likewise. It is rechunked to the chunks of `input`.
    reproducible : bool, default True
        Whether the results are bit-for-bit identical however whole samples are spread over chunks.
    recompute : bool, default True
        Whether the second pass computes the chunks of `input` again, instead of keeping all of them from the first
        pass.
    num_threads : int or None, default 1
        Threads of one task. Dask runs as many tasks at once as it has threads, so each task has a CPU already. None
        stands for the default of :func:`bnbp.batch_norm_training`.

    Returns
    -------
    BatchNormTrainingResult
        Named tuple of dask arrays: ``normalized``, with the chunks of `input`, and ``batch_mean`` and
        ``batch_variance``, with the chunks of its channels.

    Raises
    ------
    TypeError
        If `input` is not a dask array, or as :func:`bnbp.batch_norm_training`. All that is known of the arguments is
        checked before anything is computed.
    ValueError
        If chunks do not fit and their sizes are unknown, or as :func:`bnbp.batch_norm_training`.

    Notes
    -----
    A task for each chunk computes its statistics. A tree of tasks merges them in the order of the chunks, and a task
    for each chunk normalises it. So every chunk is needed twice.

    With `recompute`, the tasks that make a chunk run twice. A chunk of a zarr array is read twice, and memory holds no
    more chunks than are worked on. Persisted arrays are not computed again, and not copied. Without `recompute`, Dask
    keeps all the chunks of `input` from the first pass to the second one. That is right for an `input` that fits in
    memory and takes long to compute. In a chain of batch norms, each batch norm computes all earlier ones again, except
    for their statistics. Persist or store the results in between.

    A sample is an index of the batch axis: axis 0, or axis 1 if the channels are on axis 0. With `reproducible`, each
    sample is summed in an order that depends on its shape alone, and the samples' sums are added exactly: see
    :mod:`bnbp.exact`. Chunks along the channels do not change the bits either, if the channels are on axis 0 or 1. They
    do if axes lie between the batch and the channels, as in channels-last. Chunks that divide samples keep the promised
    accuracy, but not the bits. Without `reproducible`, the same chunks give the same bits on any scheduler.

    With `reproducible`, a chunk is copied for the sums if its axes are in another order in memory than in its shape, as
    in a transposed array. Pass ``channel_axis=-1`` rather than a transposed array.

    The tasks that make `input` must give the same values each time they run, as Dask expects of all tasks.

    Examples
    --------
    >>> import dask.array as da, bnbp.dask
    >>> x = da.arange(24.0, chunks=24).reshape(4, 2, 3).rechunk((2, 2, 3))
    >>> result = bnbp.dask.batch_norm_training(x, gamma=[1.0, 2.0])
    >>> result.normalized.chunks
    ((2, 2), (2,), (3,))
    >>> result.batch_mean.compute()
    array([10., 13.])
    """
    given = {"input": input, "gamma": gamma, "beta": beta, "addend": addend}
    options: dict[str, Any] = {"activation": activation, "num_threads": num_threads}
    args = arguments("training", given, epsilon, channel_axis, **options)
    x, gamma, beta, addend = args.operands.values()
    passes = _Passes(args, recompute)
    (first,) = passes.again("statistics", [x])
    whole = _reduce(
        args, blocks.statistics, first, axis=args.axis, reproducible=bool(reproducible), num_threads=num_threads
    )
    second, addend = passes.again("normalize", [x], [addend])
    options |= {"epsilon": float(epsilon), "parameter_type": args.dtype, "axis": args.axis}
    operands = second, whole, gamma, beta, addend
    normalized = _elements(args, "bnbp-normalized", blocks.normalize_batch, *operands, **options)
    mean, variance = (
        _channels(
            args, f"bnbp-{name}", blocks.batch_vector, whole, k=k, epsilon=float(epsilon), parameter_type=args.dtype
        )
        for k, name in enumerate(("batch_mean", "batch_variance"))
    )
    return BatchNormTrainingResult(normalized, mean, variance)


def batch_norm_training_backprop(
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    normalized: Any = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
    reproducible: bool = True,
    recompute: bool = True,
    num_threads: int | None = 1,
) -> GradientResult:
    """Gradient of :func:`batch_norm_training`: :func:`bnbp.batch_norm_training_backprop`, lazily.

    Parameters
    ----------
    input : dask array, float16, bfloat16, float32 or float64, shape (N, C, ...)
        What :func:`batch_norm_training` was given; in chunks of any shape.
    gamma, beta : dask array or array_like, shape (C,), the parameters' type; or None
        As in :func:`bnbp.batch_norm_training_backprop`.
    mean, variance : dask array or array_like, shape (C,), the parameters' type
        The batch's own, as :func:`batch_norm_training` returned them, computed or not.
    normalized_delta : dask array or array_like, shape and type of `input`
        Gradient of the loss with respect to the normalised output. It is rechunked to the chunks of `input`.
    normalized : dask array or array_like, shape and type of `input`, optional
        The forward operator's output, as in :func:`bnbp.batch_norm_training_backprop`; rechunked likewise.
    epsilon, activation, addend, channel_axis, output_mask
        As in :func:`bnbp.batch_norm_training_backprop`.
    reproducible, recompute, num_threads
        As in :func:`batch_norm_training`. Here `recompute` applies to all tensors.

    Returns
    -------
    BatchNormTrainingBackpropResult
        Named tuple of dask arrays: ``input_delta``, with the chunks of `input`, and ``gamma_delta`` and ``beta_delta``,
        with the chunks of its channels. With `addend` it is a BatchNormTrainingBackpropAddendResult, which has
        ``addend_delta`` too, with the chunks of `input`. Outputs that `output_mask` leaves out are None.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training`.

    Notes
    -----
    Any part of ``input_delta`` needs the sums over its channels in all chunks. Apart from these sums, a slice of
    ``input_delta`` computes only the chunks that it touches.

    Examples
    --------
    >>> import dask.array as da, bnbp.dask
    >>> x = da.from_array([[1.0], [2.0], [3.0], [6.0]], chunks=(2, 1))
    >>> dy = da.from_array([[1.0], [0.0], [0.0], [1.0]], chunks=(2, 1))
    >>> forward = bnbp.dask.batch_norm_training(x, [2.0], None, epsilon=0.5)
    >>> backward = bnbp.dask.batch_norm_training_backprop(
    ...     x, [2.0], None, forward.batch_mean, forward.batch_variance, dy, epsilon=0.5)
    >>> backward.gamma_delta.compute(), backward.beta_delta.compute()
    (array([0.5]), array([2.]))
    >>> backward.input_delta.compute().ravel()
    array([ 0.625 , -0.4375, -0.5   ,  0.3125])
    """
    given = {
        **{"input": input, "gamma": gamma, "beta": beta, "mean": mean, "variance": variance},
        **{"normalized_delta": normalized_delta, "normalized": normalized},
    }
    return _backprop(
        "training_backprop",
        given,
        epsilon,
        channel_axis,
        activation,
        addend,
        output_mask,
        reproducible,
        recompute,
        num_threads,
    )


def batch_norm_inference(
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    addend: Any = None,
    channel_axis: int = 1,
    num_threads: int | None = 1,
) -> Any:
    """Normalise with a given mean and variance: :func:`bnbp.batch_norm_inference`, lazily.

    Parameters
    ----------
    input : dask array, float16, bfloat16, float32 or float64, shape (N, C, ...)
        The batch, in chunks of any shape.
    gamma, beta : dask array or array_like, shape (C,), the parameters' type; or None
        As in :func:`bnbp.batch_norm_inference`.
    mean, variance : dask array or array_like, shape (C,), the parameters' type
        Likewise.
    addend : dask array or array_like, shape and type of `input`, optional
        Likewise. It is rechunked to the chunks of `input`.
    epsilon, activation, channel_axis
        Likewise.
    num_threads
        As in :func:`batch_norm_training`.

    Returns
    -------
    dask array
        ``normalized``: shape, type and chunks of `input`. A chunk needs only the same chunk of `input`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training`.

    Examples
    --------
    >>> import dask.array as da, bnbp.dask
    >>> x = da.from_array([[1.0], [5.0]], chunks=1)
    >>> bnbp.dask.batch_norm_inference(x, None, None, mean=[3.0], variance=[4.0], epsilon=0).compute().ravel()
    array([-1.,  1.])
    """
    given = {"input": input, "gamma": gamma, "beta": beta, "mean": mean, "variance": variance, "addend": addend}
    options: dict[str, Any] = {"activation": activation, "num_threads": num_threads}
    args = arguments("inference", given, epsilon, channel_axis, **options)
    options |= {"epsilon": float(epsilon), "axis": args.axis}
    return _elements(args, "bnbp-normalized", blocks.normalize, *args.operands.values(), **options)


def batch_norm_inference_backprop(
    input: Any,
    gamma: Any,
    beta: Any,
    mean: Any,
    variance: Any,
    normalized_delta: Any,
    epsilon: float = 1e-5,
    *,
    activation: Activation | None = None,
    normalized: Any = None,
    addend: bool = False,
    channel_axis: int = 1,
    output_mask: Sequence[bool] | None = None,
    reproducible: bool = True,
    num_threads: int | None = 1,
) -> GradientResult:
    """Gradient of :func:`batch_norm_inference`: :func:`bnbp.batch_norm_inference_backprop`, lazily.

    Parameters
    ----------
    input, gamma, beta, mean, variance, normalized_delta, normalized
        As in :func:`batch_norm_training_backprop`; `mean` and `variance` are constants.
    epsilon, activation, addend, channel_axis, output_mask
        As in :func:`bnbp.batch_norm_inference_backprop`.
    reproducible, num_threads
        As in :func:`batch_norm_training`.

    Returns
    -------
    BatchNormTrainingBackpropResult
        As in :func:`batch_norm_training_backprop`. A chunk of ``input_delta`` needs only the same chunks of the
        tensors.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_training`.

    Examples
    --------
    >>> import dask.array as da, bnbp.dask
    >>> x, dy = (da.from_array(values, chunks=1) for values in ([[1.0], [5.0]], [[1.0], [2.0]]))
    >>> result = bnbp.dask.batch_norm_inference_backprop(x, None, None, [3.0], [4.0], dy, epsilon=0)
    >>> result.input_delta.compute().ravel(), result.gamma_delta.compute()
    (array([0.5, 1. ]), array([1.]))
    """
    given = {
        **{"input": input, "gamma": gamma, "beta": beta, "mean": mean, "variance": variance},
        **{"normalized_delta": normalized_delta, "normalized": normalized},
    }
    return _backprop(
        "inference_backprop",
        given,
        epsilon,
        channel_axis,
        activation,
        addend,
        output_mask,
        reproducible,
        False,  # there is one pass
        num_threads,
    )


# ---------------------------------------------------------------- graphs


def _backprop(
    op: str,
    given: dict[str, Any],
    epsilon: float,
    channel_axis: int,
    activation: Activation | None,
    addend: bool,
    output_mask: Sequence[bool] | None,
    reproducible: bool,
    recompute: bool,
    num_threads: int | None,
) -> GradientResult:
    options: dict[str, Any] = {"activation": activation, "addend": addend, "num_threads": num_threads}
    args = arguments(op, given, epsilon, channel_axis, **options, output_mask=output_mask)
    x, gamma, beta, mean, variance, delta, normalized = args.operands.values()
    result: Any = BatchNormTrainingBackpropAddendResult if addend else BatchNormTrainingBackpropResult
    mask = [True] * len(result._fields) if output_mask is None else output_mask
    wanted = [name for name, wants in zip(result._fields, mask, strict=True) if wants]
    options |= {"epsilon": float(epsilon), "addend": bool(addend), "axis": args.axis}
    lazy: dict[str, Any] = {}

    passes = _Passes(args, recompute)
    (first,) = passes.again("sums", [x])
    masked = [gamma, beta, variance, normalized] if activation else [None] * 4
    operands = first, mean, delta, *masked
    whole = _reduce(args, blocks.sums, *operands, reproducible=bool(reproducible), **options)
    for name in wanted:
        if name in ("gamma_delta", "beta_delta"):
            how = {"which": name, "rank": x.ndim, "element_type": x.dtype, "axis": args.axis, "epsilon": float(epsilon)}
            operands = whole, gamma, beta, mean, variance
            lazy[name] = _channels(args, f"bnbp-{name}", blocks.parameter_deltas, *operands, **how)

    names = tuple(name for name in ("input_delta", "addend_delta") if name in wanted)
    if names:
        second, delta, normalized = passes.again("deltas", [x, delta, normalized])
        training = op == "training_backprop"
        options |= {"names": names, "training": training}
        operands = second, gamma, beta, mean, variance, delta, normalized, *([whole] if training else [])
        token = f"bnbp-{names[0]}" if len(names) == 1 else "bnbp-deltas"
        both = _elements(args, token, blocks.deltas, *operands, **options)
        if len(names) == 1:
            lazy[names[0]] = both
        else:  # a chunk of both is a pair
            lazy |= {name: _elements(args, f"bnbp-{name}", blocks.field, both, k=k) for k, name in enumerate(names)}
    return result(**{name: lazy.get(name) for name in result._fields})  # type: ignore[no-any-return]


class _Passes:
    """The source of the tensors for each pass of a call."""

    def __init__(self, args: Arguments, recompute: bool) -> None:
        self._names = [getattr(value, "name", None) for value in args.operands.values()]
        self._recompute = recompute

    def again(self, step: str, first: list[Any], others: Sequence[Any] = ()) -> list[Any]:
        """The tensors, and others that only this pass reads, from tasks of its own if that is wanted."""
        return again(first, others, tokenize(step, self._names)) if self._recompute else [*first, *others]


def _reduce(args: Arguments, function: Any, x: Any, *operands: Any, **options: Any) -> Any:
    """The sums of the whole batch: an array over the channels, with an object of sums for each of its chunks."""
    parts = _blockwise(tuple(range(x.ndim)), args, "bnbp-part", np.dtype(object), function, x, *operands, **options)
    return da.reduction(
        parts,
        blocks.itself,
        blocks.whole,
        combine=blocks.merge,
        axis=tuple(k for k in range(x.ndim) if k != args.axis),
        dtype=object,
        name=WHOLE,
        concatenate=False,
        meta=np.empty(0, object),
    )


def _elements(args: Arguments, token: str, function: Any, x: Any, *operands: Any, **options: Any) -> Any:
    """A result with a value for each element."""
    dtype = args.operands["input"].dtype
    return _blockwise(tuple(range(x.ndim)), args, token, dtype, function, x, *operands, **options)


def _channels(args: Arguments, token: str, function: Any, *operands: Any, **options: Any) -> Any:
    """A result with a value for each channel."""
    return _blockwise((args.axis,), args, token, args.dtype, function, *operands, **options)


def _blockwise(
    index: tuple[int, ...],
    args: Arguments,
    token: str,
    dtype: np.dtype[Any],
    function: Any,
    *operands: Any,
    **options: Any,
) -> Any:
    """Apply a function to the chunks of tensors and of arrays over the channels; operands may be None."""
    pairs: list[Any] = []
    for operand in operands:
        pairs += [operand, None if operand is None else (args.axis,) if operand.ndim == 1 else index]
    meta = np.empty((0,) * len(index), dtype)
    return da.blockwise(
        function, index, *pairs, token=token, dtype=dtype, meta=meta, align_arrays=False, concatenate=False, **options
    )
