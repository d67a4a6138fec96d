"""A foreign function whose first result takes the memory of an operand that was donated.

`jax.ffi.ffi_call` can be told that a result lies in an operand's memory, but then XLA copies an operand that was not
donated. Only when a program is lowered is it known which were. So this is a primitive of its own, which asks then.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

__all__ = ["call"]

_primitive = Primitive("bnbp")
_primitive.multiple_results = True


def call(target: str, operands: Sequence[Any], results: Sequence[Any], attributes: dict[str, Any]) -> list[Any]:
    """Call a foreign function; the first result may be written over any operand of its shape and type."""

    def plain(*operands: Any) -> Any:
        return jax.ffi.ffi_call(target, results)(*operands, **attributes)

    avals = jax.make_jaxpr(plain)(*operands).out_avals  # with the mark that JAX gives to the results
    return _primitive.bind(  # type: ignore[no-any-return]
        *operands, target=target, avals=tuple(avals), attributes=tuple(attributes.items())
    )


def _run(*operands: Any, **parameters: Any) -> Any:
    return jax.jit(lambda *operands: _primitive.bind(*operands, **parameters))(*operands)


def _lower(ctx: Any, *operands: Any, target: str, avals: Any, attributes: Any) -> Any:
    alike = (
        k
        for k, (aval, operand) in enumerate(zip(ctx.avals_in, operands, strict=True))
        if (aval.shape, aval.dtype) == (avals[0].shape, avals[0].dtype) and _is_donated(operand)
    )
    place = next(alike, None)
    aliases = {} if place is None else {place: 0}
    rule = jax.ffi.ffi_lowering(target, operand_output_aliases=aliases)
    return rule(ctx, *operands, **dict(attributes))


def _is_donated(operand: Any) -> bool:
    """Whether this is an argument of the whole program that was donated."""
    if not hasattr(operand, "arg_number"):
        return False
    owner = operand.owner.owner  # the function, if the block that has the argument is a function's
    attributes = getattr(owner, "operation", owner).attributes
    if "arg_attrs" not in attributes:
        return False
    own = attributes["arg_attrs"][operand.arg_number]
    return "tf.aliasing_output" in own or "jax.buffer_donor" in own


def _batch(operands: Sequence[Any], dims: Sequence[Any], **parameters: Any) -> Any:
    """One batch after the other."""
    mapped = [k for k, dim in enumerate(dims) if dim is not None]

    def one(slices: Sequence[Any]) -> Any:
        own = list(operands)
        for k, each in zip(mapped, slices, strict=True):
            own[k] = each
        return _primitive.bind(*own, **parameters)

    results = jax.lax.map(one, [jax.numpy.moveaxis(operands[k], dims[k], 0) for k in mapped])
    return results, [0] * len(results)


_primitive.def_impl(_run)
_primitive.def_abstract_eval(lambda *_, avals, **__: list(avals))
mlir.register_lowering(_primitive, _lower, platform="cpu")
batching.primitive_batchers[_primitive] = _batch
