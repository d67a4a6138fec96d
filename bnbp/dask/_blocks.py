"""The functions that tasks run. Each works on one chunk, or on the results of such functions.

A chunk without channels, which the operators do not take, has None in place of its sums.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bnbp
from bnbp import exact
from bnbp._statistics import as_operands

__all__ = [
    "batch_vector",
    "deltas",
    "field",
    "itself",
    "merge",
    "normalize",
    "normalize_batch",
    "parameter_deltas",
    "statistics",
    "sums",
    "whole",
]

Array = NDArray[Any]


class Sums(NamedTuple):
    """The gradient's sums of a part of the batch."""

    #: Elements of a channel.
    count: int  # type: ignore[assignment]  # it hides tuple.count
    #: A `BatchNormTrainingBackpropSums`, or an `ExactSums`.
    values: Any


# ---------------------------------------------------------------- sums of a chunk, and of all


def statistics(input: Array, *, axis: int, reproducible: bool, num_threads: int | None) -> Any:
    """Statistics of a chunk."""
    if not input.shape[axis]:
        return None
    if reproducible:
        return exact.batch_norm_training_statistics(_in_order(input), channel_axis=axis, num_threads=num_threads)
    return bnbp.batch_norm_training_statistics(input, channel_axis=axis, num_threads=num_threads)


def sums(
    input: Array,
    mean: Array,
    normalized_delta: Array,
    gamma: Array | None,
    beta: Array | None,
    variance: Array | None,
    normalized: Array | None,
    *,
    axis: int,
    reproducible: bool,
    **options: Any,
) -> Sums | None:
    """The gradient's sums over a chunk."""
    channels = input.shape[axis]
    if not channels:
        return None
    options |= {"gamma": gamma, "beta": beta, "variance": variance, "normalized": normalized, "channel_axis": axis}
    values: Any
    if reproducible:
        values = exact.batch_norm_training_backprop_reduce(_in_order(input), mean, normalized_delta, **options)
    else:
        values = bnbp.batch_norm_training_backprop_reduce(input, mean, normalized_delta, **options)
    return Sums(input.size // channels, values)


def _in_order(input: Array) -> Array:
    """A chunk whose axes are in memory in the order of its shape: the order within a sample follows memory.

    Chunks of one array may differ in that, for some operations return views and others copies.
    """
    strides = [abs(stride) for stride, length in zip(input.strides, input.shape, strict=True) if length > 1]
    ordered = 0 not in strides and all(a > b for a, b in pairwise(strides))
    return input if ordered else np.ascontiguousarray(input)


def merge(parts: Any, axis: Any = None, keepdims: bool = True) -> Any:
    """Merge the results of some chunks, which are nested lists in the order of the chunks."""
    first, *rest = list(_flat(parts)) or [None]
    if not rest:
        return first
    if isinstance(first, bnbp.BatchNormStatistics):
        return bnbp.merge_statistics(first, *rest)
    if isinstance(first, Sums):
        count = sum(part.count for part in (first, *rest))
        return Sums(count, _add(first.values, *(part.values for part in rest)))
    return first.merge(*rest)


def whole(parts: Any, axis: Any = None, keepdims: bool = True) -> Any:
    """Merge the results of all chunks, and round."""
    merged = merge(parts)
    if isinstance(merged, Sums):
        return merged._replace(values=_round(merged.values))
    return None if merged is None else _round(merged)


def itself(part: Any, axis: Any = None, keepdims: bool = True) -> Any:
    """The first step of a reduction, which changes nothing."""
    return part


def _flat(parts: Any) -> Iterator[Any]:
    if isinstance(parts, list):
        for part in parts:
            yield from _flat(part)
    elif parts is not None:
        yield parts


def _add(first: Any, *rest: Any) -> Any:
    if not isinstance(first, bnbp.BatchNormTrainingBackpropSums):
        return first.merge(*rest)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        for part in rest:
            first = bnbp.BatchNormTrainingBackpropSums(*(a + b for a, b in zip(first, part, strict=True)))
    return first


def _round(value: Any) -> Any:
    plain = isinstance(value, (bnbp.BatchNormStatistics, bnbp.BatchNormTrainingBackpropSums))
    return value if plain else value.round()


# ---------------------------------------------------------------- with the sums of all


def field(result: Any, k: int) -> Any:
    """One of several results."""
    return result[k]


def batch_vector(statistics: Any, *, k: int, epsilon: float, parameter_type: Any) -> Array:
    """Mean or variance of the batch."""
    if statistics is None:
        return np.empty(0, parameter_type)
    mean, variance, _ = as_operands(statistics, None, None, epsilon, parameter_type)
    return (mean, variance)[k]


def normalize_batch(
    input: Array,
    statistics: Any,
    gamma: Array | None,
    beta: Array | None,
    addend: Array | None,
    *,
    epsilon: float,
    parameter_type: Any,
    activation: Any,
    **options: Any,
) -> Array:
    """Normalise a chunk with the statistics of the batch."""
    if statistics is None:
        return np.empty(input.shape, input.dtype)
    mean, variance, shift = as_operands(statistics, gamma, beta, epsilon, parameter_type)
    # Without an activation the operator normalises by the exact mean, with one by the mean that it returns.
    shift = beta if activation else shift
    return normalize(input, gamma, shift, mean, variance, addend, epsilon=epsilon, activation=activation, **options)


def normalize(
    input: Array,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    variance: Array,
    addend: Array | None,
    *,
    axis: int,
    **options: Any,
) -> Array:
    """Normalise a chunk."""
    if not input.shape[axis]:
        return np.empty(input.shape, input.dtype)
    return bnbp.batch_norm_inference(input, gamma, beta, mean, variance, addend=addend, channel_axis=axis, **options)


def deltas(
    input: Array,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    variance: Array,
    normalized_delta: Array,
    normalized: Array | None,
    sums: Any = None,
    *,
    axis: int,
    names: tuple[str, ...],
    training: bool,
    addend: bool,
    **options: Any,
) -> Any:
    """The named gradients of a chunk's elements: a tuple, or a single array if there is one name."""
    if not input.shape[axis]:
        nothing = tuple(np.empty(input.shape, input.dtype) for _ in names)
        return nothing[0] if len(names) == 1 else nothing
    tensors: Any = input, gamma, beta, mean, variance, normalized_delta
    mask = ["input_delta" in names, False, False, *(["addend_delta" in names] if addend else [])]
    options |= {"normalized": normalized, "addend": addend, "output_mask": mask, "channel_axis": axis}
    if training:
        apply: Any = bnbp.batch_norm_training_backprop_apply
        result = apply(*tensors, *sums.values, sums.count, **options)
    else:
        result = bnbp.batch_norm_inference_backprop(*tensors, **options)
    named = tuple(getattr(result, name) for name in names)
    return named[0] if len(named) == 1 else named


def parameter_deltas(
    sums: Any,
    gamma: Array | None,
    beta: Array | None,
    mean: Array,
    variance: Array,
    *,
    which: str,
    rank: int,
    element_type: Any,
    axis: int,
    **options: Any,
) -> Array:
    """`gamma_delta` or `beta_delta` of some channels."""
    if sums is None:
        return np.empty(0, next(each for each in (gamma, beta, mean) if each is not None).dtype)
    nothing = np.empty([sums.values[0].size if k == axis else 0 for k in range(rank)], element_type)
    options |= {"output_mask": [False, which == "gamma_delta", which == "beta_delta"], "channel_axis": axis}
    apply: Any = bnbp.batch_norm_training_backprop_apply
    result = apply(nothing, gamma, beta, mean, variance, nothing, *sums.values, sums.count, **options)
    return getattr(result, which)  # type: ignore[no-any-return]
