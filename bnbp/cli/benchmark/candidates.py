"""What is timed of bnbp: the operators, and the floor, which does nothing but read and write what they must."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

import bnbp

from ..operators import OUTPUTS
from .machine import cache_sizes
from .points import EPSILON, Array, Batch, Point

Call = Callable[[], Any]


@dataclass
class Candidate:
    """Something to time."""

    name: str
    call: Call
    outputs: Callable[[Any], Iterable[Any]] | None = None  #: from what ``call`` returns; None: nothing to check
    library: str = "bnbp"  #: whose threads it uses
    plain: bool = False  #: whether its answer is that of the operator without the activation


FLOOR, READ = "floor", "read"
# With results to write into, with results of its own, and without the activation.
OWN = BNBP, FRESH, PLAIN = "bnbp", "bnbp fresh", "bnbp plain"


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


def floor(point: Point, batch: Batch, out: tuple[Array, ...]) -> Iterator[Candidate]:
    """Read and write what the operator must, and do nothing else.

    Streaming past the caches is fastest when the result is larger than they are. Where it fits, plain stores may be
    faster, and one thread faster than many: then all are tried, and the fastest is the floor. In the set of the caches
    nothing comes from memory a second time.
    """
    read, again = (
        [words(getattr(batch, name)) for name in names] for names in (point.tensors_read, point.tensors_reduced)
    )
    written = [words(a) for a in out if a.ndim > 1]
    loops = load_floor()
    copy = {(1, 1): loops.copy1, (2, 1): loops.copy2, (3, 2): loops.copy3}[len(read), len(written)]
    add = loops.read2 if len(again) == 2 else loops.read1
    yield Candidate(FLOOR, partial(copy, *read, *written, point.threads))
    fits = point.in_cache or sum(a.nbytes for a in (*read, *written)) <= cache_sizes().get("L2", 2**20)
    for threads in sorted({1, point.threads}) if fits else [point.threads]:
        if fits:
            yield Candidate(FLOOR, partial(copy, *read, *written, threads, False))
        if point.reduces and not point.in_cache:
            yield Candidate(READ, partial(add, *again, threads))


def own(point: Point, batch: Batch, out: tuple[Array, ...]) -> Iterator[Candidate]:
    """The operator of bnbp, with results that it writes into and with results that it makes.

    Where there is an activation, the operator without it is there as well, with results that it writes into.
    """
    function = getattr(bnbp, f"batch_norm_{point.operator}")
    inputs = batch.inputs(point.operator)
    plain = partial(function, *inputs, EPSILON, channel_axis=point.channel_axis, num_threads=point.threads)
    call = partial(plain, **point.options(batch))

    def outputs(results: Any) -> Iterable[Any]:
        return results if isinstance(results, tuple) else (results,)

    yield Candidate(BNBP, partial(call, out=out), outputs)
    yield Candidate(FRESH, call, outputs)
    if point.activation:
        yield Candidate(PLAIN, partial(plain, out=out[: len(OUTPUTS[point.operator])]), outputs, plain=True)
