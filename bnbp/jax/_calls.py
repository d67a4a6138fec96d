"""The compiled handlers, registered with XLA, and how they are called."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from . import handlers

__all__ = ["Options", "alike", "call", "check", "output_types", "vector"]

for _name, _capsule in handlers.capsules().items():
    jax.ffi.register_ffi_target(f"bnbp.{_name}", _capsule, platform="cpu")

_ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}

Shape = jax.ShapeDtypeStruct


class Options(NamedTuple):
    """The attributes of an operator, which are constants of the compiled program."""

    epsilon: float
    channel_axis: int
    activation: str | None = None
    #: Whether there is an addend. Its gradient is then an output.
    addend: bool = False
    axis_name: Hashable = None


def check(operator: str, options: Options, *operands: Any) -> None:
    """Raise what the NumPy function would if types, shapes and options do not match."""
    output_types(operator, options, *operands)


def output_types(operator: str, options: Options, *operands: Any) -> tuple[str, ...]:
    """The element types of an operator's outputs."""
    described = []
    for name, operand in zip(handlers.inputs(operator), operands, strict=True):
        if operand is not None and not (hasattr(operand, "dtype") and hasattr(operand, "shape")):
            raise TypeError(f"{name}: expected an array, got {type(operand).__name__}")
        described.append(None if operand is None else (operand.dtype.name, tuple(map(int, operand.shape))))
    activation = _ACTIVATIONS[options.activation]
    return handlers.check(operator, tuple(described), options.epsilon, options.channel_axis, activation, options.addend)


def vector(input: Any, options: Options, dtype: Any) -> Shape:
    """A value for each channel."""
    return Shape((input.shape[options.channel_axis],), np.dtype(dtype))


def call(
    operator: str,
    options: Options,
    operands: Sequence[Any],
    results: Sequence[Shape],
    *,
    count: int = -1,
    wanted: int = -1,
) -> Any:
    """Call a handler with the operands that are not None, for the outputs that have a bit in `wanted`."""
    given = alike(*(operand for operand in operands if operand is not None))
    mark = _mark(given[0])
    present = sum(1 << k for k, operand in enumerate(operands) if operand is not None)
    function = jax.ffi.ffi_call(
        f"bnbp.{operator}",
        [Shape(each.shape, each.dtype, **mark) for each in results],
        # No aliases of operands and results: XLA would copy every operand that was not donated.
        vmap_method="sequential",
    )
    return function(
        *given,
        present=np.int64(present),
        wanted=np.int64(wanted),
        count=np.int64(count),
        epsilon=np.float64(options.epsilon),
        channel_axis=np.int64(options.channel_axis),
        activation=np.int64(_ACTIVATIONS[options.activation]),
        addend=np.int64(options.addend),
    )


def alike(*arrays: Any) -> tuple[Any, ...]:
    """Mark all arrays as different along every mesh axis along which one of them differs. None stays None.

    `jax.shard_map` checks that a foreign function's operands have the same mark. The gradient of an array that is
    marked here is added up over the devices.
    """
    axes: frozenset[Any] = frozenset().union(*(_axes(each) for each in arrays if each is not None))
    return tuple(each if each is None else _vary(each, axes - _axes(each)) for each in arrays)


def _mark(array: Any) -> dict[str, Any]:
    """The mark, as arguments for the result of a foreign function; nothing if there is no mark."""
    kind = jax.typeof(array)
    if hasattr(kind, "vma"):  # before JAX 0.10
        return {"vma": kind.vma}
    if not _axes(array):
        return {}
    mesh = jax.sharding.NamedSharding(kind.sharding.mesh, jax.sharding.PartitionSpec())
    return {"manual_axis_type": kind.manual_axis_type, "sharding": mesh}


def _axes(array: Any) -> frozenset[Any]:
    """The mesh axes along which an array is known to differ."""
    kind = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # type: ignore[no-any-return]


def _vary(array: Any, axes: frozenset[Any]) -> Any:
    """Mark an array as different along these axes."""
    if not axes:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, tuple(axes), to="varying")
    return getattr(jax.lax, "pvary")(array, tuple(axes))  # noqa: B009  (gone from JAX 0.10)
