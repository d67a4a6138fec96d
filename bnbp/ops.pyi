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

# A list has no type of its own: its results have the default.
T = TypeVar("T", bound=np.generic, default=np.floating[Any])
P = TypeVar("P", bound=np.generic, default=np.floating[Any])
Single = TypeVar("Single", np.float32, np.float64)  # of which all arrays have the same type
T_co = TypeVar("T_co", bound=np.generic, covariant=True)

class HasArray(Protocol[T_co]):
    def __array__(self) -> np.ndarray[Any, np.dtype[T_co]]: ...

Array: TypeAlias = NDArray[np.floating[Any]]
Typed: TypeAlias = HasArray[T] | Sequence[Any]  # no ArrayLike, as which any array would do, of whatever type
Maybe: TypeAlias = ArrayLike | None
Activation: TypeAlias = Literal["relu", "relu6"] | None
Out: TypeAlias = Sequence[NDArray[Any] | None]
Yes: TypeAlias = Literal[True]
No: TypeAlias = Literal[False]
AnyGradient: TypeAlias = (
    Gradient[Array | None, Array | None, Array | None]
    | AddendGradient[Array | None, Array | None, Array | None, Array | None]
)

# fmt: off
@overload
def batch_norm_training(
    input: HasArray[Single], gamma: Maybe = ..., beta: Maybe = ..., epsilon: float = ..., *,
    activation: Activation = ..., addend: Maybe = ..., channel_axis: int = ..., out: Out | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingResult[NDArray[Single], NDArray[Single]]: ...
@overload
def batch_norm_training(
    input: Typed[T], gamma: Maybe = ..., beta: Maybe = ..., epsilon: float = ..., *, activation: Activation = ...,
    addend: Maybe = ..., channel_axis: int = ..., out: Out | None = ..., num_threads: int | None = ...,
) -> BatchNormTrainingResult[NDArray[T], Array]: ...
@overload
def batch_norm_training(
    input: ArrayLike, gamma: Maybe = ..., beta: Maybe = ..., epsilon: float = ..., *, activation: Activation = ...,
    addend: Maybe = ..., channel_axis: int = ..., out: Out | None = ..., num_threads: int | None = ...,
) -> BatchNormTrainingResult: ...
def batch_norm_training_statistics(
    input: ArrayLike, *, channel_axis: int = ..., num_threads: int | None = ...
) -> BatchNormStatistics: ...
def batch_norm_training_backprop_reduce(
    input: ArrayLike, mean: ArrayLike, normalized_delta: ArrayLike, *, gamma: Maybe = ..., beta: Maybe = ...,
    variance: Maybe = ..., epsilon: float = ..., activation: Activation = ..., normalized: Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., num_threads: int | None = ...,
) -> BatchNormTrainingBackpropSums: ...
@overload
def batch_norm_inference(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, epsilon: float = ..., *,
    activation: Activation = ..., addend: Maybe = ..., channel_axis: int = ...,
    out: NDArray[Any] | Out | None = ..., num_threads: int | None = ...,
) -> NDArray[T]: ...
@overload
def batch_norm_inference(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, epsilon: float = ..., *,
    activation: Activation = ..., addend: Maybe = ..., channel_axis: int = ...,
    out: NDArray[Any] | Out | None = ..., num_threads: int | None = ...,
) -> Array: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, Yes, Yes] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], NDArray[P], NDArray[P]]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], NDArray[P], None]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], None, NDArray[P]]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, No, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], None, None]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, Yes, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[P], NDArray[P]]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[P], None]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, None, NDArray[P]]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: Sequence[bool],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T] | None, NDArray[P] | None, NDArray[P] | None]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[Yes, Yes, Yes, Yes] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T], NDArray[P], NDArray[P], NDArray[T]]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[Yes, No, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T], None, None, NDArray[T]]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[No, Yes, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[None, NDArray[P], NDArray[P], None]: ...
@overload
def batch_norm_training_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: Sequence[bool],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T] | None, NDArray[P] | None, NDArray[P] | None, NDArray[T] | None]: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., output_mask: Sequence[bool] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AnyGradient: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, Yes, Yes] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], NDArray[P], NDArray[P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], NDArray[P], None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], None, NDArray[P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, No, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], None, None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, Yes, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[P], NDArray[P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[P], None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, None, NDArray[P]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: Sequence[bool],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T] | None, NDArray[P] | None, NDArray[P] | None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[Yes, Yes, Yes, Yes] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T], NDArray[P], NDArray[P], NDArray[T]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[Yes, No, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T], None, None, NDArray[T]]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[No, Yes, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[None, NDArray[P], NDArray[P], None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: Sequence[bool],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T] | None, NDArray[P] | None, NDArray[P] | None, NDArray[T] | None]: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    delta_sum: ArrayLike, delta_centered_sum: ArrayLike, count: int,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., output_mask: Sequence[bool] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AnyGradient: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, Yes, Yes] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], NDArray[P], NDArray[P]]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], NDArray[P], None]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], None, NDArray[P]]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[Yes, No, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T], None, None]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, Yes, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[P], NDArray[P]]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, NDArray[P], None]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: tuple[No, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[None, None, NDArray[P]]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: Sequence[bool],
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient[NDArray[T] | None, NDArray[P] | None, NDArray[P] | None]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[Yes, Yes, Yes, Yes] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T], NDArray[P], NDArray[P], NDArray[T]]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[Yes, No, No, Yes],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T], None, None, NDArray[T]]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: tuple[No, Yes, Yes, No],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[None, NDArray[P], NDArray[P], None]: ...
@overload
def batch_norm_inference_backprop(
    input: Typed[T], gamma: Maybe, beta: Maybe, mean: Typed[P], variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: Sequence[bool],
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient[NDArray[T] | None, NDArray[P] | None, NDArray[P] | None, NDArray[T] | None]: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: No = ..., channel_axis: int = ..., output_mask: None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> Gradient: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: Yes, channel_axis: int = ..., output_mask: None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AddendGradient: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike, gamma: Maybe, beta: Maybe, mean: ArrayLike, variance: ArrayLike, normalized_delta: ArrayLike,
    epsilon: float = ..., *, activation: Activation = ..., normalized: Maybe = ...,
    addend: bool = ..., channel_axis: int = ..., output_mask: Sequence[bool] | None = ...,
    out: Out | None = ..., num_threads: int | None = ...,
) -> AnyGradient: ...
# fmt: on
