"""What is measured: the shapes, the operators and layouts, and arrays to measure them on."""

import importlib
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bnbp

from ..operators import INPUTS, is_backprop
from .machine import cache_limit

Array = NDArray[Any]
Shape = tuple[int, ...]

#: ResNet-50: channels, height and width, and how many of its batch norms have that shape.
RESNET_50 = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}

#: C = 1 and few channels, (N, C), five axes, and sizes that are no multiple of anything.
ODD = (
    (8, 1, 512, 512),
    (8, 3, 512, 512),
    (8192, 256),
    (100_000, 10),
    (4, 32, 8, 28, 28),
    (7, 13, 31, 37),
    (31, 61, 29, 29),
)

#: What a call itself costs is seen in the first.
SMALL = ((2, 16, 8, 8), (4, 8, 4, 4), (16, 32, 14, 14))

#: What fits the caches: small batches, small networks and late layers. Sizes go by powers of two, each with planes of
#: several sizes; (64, 128) is a dense layer of a small network, and smaller than the rest.
CACHE = (
    *((1, 512, 7, 7), (2, 512, 7, 7), (4, 512, 7, 7), (8, 512, 7, 7), (8, 1024, 7, 7), (8, 2048, 7, 7)),
    *((1, 64, 14, 14), (1, 128, 14, 14), (4, 64, 14, 14), (2, 256, 14, 14), (4, 256, 14, 14), (1, 1024, 14, 14)),
    *((8, 256, 14, 14), (4, 1024, 14, 14)),
    *((1, 64, 28, 28), (1, 128, 28, 28), (2, 128, 28, 28), (2, 256, 28, 28), (8, 128, 28, 28)),
    *((1, 32, 56, 56), (1, 64, 56, 56), (2, 64, 56, 56), (4, 64, 56, 56)),
    *((64, 128), (64, 256), (64, 512), (64, 1024), (128, 1024), (256, 1024), (512, 1024)),
)

#: Shapes by set, as (N, C, ...), and how often each counts in the set's total.
SETS: dict[str, dict[Shape, int]] = {
    "network": {(32, channels, size, size): times for (channels, size), times in RESNET_50.items()},
    "odd": dict.fromkeys(ODD, 1),
    "small": dict.fromkeys(SMALL, 1),
    "cache": dict.fromkeys(CACHE, 1),
}

LAYOUTS = ("nchw", "nhwc")

EPSILON = 1e-5


def tensor_type(dtype: str) -> np.dtype[Any]:
    """NumPy's type of that name; bfloat16 is that of ml_dtypes, which is imported for it alone.

    Raises
    ------
    ModuleNotFoundError
        If there is no ml_dtypes.
    """
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)


class Batch(NamedTuple):
    """Inputs for any operator."""

    input: Array
    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    normalized_delta: Array
    addend: Array | None = None
    normalized: Array | None = None  #: what the forward operator makes of them with an activation

    def inputs(self, operator: str) -> tuple[Array, ...]:
        """Those that an operator takes, without those that are for its options."""
        return tuple(getattr(self, name) for name in INPUTS[operator])


def make_batch(shape: Shape, dtype: str) -> Batch:
    """Random inputs whose sums do not cancel, so that an error in them shows, and whose statistics are their own.

    Where the tensors have 16 bits, parameters and statistics are float32, as in mixed-precision training. The
    statistics are those of the tensors as they were rounded.
    """
    rng = np.random.default_rng(0)
    narrow = tensor_type(dtype)
    wide = np.promote_types(narrow, np.float32)
    channels, along = shape[1], (1, -1) + (1,) * (len(shape) - 2)
    others = (0, *range(2, len(shape)))

    def normal() -> Array:
        return rng.standard_normal(shape, np.float64 if wide == np.float64 else np.float32)

    x, dy = normal(), normal()
    dy += 0.5 * x
    dy += wide.type(0.25)
    x *= rng.uniform(0.5, 2, channels).astype(wide).reshape(along)
    x += rng.uniform(-1, 1, channels).astype(wide).reshape(along)
    x, dy = x.astype(narrow, copy=False), dy.astype(narrow, copy=False)
    mean, variance = x.mean(others, dtype=np.float64), x.var(others, dtype=np.float64)
    gamma, beta = rng.uniform(0.5, 1.5, channels), rng.uniform(-1, 1, channels)
    return Batch._make([x, *(vector.astype(wide) for vector in (gamma, beta, mean, variance)), dy, None, None])


def with_activation(batch: Batch, activation: str, addend: bool) -> Batch:
    """The same batch with what an activation needs.

    `gamma` is larger: then the activation is flat for a good part of the elements, that beyond 6 as well. `normalized`
    is made by bnbp. The activation's gradient jumps where it is flat, and whether that is so must not depend on how the
    forward operator rounds.
    """
    batch = batch._replace(gamma=batch.gamma * 4)
    if addend:
        rng, kind = np.random.default_rng(1), batch.gamma.dtype
        added = rng.standard_normal(batch.input.shape, np.float64 if kind == np.float64 else np.float32)
        batch = batch._replace(addend=added.astype(batch.input.dtype, copy=False))
    options: dict[str, Any] = {"activation": activation, "addend": batch.addend}
    normalized = bnbp.batch_norm_inference(*batch[:5], EPSILON, **options)
    return batch._replace(normalized=normalized)


def channels_last(batch: Batch) -> Batch:
    """The same batch in the order N, ..., C."""
    return Batch._make(
        np.ascontiguousarray(np.moveaxis(a, 1, -1)) if a is not None and a.ndim > 1 else a for a in batch
    )


@dataclass(frozen=True)
class Point:
    """A row of a table: what is measured in turns."""

    set: str
    shape: Shape  #: (N, C, ...), whatever the layout
    times: int  #: how often it counts in the total
    operator: str
    layout: str  #: of the arrays; of two axes there is only one
    threads: int
    activation: str | None = None
    addend: bool = False  #: whether something is added before the activation, or that gradient asked for

    def __str__(self) -> str:
        return f"{title(self)}, {label(self.shape)}"

    @property
    def channel_axis(self) -> int:
        """Of the arrays in their layout."""
        return -1 if self.layout == "nhwc" else 1

    @property
    def size(self) -> int:
        """The number of elements of a tensor."""
        return math.prod(self.shape)

    @property
    def in_cache(self) -> bool:
        """Whether its set is about the caches: no memory is waited for, and other implementations are what counts."""
        return self.set == "cache"

    @property
    def reduces(self) -> bool:
        """Whether the tensors are read twice: for sums that every element of the result needs."""
        return self.operator.startswith("training")

    @property
    def plain(self) -> "Point":
        """The same without the activation."""
        return replace(self, activation=None, addend=False)

    @property
    def tensors_reduced(self) -> tuple[str, ...]:
        """The tensors that are read for the sums, and must be read again.

        In the gradient with an addend, what the mask has left of ``normalized_delta`` is a result. So the mask need not
        be read again.
        """
        return ("input", "normalized_delta") if is_backprop(self.operator) else ("input",)

    @property
    def tensors_read(self) -> tuple[str, ...]:
        """All the tensors that the operator reads; without an addend it can compute the mask itself."""
        more = ("normalized",) if is_backprop(self.operator) else ("addend",)
        return (*self.tensors_reduced, *(more if self.addend else ()))

    def options(self, batch: Batch) -> dict[str, Any]:
        """What the operator takes for an activation and an addend."""
        options: dict[str, Any] = {"activation": self.activation} if self.activation else {}
        if self.addend and is_backprop(self.operator):
            options |= {"addend": True, "normalized": batch.normalized}
        elif self.addend:
            options |= {"addend": batch.addend}
        return options

    def second_read(self, dtype: str) -> bool:
        """Whether no cache can keep what the first pass has read until the second needs it.

        The passes can go channel by channel, and then it is the elements of one channel that must be kept; or, where
        the channels are side by side, everything.
        """
        apart = self.layout == "nchw" and len(self.shape) > 2
        elements = self.size // (self.shape[1] if apart else 1)
        return self.reduces and elements * len(self.tensors_reduced) * tensor_type(dtype).itemsize > cache_limit()


def title(point: Point) -> str:
    """What a table is about."""
    return f"{point.operator}{fused_with(point.activation, point.addend)}, {point.layout}, {threads_of(point)}"


def fused_with(activation: str | None, addend: bool) -> str:
    """What is a part of the operator besides the batch norm, in words; nothing if there is nothing."""
    return f" with {activation}{' and addend' * addend}" if activation else ""


def threads_of(point: Point) -> str:
    """The number of threads in words."""
    return f"{point.threads} thread{'s' * (point.threads > 1)}"


def label(shape: Shape) -> str:
    """A shape as the tables write it."""
    return "x".join(map(str, shape))
