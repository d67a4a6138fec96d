"""Memory that is kept for results: who owns it, how much there is, and what it never does."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import make_batch, python, same_bits

import bnbp

SHAPE = (4, 16, 64, 64)  # 1 MiB of float32, from which on memory is kept


@pytest.fixture(autouse=True)
def limit():
    """An empty pool for each test, and the usual one after it."""
    bnbp.set_pool_limit(0)
    bnbp.set_pool_limit(64 << 20)
    yield
    bnbp.set_pool_limit(0)
    bnbp.set_pool_limit(256 << 20)


def pool():
    return bnbp.show_config("dicts")["pool"]


def result(shape=SHAPE, fill=1.0):
    x = np.full(shape, fill, np.float32)
    zeros, ones = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    return bnbp.batch_norm_inference(x, None, None, zeros, ones, epsilon=0.0)


def test_a_result_is_an_array_like_any_other():
    array = result()
    assert array.flags.owndata
    assert array.base is None
    assert array.flags.writeable
    assert array.ctypes.data % 64 == 0
    array.resize((5, *SHAPE[1:]), refcheck=False)
    assert (array[:4] == 1).all()
    array.resize((2, *SHAPE[1:]), refcheck=False)
    assert (array == 1).all()


def test_memory_comes_back_and_is_used_again():
    first = result()
    place, before = first.ctypes.data, pool()
    assert before["held"] == 0
    del first
    assert pool()["held"] == 1 << 20
    second = result(fill=2.0)
    assert second.ctypes.data == place
    assert pool()["held"] == 0
    assert pool()["reused"] == before["reused"] + 1
    assert (second == 2).all()


def test_memory_that_is_in_use_is_nobody_elses():
    arrays = [result(fill=float(k)) for k in range(8)]
    view = arrays[3][1]
    del arrays[3]
    more = [result(fill=float(10 + k)) for k in range(8)]
    assert (view == 3).all()
    assert all((array == k).all() for k, array in zip((0, 1, 2, 4, 5, 6, 7), arrays, strict=True))
    assert all((array == 10 + k).all() for k, array in enumerate(more))


def test_no_more_is_kept_than_the_limit_and_the_last_stays():
    bnbp.set_pool_limit(3 << 20)
    arrays = [result() for _ in range(6)]
    places = [array.ctypes.data for array in arrays]
    while arrays:
        del arrays[0]
        assert pool()["held"] <= 3 << 20
    assert pool()["held"] == 3 << 20
    assert {result().ctypes.data for _ in range(3)} <= set(places[3:])
    large = result((16, 16, 64, 64))
    held = pool()["held"]
    del large
    assert pool()["held"] == held, "what is larger than the limit is not kept"


def test_memory_that_is_much_too_large_is_not_taken():
    large = result((16, 16, 64, 64))
    del large
    small = result()
    assert pool()["held"] == 4 << 20
    del small


def test_memory_that_is_a_little_too_large_is_taken_and_counted_whole():
    large = result((5, 16, 64, 64))
    place, size = large.ctypes.data, large.nbytes
    del large
    small = result()
    assert small.ctypes.data == place
    assert small.nbytes < size
    assert pool()["held"] == 0
    del small
    assert pool()["held"] == size


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_what_is_kept_is_given_up_where_memory_is_refused():
    """128 MiB are kept, 64 more are to be had, and 160 are asked for."""
    code = """
import os, resource, numpy as np, bnbp
bnbp.set_pool_limit(256 << 20)
def result(mebibytes):
    x, v = np.broadcast_to(np.float32(3), (mebibytes, 1, 1 << 18)), np.ones(1, np.float32)
    return bnbp.batch_norm_inference(x, None, None, v, v, 0.0, num_threads=1)
result(128)
held = bnbp.show_config("dicts")["pool"]["held"]
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
array = result(160)
print(held >> 20, array.min(), array.max(), bnbp.show_config("dicts")["pool"]["held"])
"""
    assert python(code) == "128 2.0 2.0 0"


def test_small_results_are_left_to_numpy():
    array = result((2, 16, 8, 8))
    del array
    assert pool()["held"] == 0


def test_a_limit_of_zero_keeps_nothing():
    array, kept = result(), result()
    del kept
    bnbp.set_pool_limit(0)
    assert pool()["held"] == 0
    del array
    assert pool() == {**pool(), "held": 0, "limit": 0}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (-1, ValueError, "limit: expected at least 0, got -1"),
        (1.5, TypeError, "limit: expected an integer, got 1.5"),
        ("1", TypeError, "limit: expected an integer, got '1'"),
    ],
)
def test_a_wrong_limit_changes_nothing(wrong, error, message):
    before = pool()
    with pytest.raises(error) as caught:
        bnbp.set_pool_limit(wrong)
    assert str(caught.value) == message
    assert pool() == before


@pytest.mark.parametrize(
    ("value", "limit", "warning"),
    [
        ("", 256 << 20, ""),
        ("0", 0, ""),
        (" 12 ", 12 << 20, ""),
        ("lots", 256 << 20, "BNBP_POOL_MIB: expected a number of MiB, got 'lots'; ignored"),
    ],
)
def test_the_environment_sets_the_limit(value, limit, warning, monkeypatch):
    monkeypatch.setenv("BNBP_POOL_MIB", value)
    ask = "import bnbp; print(bnbp.show_config('dicts')['pool']['limit'])"
    process = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str(limit)
    assert warning in process.stderr
    assert bool(process.stderr) is bool(warning)


def test_many_threads_share_it():
    batch = make_batch(SHAPE, dtype=np.float32)
    expected = bnbp.batch_norm_training_backprop(*batch)
    wrong = []

    def work():
        for _ in range(20):
            if not same_bits(bnbp.batch_norm_training_backprop(*batch, num_threads=1), expected):
                wrong.append(True)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool()["held"] <= 8 << 20


def test_what_cannot_be_had_is_a_memory_error():
    zeros = np.zeros(1, np.float32)
    huge = np.broadcast_to(zeros, (2**40, 1, 2**10))
    with pytest.raises(MemoryError):
        bnbp.batch_norm_inference(huge, None, None, zeros, zeros)
    assert (result() == 1).all()


@pytest.mark.parametrize("first", [0, 1])
def test_of_what_fits_the_smallest_is_taken(first):
    """In whichever order they came back."""
    arrays = [result((5, 16, 64, 64)), result((9, 8, 64, 64))]
    places = [array.ctypes.data for array in arrays]
    del arrays[first]
    del arrays[0]
    small = result()
    assert small.ctypes.data == places[1]
    assert pool()["held"] == 5 << 18
