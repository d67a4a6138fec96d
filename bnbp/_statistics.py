"""Merging the statistics of the parts of a batch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ._results import BatchNormStatistics
from .engine.boundary import integer_of, text_of

__all__ = ["merge_statistics"]

Array = NDArray[np.float64]
Part = tuple[int, Array, Array]


def merge_statistics(*parts: Part | Iterable[Part]) -> BatchNormStatistics:
    r"""Merge the statistics of the parts of a batch into the statistics of the whole batch.

    Parameters
    ----------
    *parts : tuple of (int, ndarray, ndarray)
        The result of :func:`batch_norm_training_statistics` for each part, or an earlier result of this function. It
        holds the number of elements of a channel, and two float64 arrays of shape (C,). A single argument may be an
        iterable of parts. Parts without elements change nothing.

    Returns
    -------
    BatchNormStatistics
        Named tuple of ``count``, ``mean`` and ``m2``.

    Raises
    ------
    TypeError
        If a part is not a tuple of three, or a count is not an integer.
    ValueError
        If there are no parts, a count is negative, or the arrays are not float64 of one shape (C,).

    Notes
    -----
    With the counts :math:`m_k` of the parts, their means :math:`\mu_k` and their sums of squared deviations
    :math:`s_k`,

    .. math::

       m = \sum_k m_k, \qquad
       \mu = \frac1m \sum_k m_k \mu_k, \qquad
       s = \sum_k \left( s_k + m_k (\mu_k - \mu)^2 \right) .

    The sums are computed in twice the precision of float64, in the order of the arguments, and rounded once, at the
    end. So the result has no more error than the parts have, for any number of parts. The same parts in the same order
    give the same bits. The formulas are the symmetric form of the formulas of T. F. Chan, G. H. Golub and R. J.
    LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983), 242-247.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    >>> bnbp.merge_statistics(*map(bnbp.batch_norm_training_statistics, (x[:1], x[1:])))
    BatchNormStatistics(count=3, mean=array([3., 5.]), m2=array([14.,  0.]))
    """
    if len(parts) == 1 and not _is_part(parts[0]):
        try:
            iterator = iter(cast(Iterable[Part], parts[0]))
        except MemoryError:
            raise
        except Exception as error:
            got = type(parts[0]).__name__
            raise TypeError(f"parts: expected (count, mean, m2), or an iterable of those, got {got}") from error
        parts = tuple(iterator)
    checked = _check(parts)
    full = [part for part in checked if part.count]
    if not full:
        return BatchNormStatistics(0, np.full_like(checked[0].mean, np.nan), np.zeros_like(checked[0].m2))
    count = sum(part.count for part in full)
    first = full[0].mean
    with np.errstate(all="ignore"):  # a channel with a NaN or an infinity has no more than that to say
        # Every mean is taken as its distance from the first: equal ones are then exactly at 0.
        distances = [_two_sum(part.mean, -first) for part in full]
        zero = np.zeros_like(first)
        total = m2 = (zero, zero)
        for part, distance in zip(full, distances, strict=True):
            total = _add(total, _times(distance, part.count))
        offset = _over(total, count)
        for part, distance in zip(full, distances, strict=True):
            apart = _add(distance, (-offset[0], -offset[1]))
            m2 = _add(m2, _add((part.m2, zero), _times(_square(apart), part.count)))
        mean, rest = _two_sum(first, offset[0])
        mean += rest + offset[1]
        plain = sum((part.mean * part.count for part in full), zero) / count
    total_m2 = m2[0] + m2[1]
    special = ~np.isfinite(mean)
    mean[special] = plain[special]
    total_m2[special] = np.nan
    return BatchNormStatistics(count, mean, total_m2)


def as_operands(
    whole: BatchNormStatistics, gamma: NDArray[Any] | None, beta: NDArray[Any] | None, epsilon: float, dtype: Any
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Operands of `batch_norm_inference` that normalise a part of a batch with the statistics of the whole.

    Mean and variance are rounded to the parameters' type. The rounding error of the mean may be large compared with a
    small standard deviation, so `beta` makes up for it.

    Parameters
    ----------
    whole : BatchNormStatistics
        The statistics of the whole batch.
    gamma, beta : ndarray or None
        The operator's own, of type `dtype`.
    epsilon : float
        The operator's own.
    dtype : numpy.dtype
        The type of the parameters.

    Returns
    -------
    tuple
        Mean and variance, shape (C,), of type `dtype`, and the beta to normalise with. With an activation, the
        operator's own beta is right, because the operator then normalises with the statistics as they are returned.
    """
    with np.errstate(all="ignore"):
        mean, variance = whole.mean.astype(dtype), whole.variance.astype(dtype)
        if mean.dtype == np.float64:
            return mean, variance, beta
        rest = (whole.mean - mean) / np.sqrt(whole.variance + epsilon)
        shifted = (0 if beta is None else beta) - (1 if gamma is None else gamma) * rest
        return mean, variance, shifted.astype(dtype)


def _is_part(value: object) -> bool:
    """Whether this is a tuple whose first field is not a tuple."""
    fields = _fields(value)
    return bool(fields) and not issubclass(type(fields[0]), tuple)


def _fields(part: object) -> tuple[Any, ...]:
    """The fields of a tuple, even if a subclass has another iterator; none if this is not a tuple."""
    return tuple(tuple.__iter__(cast(Part, part))) if issubclass(type(part), tuple) else ()


def _check(parts: tuple[object, ...]) -> list[BatchNormStatistics]:
    if not parts:
        raise ValueError("merge_statistics: expected at least 1 part, got none")
    checked: list[BatchNormStatistics] = []
    for k, part in enumerate(parts):
        name = f"parts[{k}]"
        fields = _fields(part)
        if len(fields) != 3:
            got = f"a tuple of {len(fields)}" if issubclass(type(part), tuple) else type(part).__name__
            raise TypeError(f"{name}: expected (count, mean, m2), got {got}")
        count = integer_of(f"{name} (count)", fields[0], 0)
        if count > sys.maxsize:
            raise ValueError(f"{name} (count): expected at most {sys.maxsize}, got {text_of(count)}")
        arrays: list[Array] = []
        for field, value in zip(("mean", "m2"), fields[1:], strict=True):
            try:
                array = np.array(np.asarray(value))  # a copy, even if `__array__` gives what it keeps
            except MemoryError:
                raise
            except Exception as error:
                got = f"{type(value).__name__}: {text_of(error, str)}"
                raise TypeError(f"{name} ({field}): expected an array, got {got}") from error
            like = checked[0].mean if checked else arrays[0] if arrays else array
            if array.dtype != np.float64:
                raise TypeError(f"{name} ({field}): expected float64, got {array.dtype}")
            if like.ndim != 1:
                raise ValueError(f"{name} ({field}): expected one axis, the channels, got shape {array.shape}")
            if array.shape != like.shape:
                raise ValueError(
                    f"{name} ({field}): expected shape {like.shape}, that of parts[0] (mean), got {array.shape}"
                )
            arrays.append(array)
        checked.append(BatchNormStatistics(count, *arrays))
    return checked


# A number as the unevaluated sum of two, about 106 bits: T. J. Dekker, "A floating-point technique for extending the
# available precision", Numerische Mathematik 18 (1971), 224-242.
Twofold = tuple[Array, Array]


def _two_sum(a: Array, b: Array) -> Twofold:
    """Add exactly (Knuth)."""
    s = a + b
    back = s - a
    return s, (a - (s - back)) + (b - back)


def _two_product(a: Array, b: Array | float) -> Twofold:
    """Multiply exactly, short of overflow and underflow."""
    p = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(a: Array | float) -> tuple[Array | float, Array | float]:
    """Two numbers of 26 bits, whose sum is a."""
    big = 134217729.0 * a
    high = big - (big - a)
    return high, a - high


def _add(a: Twofold, b: Twofold) -> Twofold:
    s, rest = _two_sum(a[0], b[0])
    return _two_sum(s, rest + (a[1] + b[1]))


def _times(a: Twofold, b: float) -> Twofold:
    p, rest = _two_product(a[0], b)
    return _two_sum(p, rest + a[1] * b)


def _square(a: Twofold) -> Twofold:
    p, rest = _two_product(a[0], a[0])
    return _two_sum(p, rest + 2 * a[0] * a[1])


def _over(a: Twofold, b: float) -> Twofold:
    q = a[0] / b
    p, rest = _two_product(q, b)
    return _two_sum(q, ((a[0] - p) - rest + a[1]) / b)
