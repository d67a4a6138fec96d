"""The operators by the names of the command line, what each takes, and what it returns."""

from enum import StrEnum

__all__ = [
    "INPUTS",
    "NAMES",
    "OUTPUTS",
    "STATISTICS",
    "TENSORS",
    "Activation",
    "Operator",
    "inputs",
    "is_backprop",
    "optional",
    "outputs",
]


class Operator(StrEnum):
    """The operators by name; the functions of bnbp have these names after ``batch_norm_``."""

    training = "training"
    training_backprop = "training_backprop"
    inference = "inference"
    inference_backprop = "inference_backprop"


class Activation(StrEnum):
    """What may follow the batch norm as a part of the operator."""

    relu = "relu"
    relu6 = "relu6"


_BACKPROP_INPUTS = ("input", "gamma", "beta", "mean", "variance", "normalized_delta")
_DELTAS = ("input_delta", "gamma_delta", "beta_delta")

#: The arrays that each operator takes, in its order; :func:`inputs` has those of its options as well.
INPUTS: dict[str, tuple[str, ...]] = {
    Operator.training: ("input", "gamma", "beta"),
    Operator.training_backprop: _BACKPROP_INPUTS,
    Operator.inference: ("input", "gamma", "beta", "mean", "variance"),
    Operator.inference_backprop: _BACKPROP_INPUTS,
}

#: The results of each operator; :func:`outputs` has that of its option as well.
OUTPUTS: dict[str, tuple[str, ...]] = {
    Operator.training: ("normalized", "batch_mean", "batch_variance"),
    Operator.training_backprop: _DELTAS,
    Operator.inference: ("normalized",),
    Operator.inference_backprop: _DELTAS,
}

#: The arrays with a value for each element. The others have a value for each channel.
TENSORS = ("input", "normalized_delta", "addend", "normalized", "input_delta", "addend_delta")

#: What training returns, and the other operators take under other names.
STATISTICS = {"mean": "batch_mean", "variance": "batch_variance"}

#: What any operator takes or returns.
NAMES = {*TENSORS, *(name for names in (*INPUTS.values(), *OUTPUTS.values()) for name in names)}


def is_backprop(op: str) -> bool:
    """Whether it is a gradient operator."""
    return op.endswith("backprop")


def inputs(op: str, activation: str | None) -> tuple[str, ...]:
    """All the arrays that an operator takes, with those that are for its options."""
    if is_backprop(op):
        return (*INPUTS[op], "normalized") if activation else INPUTS[op]
    return (*INPUTS[op], "addend")


def optional(op: str, activation: str | None, has_addend: bool) -> tuple[str, ...]:
    """Those of :func:`inputs` that may be left out.

    The mask of an activation can be computed again without `normalized`, but not where something was added before it.
    """
    names = ("gamma", "beta", "addend", *(() if has_addend else ("normalized",)))
    return tuple(name for name in inputs(op, activation) if name in names)


def outputs(op: str, addend_delta: bool) -> tuple[str, ...]:
    """The results of an operator, with the gradient of an addend if that is asked for."""
    return (*OUTPUTS[op], "addend_delta") if addend_delta else OUTPUTS[op]
