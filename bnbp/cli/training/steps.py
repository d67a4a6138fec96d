"""A candidate: its networks, data, losses and steps."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import networks as builders
from .cases import CHANNELS_LAST, Case, Way

__all__ = ["Training"]

Network = Callable[..., Any]

SEED = 0
LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Training:
    """The training of a network, on the same batch at every step.

    Parameters
    ----------
    case : Case
        Which network, and which batch.
    way : Way
        How it is computed. The first weights and the data do not depend on it.
    dtype : torch.dtype, default torch.float32
        Of weights and data.

    Attributes
    ----------
    modules : tuple of Module
        The networks, as they are before ``torch.compile``: two for a GAN, otherwise one.
    """

    def __init__(self, case: Case, way: Way, dtype: torch.dtype = torch.float32) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            modules = getattr(builders, case.network)(**case.sizes)
            self.modules: tuple[nn.Module, ...] = modules if isinstance(modules, tuple) else (modules,)
            data = _data(self.modules, case)
        if way.converted:
            from bnbp.torch import convert

            self.modules = tuple(convert(module) for module in self.modules)
        layout = torch.channels_last if way.format == CHANNELS_LAST else torch.contiguous_format
        for module in self.modules:
            module.to(dtype).to(memory_format=layout)  # type: ignore[call-overload, unused-ignore]
        self.data = [
            tensor.to(dtype).contiguous(memory_format=layout if tensor.dim() == 4 else torch.contiguous_format)
            if tensor.is_floating_point()
            else tensor
            for tensor in data
        ]
        self._losses = _adversarial if len(self.modules) > 1 else _classification
        self._called: list[Network] = [torch.compile(module) if way.compiled else module for module in self.modules]
        self._optimizers = [
            torch.optim.SGD(module.parameters(), LEARNING_RATE, MOMENTUM) for module in reversed(self.modules)
        ]

    def step(self) -> list[Tensor]:
        """Forward pass, loss, backward pass and SGD; the losses."""
        losses = []
        for optimizer, loss in zip(self._optimizers, self._losses(self._called, self.data), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def gradients(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The losses, and the gradients of the parameters by network and name; the weights stay as they are."""
        losses = []
        for loss in self._losses(self._called, self.data):
            loss.backward()
            losses.append(loss.detach())
        gradients = []
        for module in self.modules:
            named = dict(module.named_parameters())
            gradients.append({name: p.grad for name, p in named.items() if p.grad is not None})
            module.zero_grad()
        return losses, gradients


def _data(modules: Sequence[nn.Module], case: Case) -> list[Tensor]:
    """A batch: images or rows and their labels, or the images and the noise of a GAN."""
    batch = torch.randn(case.shape)
    if len(modules) > 1:
        latent = next(modules[0].parameters()).shape[0]
        return [batch.tanh(), torch.randn(case.shape[0], latent, 1, 1)]
    with torch.no_grad():
        classes, *pixels = modules[0].eval()(batch[:1]).shape[1:]
    modules[0].train()
    return [batch, torch.randint(classes, (case.shape[0], *pixels))]


# Each yields the losses in the order of the optimizers. The next one is computed after the step of the one before.


def _classification(networks: Sequence[Network], data: Sequence[Tensor]) -> Iterator[Tensor]:
    [model] = networks
    batch, labels = data
    yield F.cross_entropy(model(batch), labels)


def _adversarial(networks: Sequence[Network], data: Sequence[Tensor]) -> Iterator[Tensor]:
    """Of the discriminator, and then of the generator."""
    generator, discriminator = networks
    images, noise = data
    fakes = generator(noise)
    real, fake = discriminator(images), discriminator(fakes.detach())
    yield F.softplus(-real).mean() + F.softplus(fake).mean()
    yield F.softplus(-discriminator(fakes)).mean()
