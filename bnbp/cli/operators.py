"""The operators by the names of the command line, what each takes, and what it returns."""

from enum import StrEnum

__all__ = ["INPUTS", "OPTIONAL", "OUTPUTS", "Operator"]


class Operator(StrEnum):
    """The operators by name; the functions of bnbp have these names after ``batch_norm_``."""

    training = "training"
    training_backprop = "training_backprop"
    inference = "inference"
    inference_backprop = "inference_backprop"


_BACKPROP_INPUTS = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")
_DELTAS = ("input_delta", "gamma_delta", "beta_delta")

#: The arrays that each operator takes, in its order.
INPUTS: dict[str, tuple[str, ...]] = {
    Operator.training: ("input", "gamma", "beta"),
    Operator.training_backprop: _BACKPROP_INPUTS,
    Operator.inference: ("input", "gamma", "beta", "mean", "variance"),
    Operator.inference_backprop: _BACKPROP_INPUTS,
}

#: Those that may be left out.
OPTIONAL = ("gamma", "beta")

#: The results of each operator. The first is a tensor; the others have a value for each channel.
OUTPUTS: dict[str, tuple[str, ...]] = {
    Operator.training: ("normalized", "batch_mean", "batch_variance"),
    Operator.training_backprop: _DELTAS,
    Operator.inference: ("normalized",),
    Operator.inference_backprop: _DELTAS,
}
