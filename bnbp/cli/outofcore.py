"""The operators on tensors in .npy files, which may be larger than memory.

A pass goes through the tensors in slabs: boxes of at most ``SLAB`` bytes that are contiguous in the file, from its
beginning to its end, each mapped while it is worked on. Several processes each take slabs that follow each other, and
write their part of the results where it belongs in the files.

The slabs depend on the shape alone, and so does the order in which their sums are put together. So the results have the
same bits on any number of processes. (Exact sums, as :mod:`bnbp.exact` has them, would not depend on the slabs either.
They would take several times as long where samples are small.)

An array in Fortran order is taken for its transpose, which is in C order: an operator does not mind in which order the
axes are, as long as it knows the one of the channels.
"""

import functools
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

import bnbp
from bnbp._checks import check as check_arguments
from bnbp._statistics import as_operands

from .operators import TENSORS, outputs
from .team import Team

__all__ = ["NpyFile", "UnreadableError", "check", "compute", "element_type", "steps"]

Array = NDArray[Any]
Shape = tuple[int, ...]
Box = tuple[slice, ...]

#: Bytes of a tensor that are mapped at a time: worth many calls, and little beside a machine's memory.
SLAB = 1 << 25

#: The sums of slabs are put together in at most so many groups, of slabs that follow each other. A group is the work of
#: one process, and its sums are what the processes exchange.
GROUPS = 1 << 10

#: Writes the next elements of a result, which is told by its name.
Write = Callable[[str, Array], None]


# ---------------------------------------------------------------- files


class UnreadableError(Exception):
    """A file is not what it should be. The message is for the user."""


def element_type(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of elements that were saved: NumPy saves those of bfloat16 as two bytes of no type."""
    if dtype != np.dtype("V2"):
        return dtype
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise UnreadableError(f"{name} holds bfloat16; run: pip install ml_dtypes") from error
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


class NpyFile:
    """The array of a .npy file.

    Parameters
    ----------
    name : str
        What messages call the file.
    stream : file
        The file, at its beginning. It must stay open.

    Raises
    ------
    UnreadableError
        If it is no such file, holds Python objects, or is shorter than its header says.
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name, self._stream, self._state = name, stream, _state_of(stream)
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        try:
            with warnings.catch_warnings():  # a damaged header can be strange Python, which is warned of
                warnings.simplefilter("ignore")
                shape, self.fortran_order, dtype = headers[np.lib.format.read_magic(stream)](stream)
            like = np.broadcast_to(np.zeros((), dtype), shape)
        except OSError:
            raise
        except Exception as error:  # a damaged header can raise almost anything
            raise UnreadableError(f"cannot read {name}: not an .npy file, or a damaged one") from error
        if dtype.hasobject:
            raise UnreadableError(f"{name} holds Python objects, which are not read")
        self._offset = stream.tell()
        missing = self._offset + math.prod(shape) * dtype.itemsize - self._state.size
        if missing > 0:
            raise UnreadableError(f"cannot read {name}: it ends {missing} bytes early")

        #: An array of the same shape and type, but of a single element in memory.
        self.like: Array = like.view(element_type(name, dtype))
        #: The lengths of the axes in the order in which they are in the file.
        self.file_shape: Shape = shape[::-1] if self.fortran_order else shape

    def read(self) -> Array:
        """The array, read whole."""
        values = self._map(0, self.file_shape).copy()
        return values.T if self.fortran_order else values

    def window(self, box: Box, fortran_order: bool) -> Array:
        """Map a box of the array, or of its transpose if `fortran_order`.

        Raises
        ------
        UnreadableError
            If the file is not as it was, or cannot be mapped.
        """
        if fortran_order != self.fortran_order:  # what is contiguous in the other order is all over this file
            return self._map(0, self.file_shape).T[box]
        first = np.ravel_multi_index([part.start for part in box], self.file_shape)
        return self._map(int(first), tuple(part.stop - part.start for part in box))

    def check_unchanged(self) -> None:
        """Raise UnreadableError if the file has been written to."""
        if _state_of(self._stream) != self._state:
            raise UnreadableError(f"cannot read {self.name}: it has changed meanwhile")

    def _map(self, first: int, shape: Shape) -> Array:
        self.check_unchanged()  # to touch memory that is no longer in the file would be the end of the process
        offset = self._offset + first * self.like.itemsize
        try:
            return np.memmap(self._stream, self.like.dtype, "r", offset, shape).view(np.ndarray)
        except OSError as error:
            raise UnreadableError(f"cannot read {self.name}: {error.strerror or error}") from error


class _State(NamedTuple):
    size: int
    modified: int


def _state_of(stream: BinaryIO) -> _State:
    status = os.fstat(stream.fileno())
    return _State(status.st_size, status.st_mtime_ns)


def _header(like: Array, fortran_order: bool = False) -> bytes:
    """The beginning of a .npy file."""
    descr = np.lib.format.dtype_to_descr(like.dtype)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": fortran_order, "shape": like.shape})
    return header.getvalue()


def _write(stream: BinaryIO, array: Array) -> None:
    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


# ---------------------------------------------------------------- slabs


def slabs(shape: Shape, itemsize: int) -> Iterator[Box]:
    """Boxes that make up an array in C order, in their order: each contiguous, and of at most ``SLAB`` bytes."""
    if 0 in shape:
        return
    axis, stride = 0, math.prod(shape[1:]) * itemsize
    while stride > SLAB:
        axis += 1
        stride //= shape[axis]
    step = max(SLAB // stride, 1)
    inner = tuple(slice(0, length) for length in shape[axis + 1 :])
    for index in np.ndindex(shape[:axis]):
        outer = tuple(slice(k, k + 1) for k in index)
        for start in range(0, shape[axis], step):
            yield (*outer, slice(start, min(start + step, shape[axis])), *inner)


class Share(NamedTuple):
    """The slabs that a process works on, of all those of a file."""

    first: int
    stop: int
    #: The number of slabs in a group.
    group: int
    #: Elements of the file before the first one.
    elements: int


def share_of(file: NpyFile, team: Team) -> Share:
    """The part of a process: about as many groups as the others have, one after the other."""
    number = sum(1 for _ in slabs(file.file_shape, file.like.itemsize))
    group = max(-(-number // GROUPS), 1)
    groups = -(-number // group)
    first, stop = (min(groups * rank // team.size * group, number) for rank in (team.rank, team.rank + 1))
    before = itertools.islice(slabs(file.file_shape, file.like.itemsize), first)
    return Share(first, stop, group, sum(math.prod(part.stop - part.start for part in box) for box in before))


class Operands(NamedTuple):
    """The inputs of an operator in the operator's order: those there are, as far as they concern a slab."""

    input: Any
    gamma: Any = None
    beta: Any = None
    mean: Any = None
    variance: Any = None
    normalized_delta: Any = None
    addend: Any = None
    normalized: Any = None


class Batch:
    """The arguments of an operator, with the axes in the order in which they are in the file of `input`."""

    def __init__(
        self,
        files: Mapping[str, NpyFile],
        epsilon: float,
        channel_axis: int,
        num_threads: int | None,
        activation: str | None,
        addend_delta: bool,
        write: Write,
        advance: Callable[[], object],
        team: Team,
    ) -> None:
        self.input = files["input"]
        self.team, self.share = team, share_of(self.input, team)
        # They are gone through in slabs. The other inputs have a value for each channel and are read whole.
        self.tensors = {name: file for name, file in files.items() if name in TENSORS}
        self.vectors = {name: file.read() for name, file in files.items() if name not in TENSORS}
        rank = self.input.like.ndim
        self.axis = rank - 1 - channel_axis % rank if self.input.fortran_order else channel_axis % rank
        self.channels = self.input.file_shape[self.axis]
        self.count = self.input.like.size // self.channels
        self.epsilon, self.activation, self.addend_delta = epsilon, activation, addend_delta
        self.options: dict[str, Any] = {"channel_axis": self.axis, "num_threads": num_threads}
        self.write, self.advance = write, advance

    def each(self, work: Callable[[slice, Operands], None]) -> None:
        """Go through this process's part of the batch; `work` is told the channels of a slab, and the operands."""
        boxes = slabs(self.input.file_shape, self.input.like.itemsize)
        for box in itertools.islice(boxes, self.share.first, self.share.stop):
            # Nothing but the argument refers to what is mapped: it is unmapped when `work` returns.
            work(box[self.axis], self._operands(box))
            self.advance()

    def nothing(self) -> Operands:
        """All the channels without an element, for results that do not depend on the elements."""
        shape = [0] * self.input.like.ndim
        shape[self.axis] = self.channels
        return Operands(**dict.fromkeys(self.tensors, np.empty(shape, self.input.like.dtype)), **self.vectors)

    def _operands(self, box: Box) -> Operands:
        return Operands(
            **{name: file.window(box, self.input.fortran_order) for name, file in self.tensors.items()},
            **{name: vector[box[self.axis]] for name, vector in self.vectors.items()},
        )


# ---------------------------------------------------------------- operators


def check(op: str, files: Mapping[str, NpyFile], **options: Any) -> None:
    """Raise what the operator raises about its arguments; the options are those of the operator."""
    operands: dict[str, Any] = {"gamma": None, "beta": None, **{name: file.like for name, file in files.items()}}
    check_arguments(op, operands, **options)


def steps(op: str, files: Mapping[str, NpyFile], team: Team) -> int:
    """How often :func:`compute` calls `advance`."""
    share = share_of(files["input"], team)
    return (2 if op.startswith("training") else 1) * (share.stop - share.first)


def compute(
    op: str,
    files: Mapping[str, NpyFile],
    streams: Mapping[str, BinaryIO],
    advance: Callable[[], object],
    team: Team,
    *,
    epsilon: float,
    channel_axis: int,
    num_threads: int | None,
    activation: str | None,
    addend: bool = False,
) -> dict[str, Array]:
    """Compute the results of an operator, and write them as .npy files.

    Parameters
    ----------
    op : str
        The operator; a function of bnbp has this name after ``batch_norm_``.
    files : mapping of str to NpyFile
        The inputs by name, checked.
    streams : mapping of str to file
        Where to write the results, by name.
    advance : callable
        Is called after each slab.
    team : Team
        The processes that do this together, each with the same arguments. The streams are of the same files.
    epsilon, channel_axis, num_threads, activation, addend
        As the operator takes them; `addend` is that of the gradient operators. That of the others is a file.

    Returns
    -------
    dict of str to ndarray
        The results by name; of the tensors only the shape and the type.

    Raises
    ------
    UnreadableError
        If a file is not as it was when it was checked, or cannot be mapped.
    OSError
        If a result cannot be written.
    """
    names = outputs(op, addend)
    like = files["input"].like
    results = {name: like for name in names if name in TENSORS}

    def write(name: str, elements: Array) -> None:
        _write(streams[name], elements)

    batch = Batch(files, epsilon, channel_axis, num_threads, activation, addend, write, advance, team)
    header = _header(like, files["input"].fortran_order)
    for name in results:
        if team.rank == 0:
            streams[name].write(header)
        streams[name].seek(len(header) + batch.share.elements * like.itemsize)
    with np.errstate(all="ignore"):  # infinities and NaN are results like others
        vectors = _OPERATORS[op](batch)
    for name, vector in zip((name for name in names if name not in TENSORS), vectors, strict=True):
        if team.rank == 0:
            streams[name].write(_header(vector))
            _write(streams[name], vector)
        results[name] = vector
    for file in files.values():
        file.check_unchanged()
    return {name: results[name] for name in names}


Sum = TypeVar("Sum", bnbp.BatchNormStatistics, Array)


class Sums(Generic[Sum]):
    """Sums over the slabs of a process, in the end over those of all processes."""

    def __init__(self, batch: Batch, merge: Callable[[Sum, Sum], Sum]) -> None:
        self._batch = batch
        self._merge: Callable[[Sum, Sum], Sum] = merge
        # For each group by first channel: two slabs have all their channels in common, or none.
        self._groups: list[dict[int, Sum]] = []
        self._slabs = 0

    def add(self, channels: slice, part: Sum) -> None:
        """Add the sums of the next slab."""
        if self._slabs % self._batch.share.group == 0:
            self._groups.append({})
        self._slabs += 1
        earlier = self._groups[-1].get(channels.start)
        self._groups[-1][channels.start] = part if earlier is None else self._merge(earlier, part)

    def of_all(self) -> Iterator[tuple[slice, Sum]]:
        """The sums by the channels that they are of; all processes must ask for them."""
        parts: dict[int, list[Sum]] = {}
        for groups in self._batch.team.share(self._groups):
            for group in groups:
                for start, part in group.items():
                    parts.setdefault(start, []).append(part)
        for start, each in parts.items():
            whole = functools.reduce(self._merge, each)
            yield slice(start, start + len(whole[-1])), whole


def _training(batch: Batch) -> tuple[Array, ...]:
    own = Sums[bnbp.BatchNormStatistics](batch, bnbp.merge_statistics)

    def gather(channels: slice, operands: Operands) -> None:
        own.add(channels, bnbp.batch_norm_training_statistics(operands.input, **batch.options))

    def normalize(channels: slice, operands: Operands) -> None:
        shift = None if beta is None else beta[channels]
        _normalize(batch, operands._replace(beta=shift, mean=mean[channels], variance=variance[channels]))

    batch.each(gather)
    nothing = batch.nothing()
    # The operator itself says of which type they are, and what they are of an empty batch.
    _, mean, variance = bnbp.batch_norm_training(*nothing[:3], batch.epsilon, **batch.options)
    whole = bnbp.BatchNormStatistics(batch.count, *np.full((2, batch.channels), np.nan))
    for channels, statistics in own.of_all():
        _, whole.mean[channels], whole.m2[channels] = statistics
    mean[:], variance[:], shifted = as_operands(whole, nothing.gamma, nothing.beta, batch.epsilon, mean.dtype)
    # With an activation the operator normalises with the statistics as it returns them, without one as they are.
    beta = nothing.beta if batch.activation else shifted
    batch.each(normalize)
    return mean, variance


def _training_backprop(batch: Batch) -> tuple[Array, ...]:
    own = Sums[Array](batch, np.add)
    batch.each(lambda channels, operands: own.add(channels, _reduce(batch, operands)))
    sums = _sums_of_all(batch, own)

    def apply(channels: slice, operands: Operands) -> None:
        _write_deltas(batch, _apply(batch, operands, sums[:, channels], of_elements=True))

    batch.each(apply)
    return _vectors(batch, sums)


def _inference(batch: Batch) -> tuple[Array, ...]:
    batch.each(lambda channels, operands: _normalize(batch, operands))
    return ()


def _inference_backprop(batch: Batch) -> tuple[Array, ...]:
    own = Sums[Array](batch, np.add)

    def reduce_and_apply(channels: slice, operands: Operands) -> None:
        own.add(channels, _reduce(batch, operands))
        options = _gradient_options(batch, operands, of_elements=True)
        _write_deltas(batch, bnbp.batch_norm_inference_backprop(*operands[:6], batch.epsilon, **options))

    batch.each(reduce_and_apply)
    return _vectors(batch, _sums_of_all(batch, own))  # the two have the same formulas in training


def _normalize(batch: Batch, operands: Operands) -> None:
    options = {"activation": batch.activation, "addend": operands.addend, **batch.options}
    batch.write("normalized", bnbp.batch_norm_inference(*operands[:5], batch.epsilon, **options))


def _reduce(batch: Batch, operands: Operands) -> Array:
    mask: dict[str, Any] = {}
    if batch.activation:
        mask = {name: getattr(operands, name) for name in ("gamma", "beta", "variance", "normalized")}
        mask |= {"epsilon": batch.epsilon, "activation": batch.activation, "addend": batch.addend_delta}
    sums = bnbp.batch_norm_training_backprop_reduce(
        operands.input, operands.mean, operands.normalized_delta, **mask, **batch.options
    )
    return np.stack(sums)


def _apply(batch: Batch, operands: Operands, sums: Array, *, of_elements: bool) -> Any:
    options = _gradient_options(batch, operands, of_elements)
    return bnbp.batch_norm_training_backprop_apply(
        *operands[:6], sums[0], sums[1], batch.count, batch.epsilon, **options
    )


def _gradient_options(batch: Batch, operands: Operands, of_elements: bool) -> dict[str, Any]:
    """Options that ask for the results with a value for each element, or for the others."""
    mask = [of_elements, not of_elements, not of_elements, *([of_elements] if batch.addend_delta else [])]
    return {
        **{"activation": batch.activation, "normalized": operands.normalized, "addend": batch.addend_delta},
        **{"output_mask": mask, **batch.options},
    }


def _write_deltas(batch: Batch, results: Any) -> None:
    batch.write("input_delta", results.input_delta)
    if batch.addend_delta:
        batch.write("addend_delta", results.addend_delta)


def _sums_of_all(batch: Batch, own: Sums[Array]) -> Array:
    sums = np.zeros((2, batch.channels))
    for channels, part in own.of_all():
        sums[:, channels] = part
    return sums


def _vectors(batch: Batch, sums: Array) -> tuple[Array, ...]:
    results = _apply(batch, batch.nothing(), sums, of_elements=False)
    return results.gamma_delta, results.beta_delta


_OPERATORS: dict[str, Callable[[Batch], tuple[Array, ...]]] = {
    "training": _training,
    "training_backprop": _training_backprop,
    "inference": _inference,
    "inference_backprop": _inference_backprop,
}
