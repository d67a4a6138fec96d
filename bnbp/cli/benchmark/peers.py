"""Other implementations of the operators; an instance of a class here has imported one."""

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np

from .candidates import EPSILON, Call, Candidate
from .machine import cpus
from .points import Array, Batch, Point

Formulas = Callable[..., tuple[Any, ...]]


class Peer:
    """Another implementation; an instance has imported it."""

    name: ClassVar[str]
    version: str

    def __init__(self, threads: int, dtype: str) -> None:
        """Import it. Where the number of threads can be set only once, it is the largest that will be asked for."""
        raise NotImplementedError

    def cannot(self, point: Point, dtype: str) -> str | None:
        """Why it has no time for this row, or None."""
        return None

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """The operator, with arrays of its own where it cannot take ours."""
        raise NotImplementedError


def formulas(xp: Any, operator: str, rank: int, channel_axis: int) -> Formulas:
    """The operator written out, for an array library with NumPy's functions: in the type of the parameters."""
    others = tuple(axis for axis in range(rank) if axis != channel_axis % rank)

    def along(vector: Any) -> Any:
        return xp.expand_dims(vector, others)

    def training(x: Any, gamma: Any, beta: Any) -> tuple[Any, ...]:
        mean = xp.mean(x, others)
        centered = x - along(mean)
        variance = xp.mean(centered * centered, others)
        return centered * along(gamma / xp.sqrt(variance + EPSILON)) + along(beta), mean, variance

    def inference(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> tuple[Any, ...]:
        return ((x - along(mean)) * along(gamma / xp.sqrt(variance + EPSILON)) + along(beta),)

    def backprop(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any, dy: Any) -> tuple[Any, ...]:
        inv_std = 1 / xp.sqrt(variance + EPSILON)
        xhat = (x - along(mean)) * along(inv_std)
        dbeta, dgamma = xp.sum(dy, others), xp.sum(dy * xhat, others)
        if operator == "training_backprop":
            m = x.size // x.shape[channel_axis]
            dy = dy - along(dbeta / m) - xhat * along(dgamma / m)
        return along(gamma * inv_std) * dy, dgamma, dbeta

    functions: dict[str, Formulas] = {"training": training, "inference": inference}
    function: Formulas = functions.get(operator, backprop)

    def rounded(*inputs: Any) -> tuple[Any, ...]:
        tensor, parameter = inputs[0].dtype, inputs[1].dtype
        first, *rest = function(*(xp.asarray(a, parameter) for a in inputs))
        return xp.asarray(first, tensor), *rest

    return rounded


class NumPy(Peer):
    """The formulas in the type of the parameters, on one thread whatever is asked for."""

    name = "numpy"

    def __init__(self, threads: int, dtype: str) -> None:
        self.version = np.__version__

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """On our arrays."""
        function = formulas(np, point.operator, len(point.shape), point.channel_axis)
        return Candidate(self.name, partial(function, *batch.inputs(point.operator)), tuple, self.name)


class Torch(Peer):
    """The functions below ``torch.nn.BatchNorm2d`` and its gradient; channels-last is PyTorch's memory format."""

    name = "torch"

    def __init__(self, threads: int, dtype: str) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.version = self.torch.__version__

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """On tensors that share the memory of our arrays."""
        torch, aten = self.torch, self.torch.ops.aten
        torch.set_num_threads(point.threads)

        def tensor(a: Array) -> Any:  # by way of integers: NumPy's bfloat16 is none of PyTorch's
            shared = torch.from_numpy(a.view(f"i{a.itemsize}")).view(getattr(torch, a.dtype.name))
            return shared if a.ndim == 1 else shared.moveaxis(point.channel_axis, 1)

        x, gamma, beta, mean, variance, dy = map(tensor, batch)
        call: Call
        match point.operator:
            case "training":
                call = partial(aten.native_batch_norm, x, gamma, beta, None, None, True, 0.1, EPSILON)
            case "inference":
                call = partial(aten.native_batch_norm, x, gamma, beta, mean, variance, False, 0.1, EPSILON)
            case "training_backprop":  # what it keeps of the variance is 1 / sqrt(variance + epsilon)
                kept = (None, None, mean, (variance + EPSILON).rsqrt(), True)
                call = partial(aten.native_batch_norm_backward, dy, x, gamma, *kept, EPSILON, [True] * 3)
            case _:
                given = (mean, variance, None, None, False)
                call = partial(aten.native_batch_norm_backward, dy, x, gamma, *given, EPSILON, [True] * 3)

        def outputs(results: Any) -> Iterator[Array]:
            first, second, third = results
            yield np.moveaxis(first.to(gamma.dtype).numpy(), 1, point.channel_axis)
            yield second.numpy()
            yield (third.double() ** -2 - EPSILON).numpy() if point.operator == "training" else third.numpy()

        return Candidate(self.name, call, outputs, self.name)


class TensorFlow(Peer):
    """The fused operators, which take four axes; other numbers of axes are reshaped to four, which moves nothing."""

    name = "tensorflow"

    def __init__(self, threads: int, dtype: str) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with _no_stderr():  # the level above does not hold for its first lines
            self.tf: Any = importlib.import_module("tensorflow")
        self.tf.config.threading.set_intra_op_parallelism_threads(threads)
        self.threads = threads
        self.version = self.tf.__version__

    def cannot(self, point: Point, dtype: str) -> str | None:
        """It has no float64, and one number of threads."""
        if dtype == "float64":
            return "its operators have no float64"
        if point.threads != self.threads:
            return f"its {self.threads} threads cannot be changed; use --threads {point.threads}"
        return None

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """On tensors of its own."""
        tf, ops = self.tf, self.tf.raw_ops
        n, c = point.shape[:2]
        rest = point.shape[2:] or (1, 1)
        middle = (math.prod(rest[:-1]), rest[-1])
        last = point.layout == "nhwc" or len(point.shape) == 2  # of two axes it is both, and this is faster
        shape = (n, *middle, c) if last else (n, c, *middle)
        x, gamma, beta, mean, variance, dy = (tf.constant(a.reshape(shape) if a.ndim > 1 else a) for a in batch)
        none = tf.zeros([0])
        options = {
            "x": x,
            "scale": gamma,
            "epsilon": EPSILON,
            "data_format": "NHWC" if last else "NCHW",
            "is_training": point.reduces,
        }
        if point.operator.endswith("backprop"):
            call = partial(
                ops.FusedBatchNormGradV3,
                y_backprop=dy,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=none,  # only GPUs keep anything there
                **options,
            )
        else:
            given = {"mean": none, "variance": none} if point.reduces else {"mean": mean, "variance": variance}
            call = partial(ops.FusedBatchNormV3, offset=beta, **given, **options)

        def outputs(results: Any) -> Iterator[Array]:
            # The third result of the forward operator is the unbiased variance; the biased one is kept in reserve.
            third = results.reserve_space_2 if point.operator == "training" else results[2]
            for result in (results[0], results[1], third):
                yield result.numpy().reshape(batch.input.shape if len(result.shape) > 1 else -1)

        return Candidate(self.name, call, outputs, self.name)


class Jax(Peer):
    """The formulas, compiled; its number of threads is that of the CPUs the process may use."""

    name = "jax"

    def __init__(self, threads: int, dtype: str) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self.jax: Any = importlib.import_module("jax")
        if dtype == "float64":
            self.jax.config.update("jax_enable_x64", True)
        self.version = self.jax.__version__

    def cannot(self, point: Point, dtype: str) -> str | None:
        """It has one number of threads."""
        if point.threads != cpus():
            return f"it has a thread for each of the {cpus()} CPUs; give the process {point.threads}"
        return None

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """On arrays of its own."""
        jax = self.jax
        function = jax.jit(formulas(jax.numpy, point.operator, len(point.shape), point.channel_axis))
        inputs = [jax.numpy.asarray(a) for a in batch.inputs(point.operator)]

        def call() -> Any:
            return jax.block_until_ready(function(*inputs))

        return Candidate(self.name, call, lambda results: map(np.asarray, results), self.name)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Torch, TensorFlow, Jax, NumPy)}


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Keep what compiled libraries say to themselves."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
