"""The arguments of an operator: checked at once, then all cut to the chunks of `input`."""

import math
from typing import Any, NamedTuple

import dask.array
import numpy as np

import bnbp
from bnbp._checks import check

__all__ = ["Arguments", "arguments"]

#: The operands with a value for each element. The others have a value for each channel.
TENSORS = ("input", "normalized_delta", "addend", "normalized")

da: Any = dask.array  # whose functions have no type hints

Chunks = tuple[tuple[float, ...], ...]


class Arguments(NamedTuple):
    """The checked arguments of an operator."""

    #: Operands by name: dask arrays with the chunks of `input`, or with the chunks of its channels; or None.
    operands: dict[str, Any]
    #: The axis of the channels, not negative.
    axis: int
    #: The type of the parameters.
    dtype: np.dtype[Any]


def arguments(op: str, operands: dict[str, Any], epsilon: float, channel_axis: int, **options: Any) -> Arguments:
    """Check the arguments, in the operator's own words, and cut them to the chunks of `input`.

    Parameters
    ----------
    op : str
        The operator; a function of bnbp has this name after ``batch_norm_``.
    operands : dict
        The tensors, and the arrays with a value for each channel, by name; dask arrays and others.
    epsilon, channel_axis, **options
        As the operator takes them.
    """
    x = operands["input"]
    if not isinstance(x, da.Array):
        raise TypeError(f"input: expected a dask array, got {type(x).__name__}; dask.array.from_array makes one of it")
    given = {name: _array(name, value, x.dtype) for name, value in operands.items()}
    axis = _axis_of(channel_axis, x.ndim)
    shape = _shape_of(given, axis)
    stand_ins = {name: _stand_in(name, value, x, shape, axis) for name, value in given.items()}
    check(op, stand_ins, epsilon=epsilon, channel_axis=channel_axis, **options)
    assert axis is not None  # or the operator would have refused it
    dtype = _parameter_type(stand_ins, shape, axis)
    for name, value in given.items():
        if value is not None:
            given[name] = _tensor(name, value, x) if name in TENSORS else _vector(name, value, x.chunks[axis], dtype)
    return Arguments(given, axis, dtype)


def _array(name: str, value: Any, dtype: np.dtype[Any]) -> Any:
    """A tensor as an array; a dask array as it is. The operator itself sees to other vectors."""
    if isinstance(value, da.Array):
        if not isinstance(value._meta, np.ndarray):
            raise TypeError(f"{name}: expected chunks that are NumPy arrays, got {type(value._meta).__name__}")
        return value
    if value is None or name not in TENSORS:
        return value
    return np.asarray(value, None if hasattr(value, "dtype") else dtype)


# ---------------------------------------------------------------- what the operator sees


def _parameter_type(stand_ins: dict[str, Any], shape: tuple[int, ...], axis: int) -> Any:
    """The type that the operator itself gives to a result with a value for each channel."""
    nothing = np.empty([length if k == axis else 0 for k, length in enumerate(shape)], stand_ins["input"].dtype)
    vectors = {name: value for name, value in stand_ins.items() if name not in TENSORS}
    if "mean" not in vectors:
        return bnbp.batch_norm_training(nothing, **vectors, channel_axis=axis).batch_mean.dtype
    result = bnbp.batch_norm_inference_backprop(nothing, **vectors, normalized_delta=nothing, channel_axis=axis)
    return result.gamma_delta.dtype


def _axis_of(channel_axis: Any, rank: int) -> int | None:
    """The axis of the channels; None if the operator will refuse it."""
    try:
        return int(range(rank)[channel_axis])
    except (TypeError, IndexError):
        return None


def _shape_of(operands: dict[str, Any], axis: int | None) -> tuple[int, ...]:
    """The shape of `input`. Unknown lengths become 0, or the number of channels that other operands have."""
    shape = [0 if math.isnan(length) else int(length) for length in operands["input"].shape]
    if axis is not None and math.isnan(operands["input"].shape[axis]):
        vectors = [value for name, value in operands.items() if name not in TENSORS and value is not None]
        lengths = [length for value in vectors for length in np.shape(value)[:1] if not math.isnan(length)]
        shape[axis] = max([1, *lengths[:1]])
    return tuple(shape)


def _stand_in(name: str, value: Any, x: Any, shape: tuple[int, ...], axis: int | None) -> Any:
    """An array of the same shape and type, but of a single element in memory."""
    if value is None or (name not in TENSORS and not isinstance(value, da.Array)):
        return value
    like, taken = x.shape, shape
    if name not in TENSORS and axis is not None:
        like, taken = (x.shape[axis],), (shape[axis],)
    lengths = list(value.shape)
    for k in range(len(lengths)):
        unknown = math.isnan(lengths[k]) or (name in TENSORS and k < len(like) and math.isnan(like[k]))
        if unknown:
            lengths[k] = taken[k] if k < len(taken) else 0
    return np.broadcast_to(np.zeros((), value.dtype), lengths)


# ---------------------------------------------------------------- chunks


def _tensor(name: str, value: Any, x: Any) -> Any:
    """A tensor with the chunks of `input`."""
    if not isinstance(value, da.Array):
        if any(math.isnan(size) and len(sizes) > 1 for sizes in x.chunks for size in sizes):
            raise ValueError(
                f"{name}: expected a dask array with the chunks of input, which have unknown sizes, got an array"
            )
        value = da.from_array(value, chunks=_known(x.chunks, value.shape))
    new = {}
    for k, (own, wanted) in enumerate(zip(value.chunks, x.chunks, strict=True)):
        if any(map(math.isnan, own + wanted)):
            if len(own) != len(wanted):
                raise ValueError(
                    f"{name}: expected {len(wanted)} chunks along axis {k}, as input has, "
                    f"where the size of some is unknown, got {len(own)}"
                )
        elif own != wanted:
            new[k] = wanted
    return value.rechunk(new) if new else value


def _known(chunks: Chunks, shape: tuple[int, ...]) -> Chunks:
    """The chunks, where a single chunk along an axis gets the length of the axis."""
    return tuple(sizes if len(sizes) > 1 else (length,) for sizes, length in zip(chunks, shape, strict=True))


def _vector(name: str, value: Any, chunks: tuple[float, ...], dtype: np.dtype[Any]) -> Any:
    """An array with a value for each channel, with the chunks that the channels of `input` have."""
    if not isinstance(value, da.Array):
        value = da.from_array(np.asarray(value, None if hasattr(value, "dtype") else dtype), chunks=-1)
    own = value.chunks[0]
    if not any(map(math.isnan, own + chunks)):
        return value if own == chunks else value.rechunk((chunks,))
    if len(own) != len(chunks):
        raise ValueError(
            f"{name}: expected {len(chunks)} chunks, as the channels of input have, "
            f"where the size of some is unknown, got {len(own)}"
        )
    return value
