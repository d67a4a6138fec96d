"""What ``bnbp bench`` measures: the operators, beside the floor of the machine and other implementations.

Read it from top to bottom: the shapes; the floor; the candidates, which are bnbp and its peers; and the measurement.

All candidates of a row are timed in one process, in turns, on the same arrays: what disturbs one, or slows the machine
down for a while, disturbs the others as well. None is timed before its answer has been compared with
:mod:`bnbp.reference`. It needs NumPy; the peers are imported when they are asked for, matplotlib when there is a plot.
"""

import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bnbp

Array = NDArray[Any]
Call = Callable[[], Any]
Formulas = Callable[..., tuple[Any, ...]]
Shape = tuple[int, ...]

EPSILON = 1e-5


# The shapes


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

#: Shapes by set, as (N, C, ...), and how often each counts in the set's total.
SETS: dict[str, dict[Shape, int]] = {
    "network": {(32, channels, size, size): times for (channels, size), times in RESNET_50.items()},
    "odd": dict.fromkeys(ODD, 1),
    "small": dict.fromkeys(SMALL, 1),
}

#: The outputs of each operator, by the names of the functions in bnbp after ``batch_norm_``.
OUTPUTS = {
    "training": ("normalized", "batch_mean", "batch_variance"),
    "training_backprop": ("input_delta", "gamma_delta", "beta_delta"),
    "inference": ("normalized",),
    "inference_backprop": ("input_delta", "gamma_delta", "beta_delta"),
}
OPERATORS = tuple(OUTPUTS)
NUM_INPUTS = {"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}
LAYOUTS = ("nchw", "nhwc")


def tensor_type(dtype: str) -> np.dtype[Any]:
    """NumPy's type of that name; bfloat16 is that of ml_dtypes, which is imported for it alone.

    Raises
    ------
    ModuleNotFoundError
        If there is no ml_dtypes.
    """
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)


class Batch(NamedTuple):
    """The inputs of an operator; the first three, five or all six, as it takes them."""

    input: Array
    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    normalized_delta: Array


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
    return Batch._make([x, *(vector.astype(wide) for vector in (gamma, beta, mean, variance)), dy])


def channels_last(batch: Batch) -> Batch:
    """The same batch in the order N, ..., C."""
    return Batch._make(np.ascontiguousarray(np.moveaxis(a, 1, -1)) if a.ndim > 1 else a for a in batch)


@dataclass(frozen=True)
class Point:
    """A row of a table: what is measured in turns."""

    set: str
    shape: Shape  #: (N, C, ...), whatever the layout
    times: int  #: how often it counts in the total
    operator: str
    layout: str  #: of the arrays; of two axes there is only one
    threads: int

    def __str__(self) -> str:
        return f"{title(self)}, {label(self.shape)}"

    @property
    def channel_axis(self) -> int:
        """Of the arrays in their layout."""
        return -1 if self.layout == "nhwc" else 1

    @property
    def reduces(self) -> bool:
        """Whether the tensors are read twice: for sums that every element of the result needs."""
        return self.operator.startswith("training")

    @property
    def num_tensors_read(self) -> int:
        """The input, and in the gradient operators ``normalized_delta``."""
        return 2 if self.operator.endswith("backprop") else 1

    def second_read(self, dtype: str) -> bool:
        """Whether no cache can keep what the first pass has read until the second needs it.

        The passes can go channel by channel, and then it is the elements of one channel that must be kept; or, where
        the channels are side by side, everything.
        """
        apart = self.layout == "nchw" and len(self.shape) > 2
        elements = math.prod(self.shape) // (self.shape[1] if apart else 1)
        return self.reduces and elements * self.num_tensors_read * tensor_type(dtype).itemsize > cache_limit()


@cache
def cache_sizes() -> dict[str, int]:
    """Bytes of the caches that the first CPU has or shares, by level; empty where the system does not say."""
    sizes: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def cache_limit() -> int:
    """Bytes that may be assumed to stay in a cache: the last level, of which a shared machine promises no more."""
    return min(max(cache_sizes().values(), default=2**25), 2**25)


# The candidates


@cache
def load_floor() -> Any:
    """The loops of ``_floor.pyx``, compiled for the best level of the instruction set that this CPU has.

    Whatever level the kernels are forced to: a slow floor would flatter them.
    """
    level = bnbp.show_config("dicts")["isa"]["usable"][0]
    return importlib.import_module(f"bnbp._floor_{level.replace('-', '_')}")


class WrongAnswer(Exception):
    """A candidate's results are not those of the reference."""


@dataclass
class Candidate:
    """Something to time."""

    name: str
    call: Call
    outputs: Callable[[Any], Iterable[Any]] | None = None  #: from what ``call`` returns; None: nothing to check
    library: str = "bnbp"  #: whose threads it uses


FLOOR, READ = "floor", "read"
OWN = BNBP, FRESH = "bnbp", "bnbp fresh"  # with results to write into, and with results of its own


def words(tensor: Array) -> Array:
    """A tensor's bytes as numbers that the floor can add: 16-bit elements in pairs, without a last odd one."""
    flat = tensor.reshape(-1)
    return flat if flat.itemsize >= 4 else flat[: flat.size // 2 * 2].view(np.float32)


def floor(point: Point, batch: Batch, out: Array) -> Iterator[Candidate]:
    """Read and write what the operator must, and do nothing else.

    Streaming past the caches is fastest when the result is larger than they are. Where it fits, plain stores may be
    faster, and one thread faster than many: then all are tried, and the fastest is the floor.
    """
    read = [words(a) for a in (batch.input, batch.normalized_delta)[: point.num_tensors_read]]
    loops = load_floor()
    copy, add = (loops.copy2, loops.read2) if len(read) == 2 else (loops.copy1, loops.read1)
    to = words(out)
    yield Candidate(FLOOR, partial(copy, *read, to, point.threads))
    fits = out.nbytes * (len(read) + 1) <= cache_sizes().get("L2", 2**20)
    for threads in sorted({1, point.threads}) if fits else [point.threads]:
        if fits:
            yield Candidate(FLOOR, partial(copy, *read, to, threads, False))
        if point.reduces:
            yield Candidate(READ, partial(add, *read, threads))


def own(point: Point, batch: Batch, out: tuple[Array, ...]) -> Iterator[Candidate]:
    """The operator of bnbp, with results that it writes into and with results that it makes."""
    function = getattr(bnbp, f"batch_norm_{point.operator}")
    inputs = batch[: NUM_INPUTS[point.operator]]
    call = partial(function, *inputs, EPSILON, channel_axis=point.channel_axis, num_threads=point.threads)

    def outputs(results: Any) -> Iterable[Any]:
        return results if isinstance(results, tuple) else (results,)

    yield Candidate(BNBP, partial(call, out=out), outputs)
    yield Candidate(FRESH, call, outputs)


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
        return Candidate(self.name, partial(function, *batch[: NUM_INPUTS[point.operator]]), tuple, self.name)


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
        inputs = [jax.numpy.asarray(a) for a in batch[: NUM_INPUTS[point.operator]]]

        def call() -> Any:
            return jax.block_until_ready(function(*inputs))

        return Candidate(self.name, call, lambda results: map(np.asarray, results), self.name)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Torch, TensorFlow, Jax, NumPy)}


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


# The measurement


#: The largest error of an output, as a share of its largest value, of an answer that is taken for right; by the type of
#: the output. A sum of some hundred thousand float32 numbers, one after the other, is off by 1e-5; a formula that is
#: wrong, by more than this. Rounding a result costs up to 5e-4 in float16 and 4e-3 in bfloat16, and a peer may round
#: on the way to it as well.
TOLERANCE = {"float16": 2.5e-3, "bfloat16": 2e-2, "float32": 1e-3, "float64": 1e-9}

SAMPLE = 2e-3  # seconds of a sample: shorter calls are repeated, so that the clock and one interrupt do not matter
WARM = 1e-2  # seconds of a call up to which it is made once, untimed, before each sample: its data may be in a cache
REST = 2e-2  # seconds in which the threads of one OpenMP library stop spinning, and leave the CPUs to the next one's


@dataclass(frozen=True)
class Settings:
    """What to measure. The defaults are those of the command line."""

    sets: Sequence[str] = ("network",)
    operators: Sequence[str] = OPERATORS
    layouts: Sequence[str] = LAYOUTS
    threads: Sequence[int] = (1,)
    peers: Sequence[str] = ()
    dtype: str = "float32"
    rounds: int = 10


@dataclass(frozen=True)
class Seconds:
    """Of one call, over all rounds."""

    minimum: float
    median: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.minimum + other.minimum, self.median + other.median)

    def __mul__(self, times: int) -> "Seconds":
        return Seconds(self.minimum * times, self.median * times)

    def or_faster(self, other: "Seconds") -> "Seconds":
        """Of two ways to do the same."""
        return Seconds(min(self.minimum, other.minimum), min(self.median, other.median))

    def over(self, other: "Seconds") -> tuple[float, float]:
        """Ratios: of the minima, and of the medians."""
        return self.minimum / other.minimum, self.median / other.median


@dataclass
class Row:
    """What was measured at a point."""

    point: Point
    second_read: bool  #: whether the floor that applies is that with a second read
    seconds: dict[str, Seconds] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)  #: from the reference, by candidate
    notes: dict[str, str] = field(default_factory=dict)  #: why a candidate has no time

    @property
    def floor(self) -> Seconds:
        """The reading and writing that no implementation can do without."""
        return self.seconds[FLOOR]

    @property
    def floor_and_read(self) -> Seconds | None:
        """The same with a second read; None for the operators that need none."""
        return self.floor + self.seconds[READ] if READ in self.seconds else None

    @property
    def bound(self) -> Seconds:
        """The one of the two that applies."""
        return (self.second_read and self.floor_and_read) or self.floor


class Benchmark:
    """Measures one point after the other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.peers: list[Peer] = []
        self.absent: dict[str, str] = {}  #: why a peer takes no part
        for name in settings.peers:
            if importlib.util.find_spec(name) is None:
                self.absent[name] = "not installed"
                continue
            try:
                self.peers.append(PEERS[name](max(settings.threads), settings.dtype))
            except Exception as error:  # a peer's own; it is told, and the others are measured
                self.absent[name] = _first_line(error)
        # The points come in an order in which neighbours share these.
        self._batches: tuple[Shape, dict[str, Batch]] | None = None
        self._expected: tuple[tuple[Shape, str], list[Array]] | None = None

    def points(self) -> list[Point]:
        """Everything that the settings ask for."""
        chosen = self.settings
        return [
            Point(name, shape, times, operator, layout, threads)
            for name in chosen.sets
            for shape, times in SETS[name].items()
            for operator in chosen.operators
            for layout in (chosen.layouts if len(shape) > 2 else chosen.layouts[:1])
            for threads in chosen.threads
        ]

    def measure(self, point: Point) -> Row:
        """Check every candidate's answer, then time them in turns."""
        row = Row(point, point.second_read(self.settings.dtype))
        batch = self._batch(point)
        out = self._results(point, batch)
        tensor = out[0]
        candidates = [*floor(point, batch, tensor), *own(point, batch, out)]
        for peer in self.peers:
            reason = peer.cannot(point, self.settings.dtype)
            if reason is None:
                try:
                    candidates.append(peer.candidate(point, batch))
                except Exception as error:
                    reason = _first_line(error)
            if reason is not None:
                row.notes[peer.name] = reason

        right = []
        for candidate in candidates:
            try:
                self._check(candidate, point, row)
                right.append(candidate)
            except WrongAnswer as error:
                row.notes[candidate.name] = str(error)
            except Exception as error:
                if candidate.name not in PEERS:
                    raise
                row.notes[candidate.name] = _first_line(error)

        for candidate, seconds in zip(right, take_turns(right, self.settings.rounds, point.threads > 1), strict=True):
            new = Seconds(min(seconds), statistics.median(seconds))
            row.seconds[candidate.name] = new.or_faster(row.seconds.get(candidate.name, new))
        return row

    def _batch(self, point: Point) -> Batch:
        if self._batches is None or self._batches[0] != point.shape:
            self._batches = self._expected = None  # before there is more
            self._batches = (point.shape, {"nchw": make_batch(point.shape, self.settings.dtype)})
        batches = self._batches[1]
        if point.layout not in batches:
            batches[point.layout] = channels_last(batches["nchw"])
        return batches[point.layout]

    def _results(self, point: Point, batch: Batch) -> tuple[Array, ...]:
        """Arrays for the results, whose memory has been touched."""
        names = OUTPUTS[point.operator]
        return tuple(np.full_like(batch.input if i == 0 else batch.gamma, np.nan) for i in range(len(names)))

    def _check(self, candidate: Candidate, point: Point, row: Row) -> None:
        """Compare a candidate's results with those of the reference."""
        results = candidate.call()
        if candidate.outputs is None:
            return
        worst = 0.0
        batch = self._batch(point)
        for name, result, right in zip(
            OUTPUTS[point.operator], candidate.outputs(results), self._right_answer(point), strict=False
        ):
            got = np.moveaxis(result, point.channel_axis, 1) if right.ndim > 1 and result.ndim == right.ndim else result
            if got.shape != right.shape:
                raise WrongAnswer(f"wrong answer: {name} has the shape {got.shape}, not {right.shape}")
            error = deviation(got, right)
            kind = (batch.input if right.ndim > 1 else batch.gamma).dtype.name
            if not error <= TOLERANCE[kind]:  # NaN as well
                raise WrongAnswer(f"wrong answer: {name} is off by {error:.1g} of its largest value")
            worst = max(worst, error)
        row.deviations[candidate.name] = worst

    def _right_answer(self, point: Point) -> list[Array]:
        """The reference's results, in float64 and with the channels on axis 1, whatever the layout."""
        key = (point.shape, point.operator)
        if self._expected is None or self._expected[0] != key:
            self._expected = None
            assert self._batches is not None
            batch = self._batches[1]["nchw"][: NUM_INPUTS[point.operator]]
            self._expected = (key, list(right_answer(point.operator, batch)))
        return self._expected[1]

    def environment(self) -> dict[str, Any]:
        """What it runs on: for those who read the numbers elsewhere."""
        return {
            "cpu": cpu_model(),
            "cpus": cpus(),
            "caches": cache_sizes(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "platform": platform.platform(),
            "openmp": openmp_runtimes(),
            "bnbp": bnbp.show_config("dicts"),
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                **{peer.name: peer.version for peer in self.peers},
            },
            "absent": self.absent,
        }


def right_answer(operator: str, batch: tuple[Array, ...]) -> tuple[Array, ...]:
    """The reference's results, some channels at a time: its float64 intermediates take much memory."""
    function = getattr(bnbp.reference, f"batch_norm_{operator}")
    x = batch[0]
    step = max(1, 2**21 * x.shape[1] // max(x.size, 1))
    parts = []
    for start in range(0, x.shape[1], step):
        some = slice(start, start + step)
        results = function(*(a[:, some] if a.ndim > 1 else a[some] for a in batch), EPSILON)
        parts.append(results if isinstance(results, tuple) else (results,))
    return tuple(np.concatenate(arrays, axis=min(arrays[0].ndim - 1, 1)) for arrays in zip(*parts, strict=True))


def deviation(got: Array, right: Array) -> float:
    """The largest error as a share of the largest value; NaN if there is a NaN."""
    step = max(1, 2**20 * len(right) // max(right.size, 1))
    pieces = [slice(start, start + step) for start in range(0, len(right), step)]
    error = max(float(np.max(np.abs(got[some] - right[some]))) for some in pieces)
    largest = max(float(np.max(np.abs(right[some]))) for some in pieces)
    return error / largest


def take_turns(candidates: Sequence[Candidate], rounds: int, rest: bool) -> list[list[float]]:
    """Time the candidates in turns; every other round goes backwards.

    Parameters
    ----------
    candidates : sequence of Candidate
        What to time.
    rounds : int
        How many samples of each.
    rest : bool
        Whether to wait, where one library follows another, for the threads of the first to stop.

    Returns
    -------
    list of list of float
        For each candidate, the seconds of one call in each round.
    """
    seconds: list[list[float]] = [[] for _ in candidates]
    about = [calibrate(candidate.call) for candidate in candidates]
    last = None
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for index in sorted(range(len(candidates)), reverse=turn % 2 == 1):
                call, library = candidates[index].call, candidates[index].library
                if rest and library != last:
                    time.sleep(REST)
                last = library
                if about[index] <= WARM:
                    call()
                seconds[index].append(sample(call, max(1, math.ceil(SAMPLE / about[index]))))
    finally:
        if collecting:
            gc.enable()
    return seconds


def calibrate(call: Call) -> float:
    """About how many seconds a call takes; it is not the first."""
    seconds = sample(call, 1)
    return seconds if seconds > SAMPLE / 4 else sample(call, math.ceil(SAMPLE / 4 / seconds))


def sample(call: Call, repeats: int) -> float:
    """Seconds of one call, from that many in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _first_line(error: Exception) -> str:
    return f"it fails: {str(error).partition(chr(10))[0] or type(error).__name__}"


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def openmp_runtimes() -> list[str] | None:
    """The OpenMP libraries in this process; None without threadpoolctl. Each has threads of its own."""
    try:
        threadpoolctl: Any = importlib.import_module("threadpoolctl")
    except ModuleNotFoundError:
        return None
    return sorted(lib["filepath"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "openmp")


# Totals, and what is made of the rows


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], list[Row]]:
    """Rows of one table: by set, operator, layout and threads."""
    result: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        point = row.point
        result.setdefault((point.set, point.operator, point.layout, point.threads), []).append(row)
    return result


def total(rows: Sequence[Row]) -> Row:
    """The sum over a group, each row as often as it counts, of those candidates that all rows have."""
    names = [name for name in rows[0].seconds if all(name in row.seconds for row in rows)]
    result = Row(rows[0].point, any(row.second_read for row in rows))
    for name in names:
        result.seconds[name] = _sum(row.seconds[name] * row.point.times for row in rows)
    return result


def total_bound(rows: Sequence[Row]) -> Seconds:
    """The sum of the floors that apply."""
    return _sum(row.bound * row.point.times for row in rows)


def _sum(terms: Iterable[Seconds]) -> Seconds:
    result = Seconds(0, 0)
    for term in terms:
        result = result + term
    return result


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What a table's numbers do not say: the totals of a network as ratios, and why a time is missing."""
    sums = total(rows).seconds
    if rows[0].point.set == "network" and BNBP in sums:
        least, middle = sums[BNBP].over(total_bound(rows))
        yield f"total / floors that apply: {least:.2f} {middle:.2f}"
        for name in (name for name in PEERS if name in sums):
            times, fresh = (sums[name].over(sums[own])[1] for own in OWN)
            yield f"total of {name} / bnbp: {times:.2f}, with fresh results {fresh:.2f}"
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for missing in row.notes.items():
            where.setdefault(missing, []).append(label(row.point.shape))
    for (name, note), shapes in where.items():
        yield f"{name}: {note}" + (f" ({', '.join(shapes)})" if len(shapes) < len(rows) else "")


def save(file: BinaryIO, settings: Settings, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write everything as JSON.

    Parameters
    ----------
    file : binary file
        Where to write.
    settings : Settings
        What was asked for.
    environment : dict
        What :meth:`Benchmark.environment` returned.
    rows : sequence of Row
        What :meth:`Benchmark.measure` returned.
    """
    totals = []
    for (name, operator, layout, threads), members in groups(rows).items():
        sums = {**total(members).seconds, "bound": total_bound(members)}
        seconds = {candidate: asdict(value) for candidate, value in sums.items()}
        totals.append({"set": name, "operator": operator, "layout": layout, "threads": threads, "seconds": seconds})
    content = {
        "settings": asdict(settings),
        "environment": environment,
        "rows": [asdict(row) for row in rows],
        "totals": totals,
    }
    file.write(json.dumps(content, indent=1).encode())


def title(point: Point) -> str:
    """What a table is about."""
    return f"{point.operator}, {point.layout}, {point.threads} thread{'s' * (point.threads > 1)}"


def label(shape: Shape) -> str:
    """A shape as the tables write it."""
    return "x".join(map(str, shape))


COLOURS = {
    BNBP: "tab:blue",
    FRESH: "tab:cyan",
    "torch": "tab:red",
    "tensorflow": "tab:orange",
    "jax": "tab:purple",
    "numpy": "tab:gray",
}


def draw(file: BinaryIO, file_format: str, rows: Sequence[Row], heading: str) -> None:
    """Draw the ratios to the floor as dots: a panel for each operator and layout, with the largest number of threads.

    Parameters
    ----------
    file : binary file
        Where to write.
    file_format : str
        Such as "png".
    rows : sequence of Row
        What :class:`Benchmark` has measured.
    heading : str
        What stands above, such as the machine.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    threads = max(row.point.threads for row in rows)
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.point.threads == threads:
            panels.setdefault((row.point.operator, row.point.layout), []).append(row)
    operators, layouts = list(dict.fromkeys(o for o, _ in panels)), list(dict.fromkeys(s for _, s in panels))
    height = max(map(len, panels.values()))
    size = (2.2 + 4.6 * len(layouts), 1.2 + len(operators) * (0.9 + 0.3 * height))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(operators), len(layouts), squeeze=False, sharex=True)
    ratios: list[float] = [1]
    seen = {}
    for (operator, layout), members in panels.items():
        axes = grid[operators.index(operator)][layouts.index(layout)]
        names = [label(row.point.shape) for row in members]
        for name, colour in COLOURS.items():
            dots = [(row.seconds[name].over(row.bound)[1], y) for y, row in enumerate(members) if name in row.seconds]
            if dots:
                x, y = zip(*dots, strict=True)
                ratios += x
                seen[name] = axes.scatter(x, y, color=colour, s=28, zorder=3, marker="D" if name == BNBP else "o")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"{operator}, {layout}", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    low, high = min(ratios), max(ratios)
    steps = (1, 1.5, 2, 3, 5) if high < 10 * low else (1, 2, 5)
    ticks = [step * 10**exponent for exponent in range(-2, 5) for step in steps]
    ticks = [tick for tick in ticks if low * 0.8 <= tick <= high * 1.25]
    for axes in grid.flat:
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(low * 0.8, high * 1.25)
    for axes in grid[-1]:
        axes.set_xlabel("time / floor that applies (medians)")
    figure.suptitle(f"{heading}, {threads} thread{'s' * (threads > 1)}", x=0.01, ha="left")
    known = [name for name in COLOURS if name in seen]
    labels = ["bnbp, out=" if name == BNBP else name for name in known]
    figure.legend([seen[name] for name in known], labels, loc="outside lower center", ncols=len(known), frameon=False)
    figure.savefig(file, format=file_format, dpi=150)
