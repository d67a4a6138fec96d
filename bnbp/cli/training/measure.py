"""The measurement: every candidate's gradients are checked, then they are timed in turns."""

import gc
import os
import platform
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bnbp

from ..benchmark.candidates import Candidate
from ..benchmark.machine import cache_sizes, cpu_model, cpus, openmp_runtimes
from ..benchmark.measure import Seconds, WrongAnswer, take_turns
from . import memory
from .cases import CONVERTED, EAGER, OTHER_THREADS, SETS, Case, Result, Row, Settings, Way
from .steps import Training

__all__ = ["Benchmark"]

#: How far a candidate's gradients may be from those in float64, as a multiple of how far PyTorch's own float32 is. That
#: differs much from network to network: where rounding takes a number to the other side of 0, a ReLU turns its gradient
#: off, and ResNet-50 is off by 2e-2 before it is trained. PyTorch's other memory format may be off 4 times as far.
TIMES = 8.0
TOLERANCE = 1e-4  #: what is right however close PyTorch is, of gradients and losses


class Benchmark:
    """Measures one network after the other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def points(self) -> list[tuple[str, int]]:
        """The networks, each with the numbers of threads."""
        return [(network, threads) for network in self.settings.networks for threads in self.settings.threads]

    def measure(self, network: str, threads: int) -> Row:
        """Check every candidate's gradients, time them in turns, and look at their losses and memory."""
        case = SETS[self.settings.set][network]
        with _threads(threads):
            torch.compiler.reset()
            row = self._times(case, threads)
        gc.collect()
        if self.settings.steps:
            row.losses = self._losses(case, row)
        if self.settings.memory and memory.available():
            for result in row.results:
                if not result.seconds or result.candidate not in (EAGER, CONVERTED):
                    continue  # nobody asks for the others', which take minutes to compile
                try:
                    result.memory = memory.peak(self.settings.set, network, result.way, threads)
                except RuntimeError as error:
                    result.note = f"no peak memory: {error}"
        return row

    def _times(self, case: Case, threads: int) -> Row:
        exact = Training(case, Way(EAGER), torch.float64)
        parameters = sum(parameter.numel() for module in exact.modules for parameter in module.parameters())
        row = Row(case.network, case.shape, parameters, threads)
        right = exact.gradients()
        limit = max(TOLERANCE, TIMES * deviation(Training(case, Way(EAGER)).gradients(), right))
        timed = []
        for name in self.settings.candidates:
            for memory_format in case.formats:
                result = Result(name, memory_format)
                row.results.append(result)
                try:
                    training = Training(case, Way(name, memory_format))
                    result.deviation = deviation(training.gradients(), right)
                    if not result.deviation <= limit:  # NaN as well
                        raise WrongAnswer(f"wrong gradients: off by {result.deviation:.1g}, {limit:.1g} is allowed")
                    timed.append((result, training))
                except WrongAnswer as error:
                    result.note = str(error)
                except Exception as error:  # a compiler is missing, for example; it is told, and the rest is measured
                    result.note = f"it fails: {str(error).partition(chr(10))[0] or type(error).__name__}"
        del exact, right
        turns = [Candidate(result.candidate, training.step, library="torch") for result, training in timed]
        for (result, _), seconds in zip(timed, take_turns(turns, self.settings.rounds, False), strict=True):
            result.seconds = Seconds(min(seconds), statistics.median(seconds))
        return row

    def _losses(self, case: Case, row: Row) -> dict[str, list[float]]:
        runs = {EAGER: (EAGER, row.threads), OTHER_THREADS: (EAGER, 1 if row.threads > 1 else 2)}
        if row.best(CONVERTED):
            runs[CONVERTED] = (CONVERTED, row.threads)
        return {name: losses(case, Way(way), threads, self.settings.steps) for name, (way, threads) in runs.items()}

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
                "torch": torch.__version__,
            },
        }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """PyTorch's number of threads, and with it bnbp's."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def losses(case: Case, way: Way, threads: int, steps: int) -> list[float]:
    """The losses of steps in a row; those of a GAN's two networks are added."""
    with _threads(threads):
        training = Training(case, way)
        return [sum(map(float, training.step())) for _ in range(steps)]


Gradients = tuple[list[Tensor], list[dict[str, Tensor]]]


def deviation(got: Gradients, right: Gradients) -> float:
    """How far losses and gradients are from the right ones: the largest of all relative distances.

    A distance is that of two vectors, each of all gradients of a layer; by layer and not by parameter, because the bias
    of a convolution that a batch norm follows has the gradient 0, up to rounding.

    Raises
    ------
    WrongAnswer
        If a gradient is missing, or has another shape.
    """
    worst = [abs(float(a) - float(b)) / abs(float(b)) for a, b in zip(got[0], right[0], strict=True)]
    for ours, exact in zip(got[1], right[1], strict=True):
        layers: dict[str, list[str]] = {}
        for name, gradient in exact.items():
            if name not in ours or ours[name].shape != gradient.shape:
                raise WrongAnswer(f"wrong gradients: there is none of {name}, or it has another shape")
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        for names in layers.values():
            error = sum(float((ours[name].double() - exact[name]).square().sum()) for name in names)
            worst.append((error / sum(float(exact[name].square().sum()) for name in names)) ** 0.5)
    return float(np.max(worst))  # NaN if there is one
