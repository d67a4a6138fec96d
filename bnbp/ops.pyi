"""What a type checker sees of the operators: with `addend=True` a gradient has four fields."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._results import (
    BatchNormStatistics,
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingBackpropSums,
    BatchNormTrainingResult,
)

Array = NDArray[np.floating[Any]]
Activation = Literal["relu", "relu6"]

def batch_norm_training(
    input: ArrayLike,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    addend: ArrayLike | None = ...,
    channel_axis: int = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingResult: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: Literal[False] = ...,
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropResult: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: Literal[True],
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropAddendResult: ...
@overload
def batch_norm_training_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: bool,
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropResult | BatchNormTrainingBackpropAddendResult: ...
def batch_norm_training_statistics(
    input: ArrayLike, *, channel_axis: int = ..., num_threads: int | None = ...
) -> BatchNormStatistics: ...
def batch_norm_training_backprop_reduce(
    input: ArrayLike,
    mean: ArrayLike,
    normalized_delta: ArrayLike,
    *,
    gamma: ArrayLike | None = ...,
    beta: ArrayLike | None = ...,
    variance: ArrayLike | None = ...,
    epsilon: float = ...,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: bool = ...,
    channel_axis: int = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropSums: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    delta_sum: ArrayLike,
    delta_centered_sum: ArrayLike,
    count: int,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: Literal[False] = ...,
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropResult: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    delta_sum: ArrayLike,
    delta_centered_sum: ArrayLike,
    count: int,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: Literal[True],
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropAddendResult: ...
@overload
def batch_norm_training_backprop_apply(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    delta_sum: ArrayLike,
    delta_centered_sum: ArrayLike,
    count: int,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: bool,
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropResult | BatchNormTrainingBackpropAddendResult: ...
def batch_norm_inference(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    addend: ArrayLike | None = ...,
    channel_axis: int = ...,
    out: Array | Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> Array: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: Literal[False] = ...,
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropResult: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: Literal[True],
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropAddendResult: ...
@overload
def batch_norm_inference_backprop(
    input: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike,
    variance: ArrayLike,
    normalized_delta: ArrayLike,
    epsilon: float = ...,
    *,
    activation: Activation | None = ...,
    normalized: ArrayLike | None = ...,
    addend: bool,
    channel_axis: int = ...,
    output_mask: Sequence[bool] | None = ...,
    out: Sequence[Array | None] | None = ...,
    num_threads: int | None = ...,
) -> BatchNormTrainingBackpropResult | BatchNormTrainingBackpropAddendResult: ...
