"""`SyncBatchNorm`: batch norm over the processes of ``torch.distributed``, for CPU tensors.

The operators' halves do the work of a process, and two collectives put the parts together: one gathers the statistics,
C x 3 numbers of each process, the other one the gradient's sums, C x 2. What is gathered is merged in the order of the
ranks, so that equal runs have equal bits; a reduction by the backend would have an order of its own.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from bnbp._results import BatchNormStatistics
from bnbp._statistics import merge_statistics

from ._functional import Activation, activate, batch_norm, can_be_added, update
from ._gradients import call
from ._modules import Activated

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(Activated):
    """``torch.nn.SyncBatchNorm`` that computes CPU tensors by bnbp, with an activation.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As those of ``torch.nn.SyncBatchNorm``.
    activation : {None, "relu", "relu6"}, default None
        What is applied to the result.

    Notes
    -----
    In training, mean and variance are those of the batches of all processes of the group. These may be of different
    sizes, and empty. ``forward(input, addend=None)`` adds a tensor of the shape of `input` before the activation. As in
    PyTorch's module, the gradients of weight and bias are those of the process's own batch:
    ``DistributedDataParallel`` adds them up. Equal runs have equal bits. A second derivative is an error.

    Outside training, in a group of one process, in a process that is not in the group, and if ``torch.distributed`` is
    not initialised, this is :func:`bnbp.torch.batch_norm`. Addends of another shape or type than `input` are added by
    PyTorch. Tensors on another device run PyTorch's own code. The class is no subclass of ``torch.nn.SyncBatchNorm``,
    for ``DistributedDataParallel`` refuses those on a CPU. The state dict is the same.

    Examples
    --------
    >>> import torch, bnbp.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    >>> model = bnbp.torch.SyncBatchNorm.convert_sync_batchnorm(model)
    >>> type(model[1]).__module__.partition(".")[0], model[1].num_features
    ('bnbp', 3)
    """

    process_group: Any
    _check_input_dim: Any = torch.nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = torch.nn.SyncBatchNorm._check_non_zero_input_channels
    _forward_elsewhere: Any = torch.nn.SyncBatchNorm.forward

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
    ) -> None:
        self._check_activation(activation)
        more: dict[str, Any] = {} if bias else {"bias": False}  # which not every version of PyTorch has
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **more)
        self.process_group = process_group
        self.activation = activation

    def forward(self, input: Tensor, addend: Tensor | None = None, activation: Activation | None = None) -> Tensor:
        """Normalise a batch, add `addend` if there is one, and apply `activation`, or else the module's own."""
        activation = activation or self.activation
        if not input.is_cpu:
            return activate(self._forward_elsewhere(input), activation, addend)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running_mean, running_var, training, factor = self._statistics()
        group = self.process_group or distributed.group.WORLD if self._synchronises() else None
        if group is None or distributed.get_world_size(group) <= 1:  # -1 in a process that is not in the group
            return batch_norm(
                input,
                running_mean,
                running_var,
                self.weight,
                self.bias,
                training,
                factor,
                self.eps,
                activation=activation,
                addend=addend,
            )
        arguments = (input, running_mean, running_var, self.weight, self.bias, factor, self.eps)
        if can_be_added(input, addend):
            return _synchronised(*arguments, activation, addend, group)  # type: ignore[no-any-return]
        return activate(_synchronised(*arguments, None, None, group), activation, addend)

    def _synchronises(self) -> bool:
        return self.training and distributed.is_available() and distributed.is_initialized()

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replace each batch norm of a model by a `SyncBatchNorm` with the same parameters and statistics.

        Parameters
        ----------
        module : torch.nn.Module
            The model, or a batch norm itself; also one of bnbp's, whose activation is kept.
        process_group : optional
            The processes to synchronise with; all, if left out.

        Returns
        -------
        torch.nn.Module
            `module`, or what replaces it if it is a batch norm itself.
        """
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for name, child in module.named_children():
                setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
            return module
        converted = cls(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group,
            activation=getattr(module, "activation", None),
        )
        converted.weight, converted.bias = module.weight, module.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(converted, name, getattr(module, name))
        converted.training = module.training
        if hasattr(module, "qconfig"):
            converted.qconfig = module.qconfig
        return converted


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a trace would be of one process
def _synchronised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    activation: Activation | None,
    addend: Tensor | None,
    group: Any,
) -> Tensor:
    """Normalise with the statistics of all processes, and update the running ones."""
    like = next((each for each in (weight, bias, running_mean) if each is not None), input)
    normalized, mean, variance, count = _Synchronised.apply(
        input, weight, bias, addend, eps, activation, like.dtype, group
    )
    if running_mean is not None and running_var is not None:
        update(running_mean, running_var, mean, variance, momentum, count)
    return normalized  # type: ignore[no-any-return]


class _Synchronised(torch.autograd.Function):
    """The operator, over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        addend: Tensor | None,
        eps: float,
        activation: Activation | None,
        dtype: torch.dtype,
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        own = input.numel() // input.shape[1]
        mean, m2 = call("batch_norm_training_statistics", input)
        parts = _gather(torch.stack([torch.full_like(mean, own), mean, m2]), group)
        whole = merge_statistics(
            *(BatchNormStatistics(int(n[0]), part_mean.numpy(), part_m2.numpy()) for n, part_mean, part_m2 in parts)
        )
        if whole.count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        mean, variance = (torch.from_numpy(each).to(dtype) for each in (whole.mean, whole.variance))
        normalized = call("batch_norm_inference", input, weight, bias, mean, variance, addend, eps, activation)
        kept = normalized if activation is not None and addend is not None else None
        ctx.save_for_backward(input, weight, bias, mean, variance, kept)
        ctx.options = eps, activation, activation is not None and addend is not None
        ctx.group, ctx.count = group, whole.count
        ctx.mark_non_differentiable(mean, variance)
        return normalized, mean, variance, whole.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, variance, normalized = ctx.saved_tensors
        wants_input, wants_weight, wants_bias, wants_addend = ctx.needs_input_grad[:4]
        epsilon, activation, masked = ctx.options
        statistics = input, weight, bias, mean, variance, delta
        own = call(
            "batch_norm_training_backprop_reduce",
            *(input, mean, delta, weight, bias, variance, normalized, epsilon, activation, masked),
        )
        whole = _gather(torch.stack(own), ctx.group)
        for part in whole[1:]:
            whole[0].add_(part)

        def gradients(sums: Any, *mask: bool) -> Any:
            attributes = ctx.count, epsilon, activation, masked, list(mask)
            return call("batch_norm_training_backprop_apply", *statistics, *sums, normalized, *attributes)

        input_delta, _, _, addend_delta = gradients(whole[0], wants_input, False, False, wants_addend and masked)
        _, weight_delta, bias_delta, _ = gradients(own, False, wants_weight, wants_bias, False)
        return (
            input_delta if wants_input else None,
            weight_delta if wants_weight else None,
            bias_delta if wants_bias else None,
            (addend_delta if masked else delta) if wants_addend else None,
            *(None,) * 4,
        )


def _gather(part: Tensor, group: Any) -> list[Tensor]:
    """What each process has, in the order of the ranks."""
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part, group=group)
    return parts
