"""The contribution of a rank, as bytes, and the merged contributions of all ranks.

There are two ways, and only this file knows of both. The exact way sums up each sample and adds the samples' sums
without an error, so that the whole does not depend on which rank had which sample. The plain way uses the operators'
halves: a rounded number for each rank, merged in the order of the ranks.
"""

from typing import Any

import numpy as np

import bnbp
from bnbp import exact
from bnbp._results import BatchNormStatistics, BatchNormTrainingBackpropSums

__all__ = ["own_statistics", "own_sums", "whole_statistics", "whole_sums"]


def own_statistics(reproducible: bool, input: Any, **options: Any) -> bytes:
    """The statistics of a part."""
    if reproducible:
        return exact.batch_norm_training_statistics(input, **options).to_bytes()
    count, mean, m2 = bnbp.batch_norm_training_statistics(input, **options)
    return np.concatenate([[count], mean, m2]).tobytes()  # a count is less than 2^53


def whole_statistics(reproducible: bool, parts: list[bytes]) -> BatchNormStatistics:
    """The statistics of the batch."""
    if reproducible:
        first, *others = map(exact.ExactStatistics.from_bytes, parts)
        return first.merge(*others).round()
    fields = [np.frombuffer(part) for part in parts]
    channels = fields[0].size // 2
    return bnbp.merge_statistics(
        BatchNormStatistics(int(each[0]), each[1 : channels + 1], each[channels + 1 :]) for each in fields
    )


def own_sums(reproducible: bool, *operands: Any, **options: Any) -> bytes:
    """The sums of a part's gradient."""
    if reproducible:
        return exact.batch_norm_training_backprop_reduce(*operands, **options).to_bytes()
    return np.concatenate(bnbp.batch_norm_training_backprop_reduce(*operands, **options)).tobytes()


def whole_sums(reproducible: bool, parts: list[bytes]) -> BatchNormTrainingBackpropSums:
    """The sums of the batch's gradient."""
    if reproducible:
        first, *others = map(exact.ExactSums.from_bytes, parts)
        return first.merge(*others).round()
    whole = np.frombuffer(parts[0]).copy()
    with np.errstate(all="ignore"):  # infinities and NaN are sums like others
        for part in parts[1:]:
            whole += np.frombuffer(part)
    return BatchNormTrainingBackpropSums(*whole.reshape(2, -1))
