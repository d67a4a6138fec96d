"""What is timed of bnbp: the operators, and the floor, which does nothing but read and write what they must."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

import bnbp

from .machine import cache_sizes
from .points import Array, Batch, Point

Call = Callable[[], Any]

EPSILON = 1e-5


@dataclass
class Candidate:
    """Something to time."""

    name: str
    call: Call
    outputs: Callable[[Any], Iterable[Any]] | None = None  #: from what ``call`` returns; None: nothing to check
    library: str = "bnbp"  #: whose threads it uses


FLOOR, READ = "floor", "read"
OWN = BNBP, FRESH = "bnbp", "bnbp fresh"  # with results to write into, and with results of its own


@cache
def load_floor() -> Any:
    """The loops of ``engine/floor.pyx``, compiled for the best level of the instruction set that this CPU has.

    Whatever level the kernels are forced to: a slow floor would flatter them.
    """
    level = bnbp.show_config("dicts")["isa"]["usable"][0]
    return importlib.import_module(f"bnbp.engine.floor_{level.replace('-', '_')}")


def words(tensor: Array) -> Array:
    """The bytes of a dense tensor in words of 8, which the floor can add; up to seven at its end are left out."""
    octets = tensor.reshape(-1).view(np.uint8)
    return octets[: octets.size // 8 * 8].view(np.uint64)


def floor(point: Point, batch: Batch, out: Array) -> Iterator[Candidate]:
    """Read and write what the operator must, and do nothing else.

    Streaming past the caches is fastest when the result is larger than they are. Where it fits, plain stores may be
    faster, and one thread faster than many: then all are tried, and the fastest is the floor. In the set of the caches
    nothing comes from memory a second time.
    """
    read = [words(a) for a in (batch.input, batch.normalized_delta)[: point.num_tensors_read]]
    loops = load_floor()
    copy, add = (loops.copy2, loops.read2) if len(read) == 2 else (loops.copy1, loops.read1)
    to = words(out)
    yield Candidate(FLOOR, partial(copy, *read, to, point.threads))
    fits = point.in_cache or out.nbytes * (len(read) + 1) <= cache_sizes().get("L2", 2**20)
    for threads in sorted({1, point.threads}) if fits else [point.threads]:
        if fits:
            yield Candidate(FLOOR, partial(copy, *read, to, threads, False))
        if point.reduces and not point.in_cache:
            yield Candidate(READ, partial(add, *read, threads))


def own(point: Point, batch: Batch, out: tuple[Array, ...]) -> Iterator[Candidate]:
    """The operator of bnbp, with results that it writes into and with results that it makes."""
    function = getattr(bnbp, f"batch_norm_{point.operator}")
    inputs = batch.inputs(point.operator)
    call = partial(function, *inputs, EPSILON, channel_axis=point.channel_axis, num_threads=point.threads)

    def outputs(results: Any) -> Iterable[Any]:
        return results if isinstance(results, tuple) else (results,)

    yield Candidate(BNBP, partial(call, out=out), outputs)
    yield Candidate(FRESH, call, outputs)
