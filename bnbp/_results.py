"""What the operators return."""

from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a default, which TypeVar has from Python 3.13 on, lets annotations name a result alone
    from typing_extensions import TypeVar

    Array = NDArray[np.floating[Any]]
    Tensor = TypeVar("Tensor", default=Array)
    Vector = TypeVar("Vector", default=Array)
    InputDelta = TypeVar("InputDelta", default=Array)
    GammaDelta = TypeVar("GammaDelta", default=Array)
    BetaDelta = TypeVar("BetaDelta", default=Array)
    AddendDelta = TypeVar("AddendDelta", default=Array)
else:
    from typing import TypeVar

    Tensor, Vector, InputDelta, GammaDelta, BetaDelta, AddendDelta = map(
        TypeVar, ("Tensor", "Vector", "InputDelta", "GammaDelta", "BetaDelta", "AddendDelta")
    )

__all__ = [
    "BatchNormStatistics",
    "BatchNormTrainingBackpropAddendResult",
    "BatchNormTrainingBackpropResult",
    "BatchNormTrainingBackpropSums",
    "BatchNormTrainingResult",
]


class BatchNormTrainingResult(NamedTuple, Generic[Tensor, Vector]):
    """What :func:`bnbp.batch_norm_training` returns."""

    #: The normalised, scaled and shifted input; shape and type of ``input``.
    normalized: Tensor
    #: Mean of each channel, shape (C,).
    batch_mean: Vector
    #: Biased variance of each channel, shape (C,).
    batch_variance: Vector


class BatchNormTrainingBackpropResult(NamedTuple, Generic[InputDelta, GammaDelta, BetaDelta]):
    """What :func:`bnbp.batch_norm_training_backprop` returns. Outputs that ``output_mask`` leaves out are ``None``."""

    #: Gradient with respect to ``input``; its shape and type.
    input_delta: InputDelta
    #: Gradient with respect to ``gamma``, shape (C,).
    gamma_delta: GammaDelta
    #: Gradient with respect to ``beta``, shape (C,).
    beta_delta: BetaDelta


class BatchNormTrainingBackpropAddendResult(NamedTuple, Generic[InputDelta, GammaDelta, BetaDelta, AddendDelta]):
    """What :func:`bnbp.batch_norm_training_backprop` returns with ``addend=True``.

    Outputs that ``output_mask`` leaves out are ``None``.
    """

    #: Gradient with respect to ``input``; its shape and type.
    input_delta: InputDelta
    #: Gradient with respect to ``gamma``, shape (C,).
    gamma_delta: GammaDelta
    #: Gradient with respect to ``beta``, shape (C,).
    beta_delta: BetaDelta
    #: Gradient with respect to ``addend``; shape and type of ``input``.
    addend_delta: AddendDelta


class BatchNormStatistics(NamedTuple):
    """What :func:`bnbp.batch_norm_training_statistics` returns, for a batch or for a part of one."""

    #: Number of elements of a channel.
    count: int  # type: ignore[assignment]  # it hides tuple.count
    #: Mean of each channel, shape (C,), float64; NaN if there are no elements.
    mean: NDArray[np.float64]
    #: Sum of the squared deviations from the mean, shape (C,), float64.
    m2: NDArray[np.float64]

    @property
    def variance(self) -> NDArray[np.float64]:
        """Biased variance of each channel, ``m2 / count``; NaN if there are no elements."""
        return self.m2 / self.count if self.count else np.full_like(self.m2, np.nan)


class BatchNormTrainingBackpropSums(NamedTuple):
    """What :func:`bnbp.batch_norm_training_backprop_reduce` returns. Add the sums of the parts of a batch."""

    #: Sum of ``normalized_delta`` over each channel, shape (C,), float64.
    delta_sum: NDArray[np.float64]
    #: Sum of ``normalized_delta * (input - mean)`` over each channel, shape (C,), float64.
    delta_centered_sum: NDArray[np.float64]
