"""`batch_norm`: PyTorch's function, computed by bnbp where it can be."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._gradients import call

__all__ = ["Activation", "activate", "batch_norm", "can_be_added", "runs_here", "update"]

Activation = Literal["relu", "relu6"]

_HALF = (torch.bfloat16, torch.float16)
_TYPES = (torch.float32, torch.float64, *_HALF)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    r"""Normalise each channel as ``torch.nn.functional.batch_norm`` does, with an optional addition and activation.

    Computes ``activation(batch_norm(input) + addend)``. The first eight parameters, the result, its memory format and
    the errors are the same as in PyTorch's function.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        The batch.
    running_mean, running_var : Tensor, shape (C,), or None
        With `training`, they are updated with the batch's mean and unbiased variance, if they are given. Without
        `training`, the batch is normalised with them.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift of each channel; None stands for ones and zeros.
    training : bool, default False
        Whether to normalise with the batch's own mean and biased variance.
    momentum : float, default 0.1
        The weight of the batch in the update of the running statistics.
    eps : float, default 1e-5
        Added to the variance before the square root.
    activation : {None, "relu", "relu6"}, default None
        What is applied to the result.
    addend : Tensor, optional
        A tensor that is added before the activation.

    Returns
    -------
    Tensor
        Of the shape and type of `input`.

    Raises
    ------
    ValueError
        As PyTorch's function, and if `activation` is another string.

    Notes
    -----
    bnbp computes strided CPU tensors of float16, bfloat16, float32 and float64, in any memory layout and without a
    copy, on ``torch.get_num_threads()`` threads. The formulas are given with :func:`bnbp.batch_norm_training`,
    :func:`bnbp.batch_norm_inference` and their gradients. Everything else runs PyTorch's own code: other devices and
    layouts, empty batches, subclasses of `Tensor` that take over its functions or wrap other tensors, forward-mode
    derivatives, running statistics that ``torch.func`` transforms, ``torch.jit.trace``, statistics and parameters of
    different types, and addends of another shape or type than `input`.

    Examples
    --------
    >>> import torch, bnbp.torch
    >>> x = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[3.0, 6.0], [5.0, 5.0]]])
    >>> bnbp.torch.batch_norm(x, None, None, training=True, eps=0.5, activation="relu")[:, 0]
    tensor([[0.0000, 0.0000],
            [0.0000, 1.5000]])
    """
    tensors = (input, running_mean, running_var, weight, bias, addend)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            addend=addend,
        )
    if activation not in (None, "relu", "relu6"):
        raise ValueError(f'activation: expected None, "relu" or "relu6", got {activation!r}')
    typed = isinstance(training, bool) and isinstance(momentum, (float, int))
    if not typed or not runs_here(input, (weight, bias, running_mean, running_var), addend, training, eps):
        result = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return activate(result, activation, addend)
    if not training:
        return call(  # type: ignore[no-any-return]
            "batch_norm_inference", input, weight, bias, running_mean, running_var, addend, eps, activation
        )
    if weight is None and bias is None and running_mean is not None and running_mean.dtype is not input.dtype:
        weight = torch.ones_like(running_mean)  # which says in what type the statistics are wanted
    normalized, mean, variance = call("batch_norm_training", input, weight, bias, addend, eps, activation)
    if running_mean is not None and running_var is not None:
        update(running_mean, running_var, mean, variance, momentum, input.numel() // input.shape[1])
    return normalized  # type: ignore[no-any-return]


def runs_here(
    input: Tensor, vectors: tuple[Tensor | None, ...], addend: Tensor | None, training: bool, eps: float
) -> bool:
    """Whether bnbp computes a call. PyTorch computes the others, and raises the errors.

    `vectors` are the parameters, and then the running mean and variance.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # a trace is run elsewhere, and exported
    if training and vectors[-1] is not None and _transforming():
        return False  # the transforms of `torch.func` have rules for PyTorch's update of running statistics
    try:
        return _fits(input, vectors, addend, training, eps)
    except AttributeError:  # of what is not a tensor
        return False


def _transforming() -> bool:
    """Whether a transform of `torch.func` is at work, and is not traced itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _fits(input: Tensor, vectors: tuple[Tensor | None, ...], addend: Tensor | None, training: bool, eps: float) -> bool:
    """The tensors' types and shapes, and the numbers."""
    dtype = input.dtype
    if dtype not in _TYPES or input.dim() < 2 or not input.is_cpu or input.layout is not torch.strided:
        return False
    if type(input) is not Tensor and is_traceable_wrapper_subclass(input):
        return False  # such as DTensor, which knows PyTorch's operators only
    channels = input.size(1)
    if not 0 < eps < math.inf or input.numel() <= (channels if training else 0) or forward_ad._current_level >= 0:
        return False
    parameters = None
    for vector in vectors:
        if vector is not None:
            parameters = parameters or vector.dtype
            if vector.dtype is not parameters or not vector.is_cpu or vector.dim() != 1 or vector.size(0) != channels:
                return False
    if parameters is not dtype and parameters is not None and not (parameters is torch.float32 and dtype in _HALF):
        return False
    running_mean, running_var = vectors[-2:]
    if running_mean is None or running_var is None:
        if not training or running_mean is not running_var:
            return False
    elif running_mean.requires_grad or running_var.requires_grad:
        return False
    return can_be_added(input, addend)


def can_be_added(input: Tensor, addend: Tensor | None) -> bool:
    """Whether the operators take the addend; others are broadcast and promoted by PyTorch."""
    if addend is None:
        return True
    same = addend.shape == input.shape and addend.dtype is input.dtype
    return same and addend.is_cpu and addend.layout is torch.strided


def activate(result: Tensor, activation: Activation | None, addend: Tensor | None) -> Tensor:
    """What follows the batch norm, by PyTorch's operators."""
    if addend is not None:
        result = result + addend
    if activation is None:
        return result
    return F.relu(result) if activation == "relu" else F.relu6(result)


def update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, momentum: float, count: int
) -> None:
    """Move the running statistics towards the batch's; the variance there is the unbiased one."""
    _unversioned(running_mean).lerp_(mean, momentum)
    statistic = _unversioned(running_var)
    statistic.lerp_(variance, momentum).add_(variance, alpha=momentum / (count - 1))  # of m / (m - 1) variances


def _unversioned(statistic: Tensor) -> Tensor:
    """The same memory. As in PyTorch, the update does not spoil the gradient of an evaluation before it."""
    return statistic if torch.compiler.is_compiling() else statistic.data
