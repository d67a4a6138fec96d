"""The measurement: every candidate's answer is checked, then they are timed in turns."""

import gc
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import bnbp

from ..operators import TENSORS, Operator, is_backprop, outputs
from .candidates import FLOOR, READ, Call, Candidate, floor, own
from .machine import cache_sizes, cpu_model, cpus, openmp_runtimes
from .peers import PEERS, Peer
from .points import (
    EPSILON,
    LAYOUTS,
    SETS,
    Array,
    Batch,
    Point,
    Shape,
    channels_last,
    make_batch,
    with_activation,
)

#: The largest error of an output, as a share of its largest value, of an answer that is taken for right; by the type of
#: the output. A sum of some hundred thousand float32 numbers, one after the other, is off by 1e-5; a formula that is
#: wrong, by more than this. Rounding a result costs up to 5e-4 in float16 and 4e-3 in bfloat16, and a peer may round
#: on the way to it as well.
TOLERANCE = {"float16": 2.5e-3, "bfloat16": 2e-2, "float32": 1e-3, "float64": 1e-9}

SAMPLE = 2e-3  # seconds of a sample: shorter calls are repeated, so that the clock and one interrupt do not matter
WARM = 1e-2  # seconds of a call up to which it is made once, untimed, before each sample: its data may be in a cache
REST = 2e-2  # seconds in which the threads of one OpenMP library stop spinning, and leave the CPUs to the next one's


class WrongAnswer(Exception):
    """A candidate's results are not those of the reference."""


@dataclass(frozen=True)
class Settings:
    """What to measure. The defaults are those of the command line."""

    sets: Sequence[str] = ("network",)
    operators: Sequence[str] = tuple(map(str, Operator))
    layouts: Sequence[str] = LAYOUTS
    threads: Sequence[int] = (1,)
    peers: Sequence[str] = ()
    dtype: str = "float32"
    rounds: int = 10
    activation: str | None = None
    addend: bool = False


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
            if importlib.util.find_spec(name.partition(".")[0]) is None:  # a peer has the name of its package
                self.absent[name] = "not installed"
                continue
            try:
                self.peers.append(PEERS[name](max(settings.threads), settings.dtype))
            except Exception as error:  # a peer's own; it is told, and the others are measured
                self.absent[name] = _first_line(error)
        # The points come in an order in which neighbours share these.
        self._batches: tuple[Shape, dict[str, Batch]] | None = None
        self._expected: dict[tuple[Shape, str, str | None], list[Array]] = {}

    def points(self) -> list[Point]:
        """Everything that the settings ask for."""
        chosen = self.settings
        return [
            Point(name, shape, times, operator, layout, threads, chosen.activation, chosen.addend)
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
        candidates = [*floor(point, batch, out), *own(point, batch, out)]
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
            self._batches, self._expected = None, {}  # before there is more
            batch = make_batch(point.shape, self.settings.dtype)
            if point.activation:
                batch = with_activation(batch, point.activation, point.addend)
            self._batches = (point.shape, {"nchw": batch})
        batches = self._batches[1]
        if point.layout not in batches:
            batches[point.layout] = channels_last(batches["nchw"])
        return batches[point.layout]

    def _results(self, point: Point, batch: Batch) -> tuple[Array, ...]:
        """Arrays for the results, whose memory has been touched."""
        return tuple(np.full_like(batch.input if name in TENSORS else batch.gamma, np.nan) for name in _outputs(point))

    def _check(self, candidate: Candidate, point: Point, row: Row) -> None:
        """Compare a candidate's results with those of the reference."""
        results = candidate.call()
        if candidate.outputs is None:
            return
        worst = 0.0
        batch = self._batch(point)
        point = point.plain if candidate.plain else point
        names, got_all = _outputs(point), list(candidate.outputs(results))
        if len(got_all) < len(names):
            raise WrongAnswer(f"wrong answer: there is no {names[len(got_all)]}")
        for name, result, right in zip(names, got_all, self._right_answer(point), strict=False):
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
        key = (point.shape, point.operator, point.activation)
        if key not in self._expected:
            # Of another operator they are no longer needed.
            self._expected = {other: value for other, value in self._expected.items() if other[:2] == key[:2]}
            assert self._batches is not None
            self._expected[key] = list(right_answer(point, self._batches[1]["nchw"]))
        return self._expected[key]

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


def _outputs(point: Point) -> tuple[str, ...]:
    return outputs(point.operator, point.addend and is_backprop(point.operator))


def right_answer(point: Point, batch: Batch) -> tuple[Array, ...]:
    """The reference's results, some channels at a time: its float64 intermediates take much memory.

    It is given the mask of an activation's gradient, by way of ``normalized``: in float64 a number next to 0 may be on
    its other side.
    """
    function = getattr(bnbp.reference, f"batch_norm_{point.operator}")
    x = batch.input
    step = max(1, 2**21 * x.shape[1] // max(x.size, 1))
    parts = []
    for start in range(0, x.shape[1], step):
        some = slice(start, start + step)
        part = Batch._make(a if a is None else a[:, some] if a.ndim > 1 else a[some] for a in batch)
        options = point.options(part)
        if point.activation and is_backprop(point.operator):
            options["normalized"] = part.normalized
        results = function(*part.inputs(point.operator), EPSILON, **options)
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
