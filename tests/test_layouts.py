"""Every type in every memory layout with every option: the bits are those of plain arrays, and nothing is copied whole.

A layout decides in which order the numbers of a channel are added. So the bits are compared with those of arrays that
are dense, with their axes in the order in which the memory of `input` has them.
"""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_batch, make_telling, same_bits, sums_of

import bnbp

# Short runs and long ones, a channel in many chunks, rows with a rest and rows that are merged; axes of length 1; and a
# single element for each channel. The channels are on every place.
SHAPES = [
    ((3, 4, 5, 6), 1),
    ((3, 2, 5, 70), -1),
    ((3, 4, 5, 6), 0),
    ((2, 3, 9, 11), 1),
    ((5, 1, 3, 4), 1),
    ((1, 7, 1, 1), 1),
    ((2, 2, 9001), 1),
    ((400, 3), 1),
]
LARGE = [
    ((9, 40, 10, 10), 1),
    ((37, 30, 33), 1),
    ((24, 32, 7, 7), 1),
    ((6, 5000, 2), 1),
    ((13_442, 6), 1),
    ((3, 1, 5, 4001), 1),
]


def strided(array, lead, step):
    """In a larger array: `lead` elements and more in front along each axis, every `step`-th element."""
    memory = np.zeros([lead + step * length + 1 for length in array.shape], array.dtype)
    view = memory[tuple(slice(lead, lead + step * length, step) for length in array.shape)]
    view[...] = array
    return view


def unaligned(array):
    memory = np.empty(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def in_order(array, order):
    """The same array with its axes in another order in memory."""
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


VIEWS = {
    "plain": lambda a: a.copy("C"),
    "Fortran": lambda a: a.copy("F"),
    "channels last": lambda a: in_order(a, (0, *range(2, a.ndim), 1)),
    "first axes swapped": lambda a: in_order(a, (1, 0, *range(2, a.ndim))),
    "last axes swapped": lambda a: in_order(a, (*range(a.ndim - 2), a.ndim - 1, a.ndim - 2)),
    "reversed": lambda a: np.flip(np.flip(a).copy()),
    "gaps": lambda a: strided(a, 2, 3),
    "a part of each axis": lambda a: strided(a, 1, 1),
    "unaligned": unaligned,
    "in a record": lambda a: np.array(a, [("number", a.dtype)]).view([("number", a.dtype)])["number"]
    if a.dtype.kind != "V" else unaligned(a),
}  # fmt: skip

INPUTS = {"training": 3, "training_backprop": 6, "inference": 5, "inference_backprop": 6}


def packed_like(x, array):
    """A dense copy of an array whose axes lie in memory as those of x do, by NumPy's own rule."""
    copy = np.empty_like(x, subok=False)
    copy[...] = array
    return copy


def run(name, batch, **options):
    results = getattr(bnbp, f"batch_norm_{name}")(*batch[: INPUTS[name]], **options)
    return results if isinstance(results, tuple) else (results,)


def assert_same(got, expected, what):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None), what
        assert a is None or same_bits([a], [b]), what


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_every_layout_of_every_tensor(shape, axis, types, name):
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    for first, of_x in VIEWS.items():
        x = of_x(batch.input)
        plain = batch._replace(input=packed_like(x, x), normalized_delta=packed_like(x, batch.normalized_delta))
        expected = run(name, plain, channel_axis=axis)
        for (second, of_dy), (third, of_out) in itertools.product(VIEWS.items(), VIEWS.items()):
            viewed = batch._replace(input=x, normalized_delta=of_dy(batch.normalized_delta))
            before = x.tobytes(), viewed.normalized_delta.tobytes()
            out = (of_out(np.zeros_like(batch.input)), *[None] * (len(expected) - 1))
            results = run(name, viewed, channel_axis=axis, out=out)
            assert results[0] is out[0]
            assert_same(results, expected, (first, second, third))
            assert before == (x.tobytes(), viewed.normalized_delta.tobytes())


@pytest.mark.parametrize(("shape", "axis"), SHAPES + LARGE, ids=str)
def test_sums_of_every_layout(shape, axis, dtype):
    """In float64, of data that tells in which order it was summed."""
    batch = make_telling(shape, axis, dtype)
    told = set()
    for first, of_x in VIEWS.items():
        x = of_x(batch.input)
        expected = sums_of(batch._replace(input=packed_like(x, x), normalized_delta=packed_like(x, batch[5])), axis)
        told.add(b"".join(array.tobytes() for array in expected))
        for second, threads in (("plain", 1), ("gaps", 2), ("reversed", 3)):
            viewed = batch._replace(input=x, normalized_delta=VIEWS[second](batch.normalized_delta))
            assert_same(sums_of(viewed, axis, num_threads=threads), expected, (first, second, threads))
    assert len(told) > (batch.input.size > 1000)  # layouts whose order differs have sums that differ


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_a_new_result_lies_in_memory_as_the_input_does(shape, axis, view, name, types):
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    x = VIEWS[view](batch.input)
    (result, *_) = run(name, batch._replace(input=x), channel_axis=axis)
    assert result.strides == np.empty_like(x).strides
    assert type(result) is np.ndarray


@pytest.mark.parametrize(("shape", "axis"), LARGE, ids=str)
@pytest.mark.parametrize("name", ["training", "training_backprop", "inference_backprop"])
def test_every_number_of_threads_and_size_of_tiles(shape, axis, types, name, l2_size):
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    for view in ("reversed", "gaps", "channels last"):
        x = VIEWS[view](batch.input)
        plain = batch._replace(input=packed_like(x, x), normalized_delta=packed_like(x, batch.normalized_delta))
        l2_size(1 << 20)
        expected = run(name, plain, channel_axis=axis, num_threads=1)
        viewed = batch._replace(input=x, normalized_delta=VIEWS["gaps"](batch.normalized_delta))
        for size, threads in itertools.product((1 << 12, 1 << 17, 1 << 21), (1, 2, 5)):
            l2_size(size)
            assert_same(run(name, viewed, channel_axis=axis, num_threads=threads), expected, (view, size, threads))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["training_backprop", "inference_backprop"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:4], ids=str)
def test_every_mask_and_place(shape, axis, types, name, view):
    batch = make_batch(shape, axis, types[0], parameters=types[1])
    x, dy = VIEWS[view](batch.input), VIEWS[view](batch.normalized_delta)
    viewed = batch._replace(input=x, normalized_delta=dy)
    expected = run(name, viewed, channel_axis=axis)
    for mask in itertools.product((False, True), repeat=3):
        part = run(name, viewed, channel_axis=axis, output_mask=mask)
        assert_same(part, [a if wanted else None for a, wanted in zip(expected, mask, strict=True)], mask)
    for k, output in enumerate(expected):
        out = [None] * 3
        out[k] = np.zeros_like(output)
        results = run(name, viewed, channel_axis=axis, out=out)
        assert results[k] is out[k]
        assert_same(results, expected, k)
    for place in ("input", "normalized_delta"):
        own = viewed._replace(**{place: VIEWS[view](getattr(batch, place))})
        results = run(name, own, channel_axis=axis, out=(getattr(own, place), None, None))
        assert results[0] is getattr(own, place)
        assert_same(results, expected, place)


@pytest.mark.parametrize(
    "broadcast",
    [(1, 1, 1, 1), (1, 4, 1, 1), (3, 4, 1, 1), (1, 1, 5, 6), (3, 1, 5, 6)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_a_broadcast_delta(broadcast, types):
    batch = make_batch((3, 4, 5, 6), 1, types[0], parameters=types[1])
    delta = np.random.default_rng(3).normal(size=broadcast).astype(types[0])
    broadcast_delta = np.broadcast_to(delta, (3, 4, 5, 6))
    for name in ("training_backprop", "inference_backprop"):
        for x in (batch.input, VIEWS["channels last"](batch.input)):
            expected = run(name, batch._replace(input=x, normalized_delta=packed_like(x, broadcast_delta)))
            assert_same(run(name, batch._replace(input=x, normalized_delta=broadcast_delta)), expected, name)


@pytest.mark.parametrize("repeated", [(1, 4, 5, 6), (3, 4, 1, 1), (3, 1, 5, 6)])
def test_a_broadcast_input(repeated, types):
    batch = make_batch((3, 4, 5, 6), 1, types[0], parameters=types[1])
    x = np.broadcast_to(batch.input[tuple(slice(length) for length in repeated)], (3, 4, 5, 6))
    for name in INPUTS:
        plain = batch._replace(input=packed_like(x, x), normalized_delta=packed_like(x, batch.normalized_delta))
        assert_same(run(name, batch._replace(input=x)), run(name, plain), name)


# NumPy reads a header with ast, of which CPython 3.11 raises a SystemError in several threads at once (gh-106905).
@pytest.mark.thread_unsafe(reason="numpy.load calls ast.literal_eval")
def test_read_only_and_mapped_files(tmp_path, types):
    batch = make_batch((4, 3, 5), dtype=types[0], parameters=types[1])
    expected = run("training_backprop", batch)
    for name in ("input", "normalized_delta"):
        np.save(tmp_path / f"{name}.npy", getattr(batch, name))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r").view(types[0]) for name in ("input", "normalized_delta")]
    frozen = [vector.copy() for vector in batch[1:5]]
    for vector in frozen:
        vector.flags.writeable = False
    assert_same(run("training_backprop", (mapped[0], *frozen, mapped[1])), expected, "mapped")


@pytest.mark.parametrize("layout", ["gaps", "reversed", "unaligned"])
def test_parameters_in_any_layout(layout, types):
    batch = make_batch((4, 3, 5), dtype=types[0], parameters=types[1])
    expected = run("training_backprop", batch)
    own = batch._replace(**{name: VIEWS[layout](getattr(batch, name)) for name in batch._fields[1:5]})
    out = (None, VIEWS[layout](expected[1] * 0), VIEWS[layout](expected[2] * 0))
    assert_same(run("training_backprop", own, out=out), expected, layout)


def test_dense_layouts_are_taken_as_they_are():
    """Their results are those of the operator with the channels where the memory has them, whatever the view."""
    batch = make_batch((4, 6, 5, 7), dtype=np.float32)
    last = batch._replace(**{n: np.ascontiguousarray(np.moveaxis(getattr(batch, n), 1, -1)) for n in TENSORS})
    expected = run("training_backprop", last, channel_axis=-1)
    seen = last._replace(**{name: np.moveaxis(getattr(last, name), -1, 1) for name in TENSORS})
    results = run("training_backprop", seen)
    assert results[0].strides == seen.input.strides
    assert_same([np.moveaxis(results[0], 1, -1), *results[1:]], expected, "NHWC seen as NCHW")


TENSORS = ("input", "normalized_delta")


# ---------------------------------------------------------------- what is not read, and not allocated


def in_a_process(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(sys.platform == "win32", reason="it forbids to read memory by POSIX's mprotect")
def test_with_constant_statistics_and_no_sums_the_input_is_not_read():
    code = """
import ctypes, mmap, numpy as np, bnbp
n = 1 << 20
memory = mmap.mmap(-1, 4 * n)
x = np.frombuffer(memory, np.float32).reshape(1, 4, -1)
dy, vector = np.ones_like(x), np.ones(4, np.float32)
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(4 * n), 0) == 0  # reading it ends the process
for view in (x, x[:, :, ::2]):
    delta = dy[:, :, :view.shape[2]]
    got = bnbp.batch_norm_inference_backprop(view, None, None, vector, vector, delta, 0.0, output_mask=(1, 0, 0))
    print((got.input_delta == 1).all())
"""
    assert in_a_process(code) == ["True", "True"]


# What a call may add to the peak: with a view of a 1 GB array it is the output, the scratch memory of the threads and
# what the interpreter itself needs.
PEAK = """
import resource, sys, numpy as np, bnbp
whole = np.ones((64, 64, 256, 256), np.float32)
x = {view}
dy, vector = np.broadcast_to(np.float32(1), x.shape), np.ones(x.shape[1], np.float32)
def call(x, dy, **options):
    return bnbp.batch_norm_training_backprop(x, vector, vector, vector, vector, dy, num_threads=2, **options)
call(x[:1, :, :8], dy[:1, :, :8])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
call(x, dy, output_mask=(False, True, True))
sums = peak() - before
result = call(x, dy)
print(sums, peak() - before, result.input_delta.nbytes)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it asks getrusage for the peak")
@pytest.mark.parametrize(
    "view",
    [
        "whole[::-1, :, ::2, 1:]",
        "np.moveaxis(whole, 1, -1)[:, :, :, ::2].transpose(0, 3, 1, 2)",
        "whole.transpose(0, 3, 1, 2)[:, :, :32]",
    ],
)
def test_a_view_of_a_gigabyte_needs_the_output_and_no_more(view):
    sums, peak, output = map(int, in_a_process(PEAK.format(view=view)))
    assert sums < 32 << 20
    assert peak < output + (32 << 20)
