"""`SyncBatchNorm`: batch norm over the processes of ``torch.distributed``, for CPU tensors.

Each process computes the operators' halves on its own part. Two collectives put the parts together: one gathers the
statistics, and the other gathers the gradient's sums. The parts are exact sums, see `bnbp.exact`, or numbers, C x 3 and
C x 2. Numbers are merged in the order of the ranks, because a reduction by the backend would have an order of its own.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from bnbp import exact
from bnbp._results import BatchNormStatistics, BatchNormTrainingBackpropSums
from bnbp._statistics import merge_statistics

from ._functional import Activation, activate, batch_norm, can_be_added, update
from ._gradients import call
from ._modules import Activated

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(Activated):
    """``torch.nn.SyncBatchNorm`` for CPU tensors, computed by bnbp, with an activation.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias
        As in ``torch.nn.SyncBatchNorm``.
    activation : {None, "relu", "relu6"}, default None
        What is applied to the result.
    reproducible : bool, default True
        Whether statistics and gradients have the same bits however the samples are distributed over processes, as long
        as each process has whole samples, in the same memory format. Otherwise the parts are merged in the order of the
        ranks, and equal runs have equal bits.

    Notes
    -----
    In training, mean and variance are computed from the batches of all processes of the group. These may be of
    different sizes, and empty. ``forward(input, addend=None)`` adds a tensor of the shape of `input` before the
    activation. As in PyTorch's module, the gradients of weight and bias are for the process's own batch.
    ``DistributedDataParallel`` adds them up, in an order of its own. A second derivative raises an error.

    Outside training, in a process that is not in the group, and if ``torch.distributed`` is not initialised, this is
    :func:`bnbp.torch.batch_norm`. PyTorch adds addends of another shape or type than `input`. Tensors on another device
    run PyTorch's own code. The class is not a subclass of ``torch.nn.SyncBatchNorm``, because
    ``DistributedDataParallel`` refuses instances of that class on a CPU. The state dict is the same.

    Examples
    --------
    >>> import torch, bnbp.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    >>> model = bnbp.torch.SyncBatchNorm.convert_sync_batchnorm(model)
    >>> type(model[1]).__module__.partition(".")[0], model[1].num_features
    ('bnbp', 3)
    """

    process_group: Any
    reproducible: bool = True
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
        reproducible: bool = True,
    ) -> None:
        self._check_activation(activation)
        more: dict[str, Any] = {} if bias else {"bias": False}  # which not every version of PyTorch has
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **more)
        self.process_group = process_group
        self.activation = activation
        self.reproducible = reproducible

    def forward(self, input: Tensor, addend: Tensor | None = None, activation: Activation | None = None) -> Tensor:
        """Normalise a batch, add `addend` if there is one, and apply `activation`, or else the module's own."""
        activation = activation or self.activation
        if not input.is_cpu:
            return activate(self._forward_elsewhere(input), activation, addend)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running_mean, running_var, training, factor = self._statistics()
        group = self.process_group or distributed.group.WORLD if self._synchronises() else None
        fewest = 1 if self.reproducible else 2  # and -1 in a process that is not in the group
        if group is None or distributed.get_world_size(group) < fewest:
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
            return _synchronised(*arguments, activation, addend, group, self.reproducible)  # type: ignore[no-any-return]
        return activate(_synchronised(*arguments, None, None, group, self.reproducible), activation, addend)

    def _synchronises(self) -> bool:
        return self.training and distributed.is_available() and distributed.is_initialized()

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None, *, reproducible: bool = True
    ) -> torch.nn.Module:
        """Replace each batch norm of a model by a `SyncBatchNorm` with the same parameters and statistics.

        Parameters
        ----------
        module : torch.nn.Module
            The model, or a batch norm itself; also one of bnbp's, whose activation is kept.
        process_group : optional
            The processes to synchronise with; by default all.
        reproducible : bool, default True
            As in the class.

        Returns
        -------
        torch.nn.Module
            `module`, or what replaces it if it is a batch norm itself.
        """
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for name, child in module.named_children():
                converted = cls.convert_sync_batchnorm(child, process_group, reproducible=reproducible)
                setattr(module, name, converted)
            return module
        converted = cls(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group,
            activation=getattr(module, "activation", None),
            reproducible=reproducible,
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
    reproducible: bool,
) -> Tensor:
    """Normalise with the statistics of all processes, and update the running ones."""
    like = next((each for each in (weight, bias, running_mean) if each is not None), input)
    normalized, mean, variance, count = _Synchronised.apply(
        input, weight, bias, addend, eps, activation, like.dtype, group, reproducible
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
        reproducible: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        whole = _exact_statistics(input, group) if reproducible else _statistics(input, group)
        if whole.count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        mean, variance = (torch.from_numpy(each).to(dtype) for each in (whole.mean, whole.variance))
        normalized = call("batch_norm_inference", input, weight, bias, mean, variance, addend, eps, activation)
        kept = normalized if activation is not None and addend is not None else None
        ctx.save_for_backward(input, weight, bias, mean, variance, kept)
        ctx.options = eps, activation, activation is not None and addend is not None
        ctx.group, ctx.count, ctx.reproducible = group, whole.count, reproducible
        ctx.mark_non_differentiable(mean, variance)
        return normalized, mean, variance, whole.count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, delta: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, variance, normalized = ctx.saved_tensors
        wants_input, wants_weight, wants_bias, wants_addend = ctx.needs_input_grad[:4]
        epsilon, activation, masked = ctx.options
        statistics = input, weight, bias, mean, variance, delta
        arguments = input, mean, delta, weight, bias, variance, normalized, epsilon, activation, masked
        own, whole = _exact_sums(ctx.group, *arguments) if ctx.reproducible else _sums(ctx.group, *arguments)

        def gradients(sums: Any, *mask: bool) -> Any:
            attributes = ctx.count, epsilon, activation, masked, list(mask)
            return call("batch_norm_training_backprop_apply", *statistics, *sums, normalized, *attributes)

        input_delta, _, _, addend_delta = gradients(whole, wants_input, False, False, wants_addend and masked)
        _, weight_delta, bias_delta, _ = gradients(own, False, wants_weight, wants_bias, False)
        return (
            input_delta if wants_input else None,
            weight_delta if wants_weight else None,
            bias_delta if wants_bias else None,
            (addend_delta if masked else delta) if wants_addend else None,
            *(None,) * 5,
        )


def _statistics(input: Tensor, group: Any) -> BatchNormStatistics:
    """The statistics of the whole batch, merged in the order of the ranks."""
    mean, m2 = call("batch_norm_training_statistics", input)
    parts = _gather(torch.stack([torch.full_like(mean, input.numel() // input.shape[1]), mean, m2]), group)
    return merge_statistics(
        *(BatchNormStatistics(int(n[0]), part_mean.numpy(), part_m2.numpy()) for n, part_mean, part_m2 in parts)
    )


def _exact_statistics(input: Tensor, group: Any) -> BatchNormStatistics:
    own = exact.batch_norm_training_statistics(input.detach())
    parts = [exact.ExactStatistics.from_bytes(data) for data in _gather_bytes(own.to_bytes(), own.channels, group)]
    return parts[0].merge(*parts[1:]).round()


def _sums(group: Any, *arguments: Any) -> tuple[Any, Any]:
    """The gradient's sums over the own batch, and over the whole batch, added in the order of the ranks."""
    own = call("batch_norm_training_backprop_reduce", *arguments)
    whole = _gather(torch.stack(own), group)
    for part in whole[1:]:
        whole[0].add_(part)
    return own, whole[0]


def _exact_sums(group: Any, *arguments: Any) -> tuple[Any, Any]:
    input, mean, delta, weight, bias, variance, normalized, epsilon, activation, masked = arguments
    named = {"gamma": weight, "beta": bias, "variance": variance, "normalized": normalized}
    own = exact.batch_norm_training_backprop_reduce(
        *(each.detach() for each in (input, mean, delta)),
        **{name: None if each is None else each.detach() for name, each in named.items()},  # type: ignore[arg-type]
        epsilon=epsilon,
        activation=activation,
        addend=masked,
    )
    parts = [exact.ExactSums.from_bytes(data) for data in _gather_bytes(own.to_bytes(), own.channels, group)]
    return _tensors(own.round()), _tensors(parts[0].merge(*parts[1:]).round())


def _tensors(sums: BatchNormTrainingBackpropSums) -> tuple[Tensor, ...]:
    return tuple(map(torch.from_numpy, sums))


def _gather_bytes(data: bytes, channels: int, group: Any) -> list[bytes]:
    """The bytes of each process, of any length. One collective is enough unless they are longer than usual."""
    room = 8 + (128 + 72 * channels + 7) // 8 * 8
    while True:
        part = torch.zeros(room, dtype=torch.uint8)
        message = (len(data).to_bytes(8, "little") + data)[:room]
        part[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [bytes(each.numpy()) for each in _gather(part, group)]
        lengths = [int.from_bytes(each[:8], "little") for each in parts]
        if 8 + max(lengths) <= room:
            return [each[8 : 8 + length] for each, length in zip(parts, lengths, strict=True)]
        room = 8 + max(lengths)


def _gather(part: Tensor, group: Any) -> list[Tensor]:
    """The tensor of each process, in the order of the ranks."""
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part, group=group)
    return parts
