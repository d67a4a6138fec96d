"""Other implementations of the operators; an instance of a class here has imported one."""

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ..operators import is_backprop
from .candidates import Candidate
from .machine import cpus
from .points import EPSILON, Array, Batch, Point

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


def formulas(xp: Any, point: Point) -> Formulas:
    """The operator written out, for an array library with NumPy's functions: in the type of the parameters.

    The addend, or the result of the forward operator, comes after the operator's other inputs.
    """
    operator, rank, channel_axis = point.operator, len(point.shape), point.channel_axis
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
    most = 6 if point.activation == "relu6" else math.inf

    def activated(*inputs: Any) -> tuple[Any, ...]:
        *own, addend = inputs if point.addend else (*inputs, 0)
        first, *rest = function(*own)
        return xp.clip(first + addend, 0, most), *rest

    def masked(*inputs: Any) -> tuple[Any, ...]:
        *own, dy, y = inputs
        dy = xp.where((y > 0) & (y < most), dy, xp.zeros_like(dy))
        return *function(*own, dy), *((dy,) if point.addend else ())

    def rounded(*inputs: Any) -> tuple[Any, ...]:
        tensor, parameter = inputs[0].dtype, inputs[1].dtype
        whole = (masked if is_backprop(operator) else activated) if point.activation else function
        results = whole(*(xp.asarray(a, parameter) for a in inputs))
        return tuple(xp.asarray(a, tensor if a.ndim > 1 else parameter) for a in results)

    return rounded


def inputs_of(point: Point, batch: Batch) -> tuple[Array, ...]:
    """The operator's inputs, and where it has an activation what an implementation takes that keeps its result."""
    more = batch.normalized if is_backprop(point.operator) else batch.addend
    return (*batch.inputs(point.operator), *(() if more is None else (more,)))


class NumPy(Peer):
    """The formulas in the type of the parameters, on one thread whatever is asked for."""

    name = "numpy"

    def __init__(self, threads: int, dtype: str) -> None:
        self.version = np.__version__

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """On our arrays."""
        return Candidate(self.name, partial(formulas(np, point), *inputs_of(point, batch)), tuple, self.name)


class Torch(Peer):
    """The functions below ``torch.nn.BatchNorm2d`` and its gradient; channels-last is PyTorch's memory format.

    With an activation it is the functions below that of ``torch.nn`` as well, one after the other as autograd calls
    them, and in place as torchvision's networks have them.
    """

    name = "torch"

    def __init__(self, threads: int, dtype: str) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.version = self.torch.__version__

    def candidate(self, point: Point, batch: Batch) -> Candidate:
        """On tensors that share the memory of our arrays."""
        torch = self.torch
        torch.set_num_threads(point.threads)

        def tensor(a: Array | None) -> Any:  # by way of integers: NumPy's bfloat16 is none of PyTorch's
            if a is None:
                return None
            shared = torch.from_numpy(a.view(f"i{a.itemsize}")).view(getattr(torch, a.dtype.name))
            return shared if a.ndim == 1 else shared.moveaxis(point.channel_axis, 1)

        x, gamma, beta, mean, variance, dy, addend, y = map(tensor, batch)
        function: Callable[..., Any]
        statistics: tuple[Any, ...]
        arguments: tuple[Any, ...]
        if is_backprop(point.operator):
            # What it keeps of the variance is 1 / sqrt(variance + epsilon).
            kept = (None, None, mean, (variance + EPSILON).rsqrt())
            statistics = kept if point.reduces else (mean, variance, None, None)
            arguments = (dy, x, gamma, *statistics, point.reduces, EPSILON, [True] * 3)
            function, more = self.torch.ops.aten.native_batch_norm_backward, (y,)
        else:
            statistics = (None, None) if point.reduces else (mean, variance)
            arguments = (x, gamma, beta, *statistics, point.reduces, 0.1, EPSILON)
            function, more = self.torch.ops.aten.native_batch_norm, (addend,)
        if point.activation:
            function, arguments = self.fused(function, point), (*more, *arguments)
        call = partial(self.made(function), *arguments)

        def outputs(results: Any) -> Iterator[Array]:
            for index, result in enumerate(results):
                if result.ndim > 1:
                    yield np.moveaxis(result.to(gamma.dtype).numpy(), 1, point.channel_axis)
                elif (point.operator, index) == ("training", 2):
                    yield (result.double() ** -2 - EPSILON).numpy()
                else:
                    yield result.to(gamma.dtype).numpy()

        return Candidate(self.name, call, outputs, "torch")

    def fused(self, batch_norm: Callable[..., Any], point: Point) -> Callable[..., Any]:
        """Batch norm, addition and activation; or the gradient of the activation, then that of the batch norm."""
        aten, is_relu, has_addend = self.torch.ops.aten, point.activation == "relu", point.addend

        def forward(addend: Any, *arguments: Any) -> Any:
            y, *statistics = batch_norm(*arguments)
            if has_addend:
                y = aten.add_(y, addend)
            return aten.relu_(y) if is_relu else aten.hardtanh_(y, 0, 6), *statistics

        def backward(y: Any, dy: Any, *arguments: Any) -> Any:
            masked = aten.threshold_backward(dy, y, 0) if is_relu else aten.hardtanh_backward(dy, y, 0, 6)
            results = batch_norm(masked, *arguments)
            return (*results, masked) if has_addend else results

        return backward if is_backprop(point.operator) else forward

    def made(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What is called of it."""
        return function


class Compiled(Torch):
    """The same functions, made one by ``torch.compile``."""

    name = "torch.compile"

    def __init__(self, threads: int, dtype: str) -> None:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or processes of its own would stay beside us
        super().__init__(threads, dtype)

    def made(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is compiled at its first call, for the shapes and the number of threads of that call."""
        self.torch.compiler.reset()  # it keeps only some versions of a function; the earlier ones have had their turn
        compiled = self.torch.compile(lambda *arguments: function(*arguments), dynamic=False, fullgraph=True)

        def call(*arguments: Any) -> Any:
            try:
                return compiled(*arguments)
            except Exception as error:  # its own words come after a line that says where it failed
                raise RuntimeError(str(getattr(error, "inner_exception", error))) from error

        return call


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
        """It has no float64, one number of threads, and on CPUs no activation in its operators."""
        if point.activation:
            return "its operators have no activation"
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
        x, gamma, beta, mean, variance, dy = (
            tf.constant(a.reshape(shape) if a.ndim > 1 else a) for a in batch if a is not None
        )
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
        function = jax.jit(formulas(jax.numpy, point))
        inputs = [jax.numpy.asarray(a) for a in inputs_of(point, batch)]

        def call() -> Any:
            return jax.block_until_ready(function(*inputs))

        return Candidate(self.name, call, lambda results: map(np.asarray, results), self.name)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Torch, Compiled, TensorFlow, Jax, NumPy)}


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
