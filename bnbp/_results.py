"""What the operators return."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BatchNormStatistics",
    "BatchNormTrainingBackpropAddendResult",
    "BatchNormTrainingBackpropResult",
    "BatchNormTrainingBackpropSums",
    "BatchNormTrainingResult",
]


class BatchNormTrainingResult(NamedTuple):
    """What :func:`bnbp.batch_norm_training` returns."""

    #: The normalised, scaled and shifted input; shape and type of ``input``.
    normalized: NDArray[np.floating[Any]]
    #: Mean of each channel, shape (C,).
    batch_mean: NDArray[np.floating[Any]]
    #: Biased variance of each channel, shape (C,).
    batch_variance: NDArray[np.floating[Any]]


class BatchNormTrainingBackpropResult(NamedTuple):
    """What :func:`bnbp.batch_norm_training_backprop` returns; ``None`` where ``output_mask`` left an output out."""

    #: Gradient with respect to ``input``; its shape and type.
    input_delta: NDArray[np.floating[Any]]
    #: Gradient with respect to ``gamma``, shape (C,).
    gamma_delta: NDArray[np.floating[Any]]
    #: Gradient with respect to ``beta``, shape (C,).
    beta_delta: NDArray[np.floating[Any]]


class BatchNormTrainingBackpropAddendResult(NamedTuple):
    """What :func:`bnbp.batch_norm_training_backprop` returns with ``addend=True``; ``None`` as there."""

    #: Gradient with respect to ``input``; its shape and type.
    input_delta: NDArray[np.floating[Any]]
    #: Gradient with respect to ``gamma``, shape (C,).
    gamma_delta: NDArray[np.floating[Any]]
    #: Gradient with respect to ``beta``, shape (C,).
    beta_delta: NDArray[np.floating[Any]]
    #: Gradient with respect to ``addend``; shape and type of ``input``.
    addend_delta: NDArray[np.floating[Any]]


class BatchNormStatistics(NamedTuple):
    """What :func:`bnbp.batch_norm_training_statistics` returns, of a batch or of a part of one."""

    #: Elements of a channel.
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
    """What :func:`bnbp.batch_norm_training_backprop_reduce` returns; the sums of two parts of a batch can be added."""

    #: Sum of ``normalized_delta`` over each channel, shape (C,), float64.
    delta_sum: NDArray[np.float64]
    #: Sum of ``normalized_delta * (input - mean)`` over each channel, shape (C,), float64.
    delta_centered_sum: NDArray[np.float64]
