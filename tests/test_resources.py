"""Resources: no memory, very large shapes, signals, and a long life."""

import ctypes
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import python

import bnbp

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# ---------------------------------------------------------------- no memory

FAILURES = """
import ctypes, gc
import numpy as np, bnbp
libc = ctypes.PyDLL(None)
libc.blocks_in_use.restype = ctypes.c_long
rng = np.random.default_rng(0)
gamma, beta, mean, variance = vectors = rng.uniform(1, 2, (4, 4))
bnbp.set_pool_limit(LIMIT)

def calls(x):
    one = {"num_threads": 1}
    yield lambda: bnbp.batch_norm_training(x, gamma, [1.0, 2.0, 3.0, 4.0], **one)
    yield lambda: bnbp.batch_norm_training_backprop(x, *vectors, x, **one)
    yield lambda: bnbp.batch_norm_inference(x, *vectors, **one)
    yield lambda: bnbp.batch_norm_inference_backprop(x, *vectors, x, **one)
    yield lambda: bnbp.batch_norm_training_statistics(x, **one)
    yield lambda: bnbp.batch_norm_training_backprop_reduce(x, mean, x, **one)
    yield lambda: bnbp.batch_norm_training_backprop_apply(x, *vectors, x, mean, mean, 1 << 20, **one)

def bits(results):
    return [np.asarray(array).tobytes() for array in (results if isinstance(results, tuple) else (results,))]

def sweep(call, expected):
    \"\"\"Refuses the first request for memory, then the second, until a call makes no request that is refused.\"\"\"
    request = 0
    while True:
        results = None
        libc.fail_after(request)
        try:
            results = call()
        except MemoryError:
            pass
        used_up = libc.has_failed()
        libc.fail_after(-1)
        assert results is None or bits(results) == expected
        if not used_up:
            return request
        request += 1

least = 1000
for x in (rng.normal(size=(3, 4)), rng.normal(size=(8, 4, 64, 64)), rng.normal(size=(8, 4, 66))[:, :, ::2]):
    for call in calls(x):
        expected = bits(call())
        growth = []
        for _ in range(4):  # Python keeps some blocks for later; what leaks, leaks each time
            gc.collect()
            before = libc.blocks_in_use()
            least = min(least, sweep(call, expected))
            gc.collect()
            growth.append(libc.blocks_in_use() - before)
        assert min(growth) <= 0, (x.shape, growth)
print(least)
"""


@linux
@pytest.mark.parametrize("limit", [0, 1 << 28])
@pytest.mark.parametrize("allocator", ["malloc", "pymalloc"])
def test_every_request_for_memory_may_fail_and_nothing_leaks(allocator, limit, failing_malloc):
    """Of the operators; `merge_statistics` is Python, which leaks and, as version 3.12.1, crashes by itself."""
    code = FAILURES.replace("LIMIT", str(limit))
    # Besides Python's objects, which pymalloc finds room for, a small call asks for nothing but the kernels' workspace.
    least = {"malloc": 5, "pymalloc": 1}[allocator]
    assert int(python(code, PYTHONMALLOC=allocator, LD_PRELOAD=failing_malloc)) >= least


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory):
    library = tmp_path_factory.mktemp("malloc") / "failing_malloc.so"
    source = Path(__file__).with_name("cpp") / "failing_malloc.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return str(library)


# ---------------------------------------------------------------- more elements than 32 bits count

LARGE = 2**31 + 3 * 8192 + 5


@pytest.mark.parametrize("shape", [(1, 1, LARGE), (LARGE, 1), (65537, 1, 32769), (3, 2, 2**29)], ids=str)
def test_more_elements_than_32_bits_count_in_a_view_of_one(shape):
    one = np.broadcast_to(np.float16(3), shape)
    statistics = bnbp.batch_norm_training_statistics(one)
    count = one.size // shape[1]
    assert statistics.count == count
    assert (statistics.mean == 3).all()
    assert (statistics.m2 == 0).all()


@linux
@pytest.mark.parametrize("layout", ["run", "rows"])
def test_the_last_elements_of_a_large_dense_tensor_are_reduced(layout):
    """Memory that was never written to is zeros that take none."""
    shape, axis = ((1, 1, LARGE), 1) if layout == "run" else ((LARGE // 3, 3), 1)
    x = np.frombuffer(mmap.mmap(-1, LARGE * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), np.float16)
    x = x[: np.prod(shape)].reshape(shape)
    x.flat[-1] = 512
    statistics = bnbp.batch_norm_training_statistics(x, channel_axis=axis)
    assert statistics.mean[-1] * statistics.count == pytest.approx(512, rel=1e-12)


@linux
def test_places_beyond_32_bits_are_written():
    """An output whose elements are far apart, in memory of which few pages are ever touched."""
    memory = np.frombuffer(mmap.mmap(-1, 5 << 32, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), np.float32)
    out = np.lib.stride_tricks.as_strided(memory, (5, 2, 4), (1 << 32, 1 << 31, 1 << 29))
    x = np.random.default_rng(0).normal(size=(5, 2, 4)).astype(np.float32)
    expected = bnbp.batch_norm_training(x, None, None)
    assert bnbp.batch_norm_training(x, None, None, out=(out, None, None)).normalized is out
    assert out.tobytes() == expected.normalized.tobytes()


@linux
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, LARGE, 1), 0), ((1, LARGE // 3, 3), 2), ((2**14 + 1, 4, 2**15), 1)],
    ids=["run", "rows", "tiles"],
)
def test_both_ends_of_a_large_dense_result_are_written(shape, axis):
    """More than 4 GiB of results, of which all but the ends lie in the same 16 MiB."""
    out = large_dense(shape)
    ends = [out[0, :1000], out[-1, -1000:]]
    for end in ends:
        end[...] = np.nan
    values = np.random.default_rng(0).normal(size=(2, *ends[0].shape)).astype(np.float16)
    if axis == 1:  # the same image over and over, in an order that is not that of the result
        values[1] = values[0]
        x = np.broadcast_to(np.asfortranarray(values[0]), shape)
    else:
        x = large_dense(shape)
        x[0, :1000], x[-1, -1000:] = values
    mean, variance = np.full((2, shape[axis]), [[0.5], [4.0]], np.float16)
    bnbp.batch_norm_inference(x, None, None, mean, variance, 0.0, channel_axis=axis, out=out)
    for end, value in zip(ends, values, strict=True):
        np.testing.assert_allclose(end, (value.astype(float) - 0.5) / 2, rtol=1e-3, atol=1e-7)


def large_dense(shape):
    """A dense array whose first and last MiB are its own; between them are the same 16 MiB over and over."""
    own, piece, size = 1 << 20, 1 << 24, 2 * math.prod(shape)
    memory = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), np.float16)
    map_at = ctypes.CDLL(None).mmap
    map_at.restype, map_at.argtypes = ctypes.c_size_t, (*2 * (ctypes.c_size_t,), *3 * (ctypes.c_int,), ctypes.c_long)
    file = os.memfd_create("piece")
    os.truncate(file, piece)
    for offset in range(own, size - own - piece, piece):
        address = memory.ctypes.data + offset
        how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED
        assert map_at(address, piece, *how, file, 0) == address
    os.close(file)
    return memory.reshape(shape)


MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # of Linux; Python names the second from 3.13 on


# ---------------------------------------------------------------- signals


@pytest.mark.skipif(os.name != "posix", reason="this system sends no such signal to one process")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "operator"),
    [
        ((1 << 25, 1, 1 << 17), "statistics"),
        ((1 << 38, 8), "statistics"),
        ((1 << 13, 1 << 12, 1 << 17), "backprop"),
    ],
)
def test_a_long_call_is_interrupted(shape, operator, num_threads):
    """Each would take minutes; the time limit of the process is the claim."""
    code = f"""
import os, signal, threading, numpy as np, bnbp
signal.signal(signal.SIGINT, signal.default_int_handler)
x = np.broadcast_to(np.float32(1), {shape})
v = np.ones(x.shape[1], np.float32)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    if {operator!r} == "statistics":
        bnbp.batch_norm_training_statistics(x, num_threads={num_threads})
    else:
        bnbp.batch_norm_training_backprop_reduce(x, v, x, num_threads={num_threads})
except KeyboardInterrupt:
    y = bnbp.batch_norm_training(np.array([[1.0], [3.0]]), None, None, 0.0, num_threads={num_threads})
    print(y.normalized.ravel().tolist())
"""
    assert python(code) == "[-1.0, 1.0]"


@pytest.mark.skipif(os.name != "posix", reason="this system sends no such signal to one process")
def test_a_handler_that_raises_nothing_changes_nothing():
    """Not even if it calls an operator itself."""
    code = """
import os, signal, threading, time, numpy as np, bnbp
x = np.random.default_rng(0).normal(size=(8, 16, 40, 40)).astype(np.float32)
def run(): return b"".join(array.tobytes() for array in bnbp.batch_norm_training(x, None, None, num_threads=2))
expected, got, calls = run(), [], []
signal.signal(signal.SIGUSR1, lambda *_: (got.append(run()), calls.append(inside)))
inside = False
timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
large = np.broadcast_to(np.float16(3), (1 << 15, 1, 1 << 15))
timer.start()
inside = True
statistics = bnbp.batch_norm_training_statistics(large, num_threads=2)
inside = False
timer.join()
print(got == [expected], calls, statistics.mean, statistics.m2)
"""
    assert python(code) == "True [True] [3.] [0.]"


# ---------------------------------------------------------------- a long life


@linux
def test_memory_does_not_grow_with_calls_or_errors():
    """10^5 of each. A leak of 16 bytes would be 1.6 MB."""
    code = """
import gc, os, numpy as np, bnbp
x, v = np.ones((2, 3, 4), np.float32), np.ones(3, np.float32)
large = np.ones((4, 16, 64, 64), np.float32)

def good():
    bnbp.batch_norm_training_backprop(x, v, v, v, v, x, num_threads=1)

def bad():
    try:
        bnbp.batch_norm_training_backprop(x, v, v, v, v[:2], x)
    except ValueError:
        return
    raise AssertionError

def size():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for function in (good, bad):
    for _ in range(5000): function()
    before = size()
    for _ in range(10**5): function()
    print(function.__name__, "grew" if size() - before > 1 << 20 else "kept")
"""
    assert python(code).split() == ["good", "kept", "bad", "kept"]
