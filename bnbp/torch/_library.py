"""The operators in PyTorch's dispatcher, ``torch.ops.bnbp``: schemas, compiled kernels, and types of the results.

A schema has the operator's tensors, in the order of its reference page, and then its attributes. Where ``output_mask``
leaves an output out, or there is no addend, an empty tensor of shape (0,) stands in its place.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels

__all__ = ["OPERATORS", "operators"]

_GRADIENT = """Tensor? normalized=None, {count}float epsilon=1e-5, str? activation=None, bool addend=False,
    bool[4] output_mask=[True, True, True, True])
    -> (Tensor input_delta, Tensor gamma_delta, Tensor beta_delta, Tensor addend_delta)"""
_BACKPROP = "(Tensor input, Tensor? gamma, Tensor? beta, Tensor mean, Tensor variance, Tensor normalized_delta, "

_SCHEMAS = {
    "batch_norm_training": """(Tensor input, Tensor? gamma=None, Tensor? beta=None, Tensor? addend=None,
        float epsilon=1e-5, str? activation=None) -> (Tensor normalized, Tensor batch_mean, Tensor batch_variance)""",
    "batch_norm_training_backprop": _BACKPROP + _GRADIENT.format(count=""),
    "batch_norm_training_statistics": "(Tensor input) -> (Tensor mean, Tensor m2)",
    "batch_norm_training_backprop_reduce": """(Tensor input, Tensor mean, Tensor normalized_delta, Tensor? gamma=None,
        Tensor? beta=None, Tensor? variance=None, Tensor? normalized=None, float epsilon=1e-5, str? activation=None,
        bool addend=False) -> (Tensor delta_sum, Tensor delta_centered_sum)""",
    "batch_norm_training_backprop_apply": _BACKPROP
    + "Tensor delta_sum, Tensor delta_centered_sum, "
    + _GRADIENT.format(count="int count=0, "),
    "batch_norm_inference": """(Tensor input, Tensor? gamma, Tensor? beta, Tensor mean, Tensor variance,
        Tensor? addend=None, float epsilon=1e-5, str? activation=None) -> Tensor""",
    "batch_norm_inference_backprop": _BACKPROP + _GRADIENT.format(count=""),
}

#: The names of the operators.
OPERATORS = tuple(_SCHEMAS)

_library = torch.library.Library("bnbp", "DEF")  # the schemas last as long as this
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + " ".join(_schema.split()), tags=torch.Tag.pt2_compliant_tag)

_torch = ctypes.CDLL(torch._C.__file__)  # what is found through it is libtorch's
kernels.register_kernels(
    {name: ctypes.cast(getattr(_torch, name), ctypes.c_void_p).value for name in kernels.function_names()}
)

#: The operators themselves.
operators = torch.ops.bnbp


# ---------------------------------------------------------------- types, shapes and strides, without memory


def _tensor(input: Tensor, forward: bool = False) -> Tensor:
    """A result in the memory format that PyTorch would choose, as in kernels.cc."""
    if forward and input.is_contiguous():
        return torch.empty_like(input, memory_format=torch.contiguous_format)
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


def _vector(input: Tensor, *parameters: Tensor | None) -> Tensor:
    dtype = next((each.dtype for each in parameters if each is not None), input.dtype)
    return input.new_empty(input.shape[1:2], dtype=dtype)


def _training(
    input: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _tensor(input, forward=True), _vector(input, gamma, beta), _vector(input, gamma, beta)


def _sums(input: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(input.new_empty(input.shape[1:2], dtype=torch.float64) for _ in range(2))


def _inference(input: Tensor, *_: Any) -> Tensor:
    return _tensor(input, forward=True)


def _backprop(
    input: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    normalized_delta: Tensor,
    normalized: Tensor | None = None,
    epsilon: float = 1e-5,
    activation: str | None = None,
    addend: bool = False,
    output_mask: Sequence[bool] = (True,) * 4,
) -> tuple[Tensor, ...]:
    wanted = (*output_mask[:3], output_mask[3] and addend)
    vector = _vector(input, gamma, beta, mean)
    return tuple(
        (_tensor(input) if like is input else torch.empty_like(like)) if want else like.new_empty((0,))
        for like, want in zip((input, vector, vector, input), wanted, strict=True)
    )


def _apply(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, rest = arguments[:6], arguments[8:]  # without the two sums, and then without the count
    return _backprop(*tensors, *rest[:1], *rest[2:])


_FAKE: dict[str, Callable[..., Any]] = {
    "batch_norm_training": _training,
    "batch_norm_training_backprop": _backprop,
    "batch_norm_training_statistics": _sums,
    "batch_norm_training_backprop_reduce": _sums,
    "batch_norm_training_backprop_apply": _apply,
    "batch_norm_inference": _inference,
    "batch_norm_inference_backprop": _backprop,
}
for _name, _fake in _FAKE.items():
    torch.library.register_fake(f"bnbp::{_name}", _fake, lib=_library)


# ---------------------------------------------------------------- vmap

_TENSORS = ("input", "normalized_delta", "addend", "normalized")


def _batched(operator: Any) -> Callable[..., Any]:
    """The rule of `torch.vmap`: channels are independent, so B batches of C channels are one batch of B C channels."""
    names = [argument.name for argument in operator._schema.arguments]

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        size = info.batch_size

        def folded(name: str, value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            place = 1 if name in _TENSORS else 0  # before the channels
            value = value.unsqueeze(place) if dim is None else value.movedim(dim, place)
            lengths = list(value.shape)
            lengths[place] = size
            return value.expand(lengths).flatten(place, place + 1)

        def unfolded(value: Tensor) -> tuple[Tensor, int]:
            place = min(value.dim() - 1, 1)
            return value.unflatten(place, (size, value.shape[place] // size)), place

        results = operator(*map(folded, names, arguments, in_dims))
        if isinstance(results, Tensor):
            return unfolded(results)
        return tuple(zip(*map(unfolded, results), strict=True))

    return rule


for _name in OPERATORS:
    torch.library.register_vmap(f"bnbp::{_name}", _batched(getattr(operators, _name).default), lib=_library)
