"""What the operators return."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchNormTrainingBackpropResult", "BatchNormTrainingResult"]


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
