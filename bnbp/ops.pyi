"""What a type checker sees of the operators.

Results have the types of the arrays that go in: tensors that of `input`, vectors that of `mean` or, where there is
none, that of `input`. What `output_mask` leaves out is None. A mask of three that is written out says which outputs
those are, and so does one of four that wants all outputs, the tensors or the parameters. With any other mask, each
output may be None. With `addend=True` there are four outputs. The last overloads are for ArrayLike, which has no type.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypeVar

from ._results import BatchNormStatistics, BatchNormTrainingBackpropSums, BatchNormTrainingResult
from ._results import BatchNormTrainingBackpropAddendResult as AddendGradient
from ._results import BatchNormTrainingBackpropResult as Gradient

__all__ = [
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
    "batch_norm_training_backprop_apply",
    "batch_norm_training_backprop_reduce",
    "batch_norm_training_statistics",
]

# A list has no type of its own: its results have the default.
_T = TypeVar("_T", bound=np.generic, default=np.floating[Any])
_P = TypeVar("_P", bound=np.generic, default=np.floating[Any])
_Single = TypeVar("_Single", np.float32, np.float64)  # of which all arrays have the same type
_T_co = TypeVar("_T_co", bound=np.generic, covariant=True)

class _HasArray(Protocol[_T_co]):
    def __array__(self) -> np.ndarray[Any, np.dtype[_T_co]]: ...

_Array: TypeAlias = NDArray[np.floating[Any]]
_Typed: TypeAlias = _HasArray[_T] | Sequence[Any]  # no ArrayLike, as which any array would do, of whatever type
_Maybe: TypeAlias = ArrayLike | None
_Activation: TypeAlias = Literal["relu", "relu6"] | None
_Out: TypeAlias = Sequence[NDArray[Any] | None]
_Yes: TypeAlias = Literal[True]
_No: TypeAlias = Literal[False]
_AnyGradient: TypeAlias = (
    Gradient[_Array | None, _Array | None, _Array | None]
    | AddendGradient[_Array | None, _Array | None, _Array | None, _Array | None]
)

# fmt: off
@overload
def batch_norm_training(
    input: _HasArray[_Single], gamma: _Maybe = ..., beta: _Maybe = ..., epsilon: float = ..., *,
    activation: _Activation = ..., addend: _Maybe = ..., channel_axis: int = ..., out: _Out | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingResult[NDArray[_Single], NDArray[_Single]]: ...
@overload
def batch_norm_training(
    input: _Typed[_T], gamma: _Maybe = ..., beta: _Maybe = ..., epsilon: float = ..., *, activation: _Activation = ...,
    addend: _Maybe = ..., channel_axis: int = ..., out: _Out | None = ..., num_threads: int | None = ...,
) -> BatchNormTrainingResult[NDArray[_T], _Array]: ...
@overload
def batch_norm_training(
    input: ArrayLike, gamma: _Maybe = ..., beta: _Maybe = ..., epsilon: float = ..., *, activation: _Activation = ...,
    addend: _Maybe = ..., channel_axis: int = ..., out: _Out | None = ..., num_threads: int | None = ...,
) -> BatchNormTrainingResult: ...
def batch_norm_training_statistics(
    input: ArrayLike, *, channel_axis: int = ..., num_threads: int | None = ...
) -> BatchNormStatistics: ...
def batch_norm_training_backprop_reduce(
    input: ArrayLike, mean: ArrayLike, normalized_delta: ArrayLike, *, gamma: _Maybe = ..., beta: _Maybe = ...,
    variance: _Maybe = ..., epsilon: float = ..., activation: _Activation = ..., normalized: _Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., num_threads: int | None = ...,
) -> BatchNormTrainingBackpropSums: ...
@overload
def batch_norm_inference(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, epsilon: float = ..., *,
    activation: _Activation = ..., addend: _Maybe = ..., channel_axis: int = ...,
    out: NDArray[Any] | _Out | None = ..., num_threads: int | None = ...,
) -> NDArray[_T]: ...
@overload
def batch_norm_inference(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, epsilon: float = ..., *,
    activation: _Activation = ..., addend: _Maybe = ..., channel_axis: int = ...,
    out: NDArray[Any] | _Out | None = ..., num_threads: int | None = ...,
) -> _Array: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _Yes] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], NDArray[_P], NDArray[_P]]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], NDArray[_P], None]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], None, NDArray[_P]]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _No, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], None, None]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _Yes, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[_P], NDArray[_P]]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[_P], None]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, None, NDArray[_P]]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: Sequence[bool],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T] | None, NDArray[_P] | None, NDArray[_P] | None]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _Yes, _Yes] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T], NDArray[_P], NDArray[_P], NDArray[_T]]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_Yes, _No, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T], None, None, NDArray[_T]]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_No, _Yes, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[None, NDArray[_P], NDArray[_P], None]: ...
@overload
def batch_norm_training_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: Sequence[bool],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T] | None, NDArray[_P] | None, NDArray[_P] | None, NDArray[_T] | None]: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., output_mask: Sequence[bool] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> _AnyGradient: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _Yes] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], NDArray[_P], NDArray[_P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], NDArray[_P], None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], None, NDArray[_P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _No, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], None, None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _Yes, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[_P], NDArray[_P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[_P], None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, None, NDArray[_P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: Sequence[bool],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T] | None, NDArray[_P] | None, NDArray[_P] | None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _Yes, _Yes] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T], NDArray[_P], NDArray[_P], NDArray[_T]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_Yes, _No, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T], None, None, NDArray[_T]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_No, _Yes, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[None, NDArray[_P], NDArray[_P], None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: Sequence[bool],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T] | None, NDArray[_P] | None, NDArray[_P] | None, NDArray[_T] | None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., output_mask: Sequence[bool] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> _AnyGradient: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _Yes] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], NDArray[_P], NDArray[_P]]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], NDArray[_P], None]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], None, NDArray[_P]]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_Yes, _No, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T], None, None]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _Yes, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[_P], NDArray[_P]]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[_P], None]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: tuple[_No, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, None, NDArray[_P]]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: Sequence[bool],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[_T] | None, NDArray[_P] | None, NDArray[_P] | None]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_Yes, _Yes, _Yes, _Yes] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T], NDArray[_P], NDArray[_P], NDArray[_T]]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_Yes, _No, _No, _Yes],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T], None, None, NDArray[_T]]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: tuple[_No, _Yes, _Yes, _No],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[None, NDArray[_P], NDArray[_P], None]: ...
@overload
def batch_norm_inference_backprop(
    input: _Typed[_T], gamma: _Maybe, beta: _Maybe, mean: _Typed[_P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: Sequence[bool],
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[_T] | None, NDArray[_P] | None, NDArray[_P] | None, NDArray[_T] | None]: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _No = ..., channel_axis: int = ..., output_mask: None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> Gradient: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: _Yes, channel_axis: int = ..., output_mask: None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike, gamma: _Maybe, beta: _Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: _Activation = ..., normalized: _Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., output_mask: Sequence[bool] | None = ...,
    out: _Out | None = ..., num_threads: int | None = ...,
) -> _AnyGradient: ...
# fmt: on
