"""The modules: subclasses of PyTorch's with the same state, whose forward pass is `bnbp.torch.batch_norm`."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ._functional import Activation, batch_norm

__all__ = [
    "Activated",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class Activated(torch.nn.modules.batchnorm._BatchNorm):
    """The base class of all modules: the activation, and the count of batches."""

    #: The activation after the normalisation: None, "relu" or "relu6".
    activation: Activation | None = None

    @staticmethod
    def _check_activation(activation: Any) -> None:
        if activation not in (None, "relu", "relu6"):
            raise ValueError(f'activation: expected None, "relu" or "relu6", got {activation!r}')

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, bool, float]:
        """Count the batch.

        Returns the running statistics, whether to normalise with the batch's own, and the weight of the batch in the
        running statistics.
        """
        factor = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                factor = 1.0 / float(self.num_batches_tracked)
        training = self.training or (self.running_mean is None and self.running_var is None)
        if self.training and not self.track_running_stats:
            return None, None, training, factor
        return self.running_mean, self.running_var, training, factor

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class _BatchNorm(Activated):
    """The base class of the modules for one process."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
    ) -> None:
        self._check_activation(activation)
        more: dict[str, Any] = {} if bias else {"bias": False}  # which not every version of PyTorch has
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **more)
        self.activation = activation

    def forward(self, input: Tensor, addend: Tensor | None = None, activation: Activation | None = None) -> Tensor:
        """Normalise a batch, add `addend` if there is one, and apply `activation`, or else the module's own."""
        if isinstance(input, Proxy):  # `torch.fx` traces it: a module is one node, as PyTorch's are
            arguments = (input,) if addend is None and activation is None else (input, addend, activation)
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), arguments, {})
        self._check_input_dim(input)
        running_mean, running_var, training, factor = self._statistics()
        return batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            factor,
            self.eps,
            activation=activation or self.activation,
            addend=addend,
        )


def _documented(rank: str) -> str:
    return f"""``torch.nn.BatchNorm{rank}``, computed by bnbp, with an activation.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As in ``torch.nn.BatchNorm{rank}``.
    activation : {{None, "relu", "relu6"}}, default None
        What is applied to the result.

    Notes
    -----
    ``forward(input, addend=None)`` adds a tensor of the shape of `input` before the activation. The state dict is the
    same as that of ``torch.nn.BatchNorm{rank}``. PyTorch's own code runs what :func:`bnbp.torch.batch_norm` does not
    compute.
    """


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    __doc__ = _documented("1d")


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    __doc__ = _documented("2d")


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    __doc__ = _documented("3d")


# A lazy module becomes another one with its first batch, in a call that has found its own `forward` before that.


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    """``torch.nn.LazyBatchNorm1d`` that becomes a :class:`BatchNorm1d`."""

    cls_to_become = BatchNorm1d
    forward = _BatchNorm.forward


class LazyBatchNorm2d(torch.nn.LazyBatchNorm2d):
    """``torch.nn.LazyBatchNorm2d`` that becomes a :class:`BatchNorm2d`."""

    cls_to_become = BatchNorm2d
    forward = _BatchNorm.forward


class LazyBatchNorm3d(torch.nn.LazyBatchNorm3d):
    """``torch.nn.LazyBatchNorm3d`` that becomes a :class:`BatchNorm3d`."""

    cls_to_become = BatchNorm3d
    forward = _BatchNorm.forward
