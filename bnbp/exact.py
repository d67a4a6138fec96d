"""Exact sums over the parts of a batch, which do not depend on how the batch is cut into parts.

The functions have the names of the operators' halves, and return exact sums instead of numbers. Each whole sample is
summed in an order that follows from its shape, and the samples' sums are added without rounding. Exact sums may be
merged in any order and grouping, and are rounded once, at the end. So the statistics, the parameters' gradients and
everything computed from them are bit-for-bit identical for any number of parts.

>>> import numpy as np, bnbp
>>> x = np.random.default_rng(0).normal(size=(8, 3, 5, 5)).astype(np.float32)
>>> whole = bnbp.exact.batch_norm_training_statistics(x)
>>> parts = [bnbp.exact.batch_norm_training_statistics(part) for part in (x[5:], x[:1], x[1:5])]
>>> parts[0].merge(*parts[1:]) == whole
True

A sample is one index of the batch axis. The batch axis is axis 0 or, if the channels are on axis 0, axis 1. The axes of
all parts must be in the same order in memory, because the order within a sample follows memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._results import BatchNormStatistics, BatchNormTrainingBackpropSums
from .engine import boundary
from .engine import exact as engine

__all__ = ["ExactStatistics", "ExactSums", "batch_norm_training_backprop_reduce", "batch_norm_training_statistics"]

Array = NDArray[Any]
Pair = tuple[int, Array]

#: Bytes of the samples' sums that are collected at a time. A channel of a sample takes 32.
BLOCK = 1 << 22

# The plain operators check the arguments, and compute nothing if no output is wanted. The others add to exact sums.
_check_statistics = boundary.function_of("BatchNormTrainingStatistics", BatchNormStatistics)
_check_reduce = boundary.function_of("BatchNormTrainingBackpropReduce", BatchNormTrainingBackpropSums)
_add_statistics = boundary.function_of("BatchNormTrainingStatistics (exact)", None)
_add_reduce = boundary.function_of("BatchNormTrainingBackpropReduce (exact)", None)


class _Exact:
    """Two exact sums for each channel."""

    __slots__ = ("_flags", "_pairs", "count")
    _tag: ClassVar[bytes]
    _header: ClassVar[struct.Struct] = struct.Struct("<4s?qqqqqq")

    def __init__(self, count: int, pairs: tuple[Pair, Pair], flags: Array | None) -> None:
        self.count, self._pairs, self._flags = count, pairs, flags

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return len(self._pairs[0][1])

    def merge(self, *others: Self) -> Self:
        """Merge the sums of this part and of other parts of the batch, exactly.

        Parameters
        ----------
        *others : the same type
            Sums of the same number of channels, in any order.

        Returns
        -------
        the same type

        Raises
        ------
        TypeError
            If one is of another type.
        ValueError
            If one has another number of channels.
        """
        for k, other in enumerate(others):
            if type(other) is not type(self):
                raise TypeError(f"others[{k}]: expected {type(self).__name__}, got {type(other).__name__}")
            if other.channels != self.channels:
                raise ValueError(f"others[{k}]: expected {self.channels} channels, got {other.channels}")
        if not others:
            return self
        all_ = (self, *others)
        first, second = (engine.merge([each._pairs[k] for each in all_]) for k in range(2))
        flags = [each._flags for each in all_ if each._flags is not None]
        count = sum(each.count for each in all_)
        return type(self)(count, (first, second), np.bitwise_or.reduce(flags) if flags else None)

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self.merge(other)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.to_bytes() == self.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __getitem__(self, channels: slice) -> Self:
        """The sums of some channels."""
        if not isinstance(channels, slice):
            raise TypeError(f"expected a slice of the channels, got {boundary.text_of(channels)}")
        first, second = (
            engine.merge([(first, np.ascontiguousarray(digits[channels]))]) for first, digits in self._pairs
        )
        flags = None if self._flags is None else self._flags[channels]
        return type(self)(self.count, (first, second), flags if flags is not None and flags.any() else None)

    def to_bytes(self) -> bytes:
        """The sums as bytes: some 30 to 60 for each channel, more if the numbers are of very different sizes.

        Equal sums have equal bytes.
        """
        flags = self._flags
        header = self._header.pack(
            self._tag,
            flags is not None,
            self.count,
            self.channels,
            *(number for first, digits in self._pairs for number in (first, digits.shape[1])),
        )
        digits = (digits.astype("<i4", copy=False).tobytes() for _, digits in self._pairs)
        return b"".join((header, *digits, b"" if flags is None else flags.tobytes()))

    @classmethod
    def from_bytes(cls, data: Any) -> Self:
        """The sums from the bytes that :meth:`to_bytes` returned.

        Raises
        ------
        ValueError
            If the bytes are others.
        """
        data = memoryview(data).cast("B")
        wrong = ValueError(f"data: expected what {cls.__name__}.to_bytes returned, got {len(data)} other bytes")
        if len(data) < cls._header.size:
            raise wrong
        tag, flagged, count, channels, *places = cls._header.unpack_from(data)
        (first, width), (second, other_width) = places[:2], places[2:]
        sizes = [4 * channels * width, 4 * channels * other_width, channels if flagged else 0]
        limits = (first, width, second, other_width)
        if tag != cls._tag or min(count, channels, *limits) < 0 or cls._header.size + sum(sizes) != len(data):
            raise wrong
        if max(limits) > 1 << 10:
            raise wrong
        begin = cls._header.size
        middle, end = begin + sizes[0], begin + sizes[0] + sizes[1]
        digits = (
            np.frombuffer(part, "<i4").astype(np.int32, copy=False) for part in (data[begin:middle], data[middle:end])
        )
        pairs = (first, next(digits).reshape(channels, width)), (second, next(digits).reshape(channels, other_width))
        return cls(count, pairs, np.frombuffer(data[end:], np.uint8) if flagged else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.channels} channels, {self.count} elements each>"

    def _with_special(self, numbers: Array, shift: int) -> Array:
        """The numbers, with an infinity or NaN in place of each sum that has a flag."""
        if self._flags is not None:
            of_sum = self._flags >> shift & 7
            for c in np.flatnonzero(of_sum):
                numbers[c] = engine.special(int(of_sum[c]))
        return numbers


class ExactStatistics(_Exact):
    """Exact sums of the samples' statistics, from :func:`bnbp.exact.batch_norm_training_statistics`.

    ``count`` is the number of elements of a channel, and ``channels`` is the number of channels. :meth:`merge` or ``+``
    merges parts. A slice selects channels. The sums can be pickled.
    """

    __slots__ = ()
    _tag = b"bnST"

    def round(self) -> BatchNormStatistics:
        """Count, mean and m2 as :func:`bnbp.batch_norm_training_statistics` returns them, each rounded once."""
        if self.count == 0:
            return BatchNormStatistics(0, np.full(self.channels, np.nan), np.zeros(self.channels))
        (first, digits), (second, squares) = self._pairs
        mean, m2 = engine.round_statistics(first, digits, second, squares, self.count)
        return BatchNormStatistics(self.count, self._with_special(mean, 0), self._with_special(m2, 3))


class ExactSums(_Exact):
    """Exact sums of the samples' sums, from :func:`bnbp.exact.batch_norm_training_backprop_reduce`.

    It has the attributes and methods of :class:`ExactStatistics`.
    """

    __slots__ = ()
    _tag = b"bnSU"

    def round(self) -> BatchNormTrainingBackpropSums:
        """The sums as :func:`bnbp.batch_norm_training_backprop_reduce` returns them, each rounded once."""
        sums = (
            self._with_special(engine.round_sum(first, digits), 3 * k) for k, (first, digits) in enumerate(self._pairs)
        )
        return BatchNormTrainingBackpropSums(*sums)


Kind = TypeVar("Kind", ExactStatistics, ExactSums)


def batch_norm_training_statistics(
    input: ArrayLike, *, channel_axis: int = 1, num_threads: int | None = None
) -> ExactStatistics:
    r"""Mean and squared deviations of a part of a batch, as exact sums.

    Parameters
    ----------
    input, channel_axis, num_threads
        As in :func:`bnbp.batch_norm_training_statistics`.

    Returns
    -------
    ExactStatistics
        Its ``round()`` gives count, mean and m2. They are the same for any distribution of the samples over parts.

    Raises
    ------
    TypeError, ValueError
        As :func:`bnbp.batch_norm_training_statistics`.

    Notes
    -----
    Let :math:`\mu_k` be the mean of sample k, :math:`s_k` the sum of its squared deviations and :math:`n_k` its number
    of elements. The sums of :math:`n_k \mu_k` and of :math:`s_k + n_k \mu_k^2` are kept exactly. They give

    .. math::

       m &= \sum_k n_k \\
       \mu &= \frac1m \sum_k n_k \mu_k \\
       s &= \sum_k \left( s_k + n_k \mu_k^2 \right) - \frac1m \Bigl( \sum_k n_k \mu_k \Bigr)^2 .

    Cancellation in this difference does no harm, because it is computed with integers.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    >>> parts = [bnbp.exact.batch_norm_training_statistics(part) for part in (x[2:], x[:2])]
    >>> parts[0].merge(parts[1]).round()
    BatchNormStatistics(count=3, mean=array([3., 5.]), m2=array([14.,  0.]))
    """
    (array,) = boundary.arrays_of(("input",), [input])
    _check_statistics(array, 0.0, channel_axis, None, None, (False, False), None, num_threads)
    options = _Options(0.0, channel_axis, None, None, num_threads)
    if not options.are_plain():
        options = options.plain()
        _check_statistics(array, *options[:4], (False, False), None, options.num_threads)

    def add(arrays: list[Array], rows: Array) -> None:
        _add_statistics(*arrays, *options[:4], None, None, options.num_threads, rows)

    return _collect(ExactStatistics, add, [array], options.channel_axis)


def batch_norm_training_backprop_reduce(
    input: ArrayLike,
    mean: ArrayLike,
    normalized_delta: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float = 1e-5,
    activation: Literal["relu", "relu6"] | None = None,
    normalized: ArrayLike | None = None,
    addend: bool = False,
    channel_axis: int = 1,
    num_threads: int | None = None,
) -> ExactSums:
    """The sums of the gradient over a part of a batch, as exact sums.

    Parameters
    ----------
    input, mean, normalized_delta, gamma, beta, variance, epsilon, activation, normalized, addend, channel_axis, \
num_threads
        As in :func:`bnbp.batch_norm_training_backprop_reduce`.

    Returns
    -------
    ExactSums
        Its ``round()`` gives ``delta_sum`` and ``delta_centered_sum``. They are the same for any distribution of the
        samples over parts.

    Raises
    ------
    TypeError, ValueError
        As :func:`bnbp.batch_norm_training_backprop_reduce`.

    Examples
    --------
    >>> import numpy as np, bnbp
    >>> x, dy = np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> reduce = bnbp.exact.batch_norm_training_backprop_reduce
    >>> (reduce(x[:1], [3.0], dy[:1]) + reduce(x[1:], [3.0], dy[1:])).round()
    BatchNormTrainingBackpropSums(delta_sum=array([2.]), delta_centered_sum=array([1.]))
    """
    names = ("input", "mean", "normalized_delta", "gamma", "beta", "variance", "normalized")
    values = [input, mean, normalized_delta, gamma, beta, variance, normalized]
    x, mean, dy, gamma, beta, variance, y = boundary.arrays_of(names, values)
    vectors = (gamma, beta, variance)
    options = _Options(epsilon, channel_axis, activation, addend, num_threads)
    _check_reduce(x, mean, dy, *vectors, y, *options[:4], (False, False), None, num_threads)
    if not options.are_plain():
        options = options.plain()
        _check_reduce(x, mean, dy, *vectors, y, *options[:4], (False, False), None, options.num_threads)

    def add(arrays: list[Array], rows: Array) -> None:
        x, dy, *rest = arrays
        y = rest[0] if rest else None
        _add_reduce(x, mean, dy, *vectors, y, *options[:4], None, None, options.num_threads, rows)

    return _collect(ExactSums, add, [x, dy] if y is None else [x, dy, y], options.channel_axis)


class _Options(NamedTuple):
    """Options that are passed on for each part. A foreign object could run its own code in between."""

    epsilon: Any
    channel_axis: Any
    activation: Any
    addend: Any
    num_threads: Any

    def are_plain(self) -> bool:
        return (
            type(self.epsilon) is float
            and type(self.channel_axis) is int
            and type(self.activation) in (type(None), str)
            and type(self.addend) in (type(None), bool)
            and type(self.num_threads) in (type(None), int)
        )

    def plain(self) -> _Options:
        """The same options as Python's own objects, once they have been checked."""
        return _Options(
            float(self.epsilon),
            boundary.integer_of("channel_axis", self.channel_axis),
            None if self.activation is None else "relu6" if str.__eq__(self.activation, "relu6") else "relu",
            self.addend is not None and boundary.integer_of("addend", self.addend, None, "a bool") != 0,
            None if self.num_threads is None else boundary.integer_of("num_threads", self.num_threads),
        )


def _collect(
    kind: type[Kind],
    add: Callable[[list[Array], Array], None],
    tensors: list[Array],
    channel_axis: int,
) -> Kind:
    """Sum up the samples, as many at a time as the kernels take. The arguments have been checked."""
    input = tensors[0]
    axis = channel_axis % input.ndim
    batch = 1 if axis == 0 else 0
    channels, samples = input.shape[axis], input.shape[batch]
    row = kind is ExactStatistics, input.dtype == np.float64
    rows = engine.blank(channels, *row)
    step = max(BLOCK // (32 * channels), 1) if _samples_are_outermost(tensors, axis, batch) else 1
    for start in range(0, samples if input.size else 0, step):
        part = (slice(None),) * batch + (slice(start, start + step),)
        add([tensor[part] for tensor in tensors], rows)
    first, second, flags = engine.split(rows, *row)
    return kind(input.size // channels, (first, second), flags)


def _samples_are_outermost(tensors: list[Array], axis: int, batch: int) -> bool:
    """Whether the kernels find the samples one after the other, as the layout is folded for them."""
    input = tensors[0]
    if input.shape[axis] == 1:
        return all(tensor.flags.c_contiguous and tensor.flags.aligned for tensor in tensors)
    longest = max(
        (abs(stride) for k, stride in enumerate(input.strides) if k != batch and input.shape[k] > 1), default=0
    )
    own = abs(input.strides[batch])
    return own > longest or (own == longest and batch == 0)
