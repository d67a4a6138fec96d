"""Batch normalisation and its gradient on CPUs.

The operators and their names come from the nGraph operator set: :func:`batch_norm_training_backprop` is
``BatchNormTrainingBackprop``.
"""

try:
    from .engine.boundary import kernels as _kernels  # noqa: F401  (imported for the error below)
except ImportError as _error:
    from ._unusable import explained

    raise explained(_error) from None

from . import exact, reference
from ._config import __version__, get_include, set_pool_limit, show_config
from ._results import (
    BatchNormStatistics,
    BatchNormTrainingBackpropAddendResult,
    BatchNormTrainingBackpropResult,
    BatchNormTrainingBackpropSums,
    BatchNormTrainingResult,
)
from ._statistics import merge_statistics
from .ops import (
    batch_norm_inference,
    batch_norm_inference_backprop,
    batch_norm_training,
    batch_norm_training_backprop,
    batch_norm_training_backprop_apply,
    batch_norm_training_backprop_reduce,
    batch_norm_training_statistics,
)

__all__ = [
    "BatchNormStatistics",
    "BatchNormTrainingBackpropAddendResult",
    "BatchNormTrainingBackpropResult",
    "BatchNormTrainingBackpropSums",
    "BatchNormTrainingResult",
    "__version__",
    "batch_norm_inference",
    "batch_norm_inference_backprop",
    "batch_norm_training",
    "batch_norm_training_backprop",
    "batch_norm_training_backprop_apply",
    "batch_norm_training_backprop_reduce",
    "batch_norm_training_statistics",
    "exact",
    "get_include",
    "merge_statistics",
    "reference",
    "set_pool_limit",
    "show_config",
]
