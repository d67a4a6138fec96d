"""The operators by the names of the command line, and what each takes."""

from enum import StrEnum

__all__ = ["INPUTS", "OPTIONAL", "Operator"]


class Operator(StrEnum):
    """The operators that ``bnbp run`` offers; the functions of bnbp have these names after ``batch_norm_``."""

    training = "training"
    training_backprop = "training_backprop"
    inference = "inference"
    inference_backprop = "inference_backprop"


_BACKPROP_INPUTS = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")
INPUTS = {
    Operator.training: ("input", "gamma", "beta"),
    Operator.training_backprop: _BACKPROP_INPUTS,
    Operator.inference: ("input", "gamma", "beta", "mean", "variance"),
    Operator.inference_backprop: _BACKPROP_INPUTS,
}
OPTIONAL = ("gamma", "beta")
