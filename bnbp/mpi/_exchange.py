"""The two collectives of a call: what each rank was given, and what it contributes.

The first has the same size on every rank, whatever has happened there. After it, all ranks know whether the call goes
on. If it does not, all of them raise.
"""

import hashlib
import itertools
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

__all__ = ["Contribution", "Terms", "communicator_of", "exchange", "fingerprint"]

OPERATORS = ("batch_norm_training", "batch_norm_training_backprop", "batch_norm_inference_backprop")
TYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = (None, "relu", "relu6")

#: The types of errors that are raised on the other ranks as they are; any other one becomes a RuntimeError.
ERRORS = (TypeError, ValueError, MemoryError)
LONGEST_TEXT = 4096  # bytes of an error's message

Hash = int


class Terms(NamedTuple):
    """The arguments that must be the same on all ranks."""

    operator: str
    reproducible: bool
    channels: int
    type: str
    parameter_type: str
    epsilon: float
    activation: str | None
    addend: bool
    gamma: Hash = 0
    beta: Hash = 0
    mean: Hash = 0
    variance: Hash = 0


class Contribution(NamedTuple):
    """The contribution of a rank."""

    terms: Terms
    #: Elements of a channel.
    elements: int
    #: Its part of the sums.
    part: bytes


HEADER = np.dtype(
    [
        ("failed", "u1"),  # 0, or 1 and the place of the error's type in ERRORS
        ("operator", "u1"),
        ("reproducible", "u1"),
        ("type", "u1"),
        ("parameter_type", "u1"),
        ("activation", "u1"),
        ("addend", "u1"),
        ("", "u1"),
        ("channels", "<i8"),
        ("epsilon", "<f8"),
        *((name, "<u8") for name in ("gamma", "beta", "mean", "variance")),
        ("count", "<i8"),
        ("length", "<i8"),  # bytes that follow
    ]
)
TERMS = struct.Struct("<7Bxqd4Q")  # the fields of the header that are the same on all ranks
COUNTS = struct.Struct("<qq")  # and the others


def communicator_of(comm: Any) -> MPI.Intracomm:
    """The communicator of a call. None stands for all processes."""
    if comm is None:
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm: expected an mpi4py.MPI.Intracomm or None, got {type(comm).__name__}")
    if comm == MPI.COMM_NULL:
        raise ValueError("comm: expected a communicator that this process belongs to, got MPI.COMM_NULL")
    if not isinstance(comm, MPI.Intracomm) or comm.Is_inter():
        raise TypeError("comm: expected an intra-communicator, got an inter-communicator; its Merge() makes one")
    return comm


def fingerprint(array: NDArray[Any] | None) -> Hash:
    """A number that identifies the values of an argument; 0 for None."""
    if array is None:
        return 0
    digest = hashlib.blake2b(array.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def exchange(comm: MPI.Intracomm, contribute: Callable[[], Contribution]) -> tuple[int, list[bytes]]:
    """Exchange what the ranks contribute.

    Parameters
    ----------
    comm : MPI.Intracomm
        The communicator. All its ranks call this.
    contribute : callable
        Computes the contribution of this rank. An exception from it is this rank's error.

    Returns
    -------
    count : int
        Elements of a channel on all ranks.
    parts : list of bytes
        The contribution of each rank, in the order of the ranks.

    Raises
    ------
    Exception
        The exception of `contribute`. The other ranks raise the same type of error, or a RuntimeError.
    ValueError
        On all ranks, if they differ in arguments that must be the same.
    """
    failure: Exception | None = None
    try:
        mine = contribute()
        terms, elements, own = _pack(mine.terms), mine.elements, mine.part
    except Exception as error:  # whatever it is: the others must not wait for this rank
        failure = error
        kind = next((k for k, kind in enumerate(ERRORS) if isinstance(error, kind)), len(ERRORS))
        terms, elements, own = TERMS.pack(1 + kind, *[0] * 12), 0, _text_of(error)
    header, size = terms + COUNTS.pack(elements, len(own)), comm.Get_size()
    everything = bytearray(HEADER.itemsize * size)
    comm.Allgather([header, MPI.BYTE], [everything, MPI.BYTE])

    headers: NDArray[Any] = np.frombuffer(everything, HEADER)
    alike = all(everything.startswith(terms, HEADER.itemsize * rank) for rank in range(size))
    if failure is not None or not alike:
        if headers["failed"].any():
            lengths = np.where(headers["failed"], headers["length"], 0)
            texts = _gather(comm, own if failure else b"", lengths)
            if failure is not None:
                raise failure
            _raise_for_others(headers["failed"], texts)
        raise ValueError(_disagreement(headers))
    return int(headers["count"].sum()), _gather(comm, own, headers["length"])


def _gather(comm: MPI.Intracomm, own: bytes, lengths: NDArray[np.int64]) -> list[bytes]:
    """The bytes of each rank, in the order of the ranks."""
    counts: list[int] = lengths.tolist()
    everything = bytearray(sum(counts))
    comm.Allgatherv([own, MPI.BYTE], [everything, counts, MPI.BYTE])
    ends = itertools.accumulate(counts)
    return [bytes(everything[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def _pack(terms: Terms) -> bytes:
    return TERMS.pack(
        0,
        OPERATORS.index(terms.operator),
        terms.reproducible,
        TYPES.index(terms.type),
        TYPES.index(terms.parameter_type),
        ACTIVATIONS.index(terms.activation),
        terms.addend,
        terms.channels,
        terms.epsilon + 0.0,  # which has one zero
        *terms[-4:],
    )


# ---------------------------------------------------------------- errors


def _text_of(error: Exception) -> bytes:
    text = str(error)
    if not isinstance(error, ERRORS):
        text = f"{type(error).__name__}: {text}"
    return (text or type(error).__name__).encode(errors="backslashreplace")[:LONGEST_TEXT]


def _raise_for_others(failed: NDArray[np.uint8], texts: list[bytes]) -> NoReturn:
    """Raise the errors of other ranks, as one error of the type of the first."""
    ranks_by_text: dict[bytes, list[int]] = {}
    for rank in np.flatnonzero(failed):
        ranks_by_text.setdefault(texts[rank], []).append(int(rank))
    message = "; ".join(f"{_ranks(ranks)}: {text.decode(errors='replace')}" for text, ranks in ranks_by_text.items())
    first = int(failed[np.flatnonzero(failed)[0]]) - 1
    raise (*ERRORS, RuntimeError)[first](message)


def _disagreement(headers: NDArray[Any]) -> str:
    """A message that says what differs, and on which ranks."""
    said: list[str] = []
    for field, subject, verb, words in _SUBJECTS:
        if (headers[field] != headers[field][0]).any():
            said.append(f"{subject}: {_groups(headers[field], verb, words)}")
            if field == "operator":
                return said[0]
    if said:
        return "; ".join(said)
    # What has another length or type has other values as well, so these come last.
    for field in ("gamma", "beta", "mean", "variance"):
        values = headers[field]
        if (values != values[0]).any():
            which = _Which(values)
            said.append(f"{field}: {_groups(values, 'passed', which)}")
    return "; ".join(said)


class _Which:
    """Words for values, from their fingerprints alone."""

    def __init__(self, fingerprints: NDArray[np.uint64]) -> None:
        self.first = next(int(value) for value in fingerprints if value)
        self.several = len({int(value) for value in fingerprints if value}) > 1

    def __call__(self, fingerprint: int) -> str:
        if not fingerprint:
            return "None"
        if not self.several:
            return "an array"
        return "certain values" if fingerprint == self.first else "other values"


def _groups(values: Iterable[Any], verb: str, words: Callable[[Any], str]) -> str:
    """As in "ranks 0, 1 passed 1e-05, rank 2 passed 0.001"."""
    ranks_by_value: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value.item(), []).append(rank)
    return ", ".join(f"{_ranks(ranks)} {verb} {words(value)}" for value, ranks in ranks_by_value.items())


def _ranks(ranks: list[int]) -> str:
    """As in "rank 2", or "ranks 0, 1, 4-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}"


def _activation(code: int) -> str:
    return f'"{ACTIVATIONS[code]}"' if code else "None"


#: Field of the header, what a message calls it, what a rank did, and words for its value.
_SUBJECTS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("operator", "operator", "called", lambda code: OPERATORS[code]),
    ("channels", "input", "passed", lambda number: f"{number} channel{'s' * (number != 1)}"),
    ("type", "input", "passed", lambda code: TYPES[code]),
    ("parameter_type", "gamma, beta and statistics", "passed", lambda code: TYPES[code]),
    ("epsilon", "epsilon", "passed", repr),
    ("activation", "activation", "passed", _activation),
    ("addend", "addend", "passed", lambda code: "one" if code else "none"),
    ("reproducible", "reproducible", "passed", lambda code: str(bool(code))),
)
