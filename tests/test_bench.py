"""The benchmark: that its answers are checked, and that it says what it did. No test looks at a time."""

import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from matplotlib.figure import Figure

import bnbp
from bnbp import reference
from bnbp.cli import bench as command
from bnbp.cli.benchmark import candidates, machine, measure, peers, plot, points, report
from bnbp.cli.operators import OUTPUTS, Activation, Operator

_floor = candidates.load_floor()

POINT = points.Point("small", (2, 16, 8, 8), 1, "training_backprop", "nchw", 1)

# How far a right answer may be from the reference, by the type of the tensors. In 16 bits that is one rounding.
RIGHT = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 1e-5, "float64": 2e-14}

# Each with the marker of what it needs.
TORCH = pytest.param("torch", marks=pytest.mark.torch)
OTHERS = [pytest.param("tensorflow", marks=pytest.mark.framework), pytest.param("jax", marks=pytest.mark.jax)]


def bnbp_bench(arguments, cwd, program=("-m", "bnbp"), timeout=60, **environment):
    command = [sys.executable, *program, "bench", *arguments.split()]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


# The floor


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 1, 3])  # words from where memory is aligned
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1000, 5003])
def test_the_floor_copies_all_words_and_no_others(n, offset, num_threads, streaming):
    a, b = np.arange(n + offset, dtype=np.uint64)[offset:], np.full(n, 2, np.uint64)
    for copy, inputs, right in ((_floor.copy2, (a, b), a + 2), (_floor.copy1, (a,), a)):
        memory = np.full(n + 8, 2**64 - 1, np.uint64)
        copy(*inputs, memory[offset : offset + n], num_threads, streaming)
        np.testing.assert_array_equal(memory[offset : offset + n], right)
        assert (memory[:offset] == 2**64 - 1).all()
        assert (memory[offset + n :] == 2**64 - 1).all()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 1), (0, 3), (3, 1)])  # words from where memory is aligned
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1000, 5003])
def test_the_floor_of_an_addend_reads_three_arrays_and_writes_two(n, first, second, num_threads, streaming):
    a, b, c = np.arange(n, dtype=np.uint64), np.full(n, 2, np.uint64), np.arange(n, 2 * n, dtype=np.uint64)
    memories = np.full((2, n + 8), 2**64 - 1, np.uint64)
    out, other = (memory[offset : offset + n] for memory, offset in zip(memories, (first, second), strict=True))
    _floor.copy3(a, b, c, out, other, num_threads, streaming)
    np.testing.assert_array_equal(out, a + b)
    np.testing.assert_array_equal(other, b + c)
    for memory, offset in zip(memories, (first, second), strict=True):
        assert (memory[:offset] == 2**64 - 1).all()
        assert (memory[offset + n :] == 2**64 - 1).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1000, 5003])
def test_the_floor_reads_all_words(n, num_threads):
    a, b = np.arange(n, dtype=np.uint64), np.full(n, 2, np.uint64)
    assert _floor.read1(a, num_threads) == n * (n - 1) // 2
    assert _floor.read2(a, b, num_threads) == n * (n - 1) // 2 + 2 * n


def test_the_floor_refuses_what_it_cannot_walk():
    a = np.ones(8, np.uint64)
    for arguments, says in (
        ((a, a[:7], a, 1), "one length"),
        ((a, a, a, 0), "num_threads"),
        ((a, a.astype(np.float64), a, 1), "mismatch"),
        ((np.ones((8, 2), np.uint64), a, a, 1), "number of dimensions"),
        ((a[::2], a[::2], a[::2], 1), "contiguous"),
    ):
        with pytest.raises(ValueError, match=says):
            _floor.copy2(*arguments)
    for k in range(5):
        with pytest.raises(ValueError, match="one length"):
            _floor.copy3(*(a[: 8 - (k == n)] for n in range(5)), 1)


#: Operator, activation and addend; how many tensors are read and written, and how many are read for the sums.
TRAFFIC = [
    ("training", None, False, 1, 1, 1),
    ("training", "relu", False, 1, 1, 1),
    ("training", "relu", True, 2, 1, 1),
    ("training_backprop", None, False, 2, 1, 2),
    ("training_backprop", "relu6", False, 2, 1, 2),
    ("training_backprop", "relu", True, 3, 2, 2),
    ("inference", "relu6", True, 2, 1, 0),
    ("inference_backprop", "relu", False, 2, 1, 0),
    ("inference_backprop", "relu", True, 3, 2, 0),
]


@pytest.mark.parametrize(("operator", "activation", "addend", "num_read", "num_written", "num_reduced"), TRAFFIC)
def test_the_floor_moves_what_the_operator_must(
    monkeypatch, operator, activation, addend, num_read, num_written, num_reduced
):
    calls = []

    class Loops:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, [a for a in arguments if isinstance(a, np.ndarray)]))

    monkeypatch.setattr(candidates, "load_floor", Loops)
    point = points.Point("small", (4, 3, 5, 8), 1, operator, "nchw", 2, activation, addend)
    benchmark = measure.Benchmark(measure.Settings(activation=activation, addend=addend))
    batch = benchmark._batch(point)
    out = benchmark._results(point, batch)
    for candidate in candidates.floor(point, batch, out):
        candidate.call()
    copies = [arrays for name, arrays in calls if name == f"copy{num_read}"]
    reads = [arrays for name, arrays in calls if name == f"read{num_reduced}"]
    assert (len(copies), len(reads)) == (3, 2 if num_reduced else 0)  # on one thread and on two, one of them streamed
    assert len(calls) == len(copies) + len(reads)
    tensors = [a for a in batch if a is not None and a.ndim > 1]
    for arrays in copies:
        assert len(arrays) == num_read + num_written
        assert all(any(np.shares_memory(a, b) for b in tensors) for a in arrays[:num_read])
        assert all(any(np.shares_memory(a, b) for b in out) for a in arrays[num_read:])
        assert sum(a.nbytes for a in arrays) == (num_read + num_written) * batch.input.nbytes
        assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))
    assert all(np.shares_memory(arrays[0], batch.input) and len(arrays) == num_reduced for arrays in reads)


@pytest.mark.parametrize("shape", [(4, 3, 6), (5, 3, 7)])  # 72 elements, and 105, which are no whole number of words
@pytest.mark.parametrize("dtype", measure.TOLERANCE)
def test_the_floor_is_given_the_bytes_of_the_tensors(dtype, shape):
    x = points.make_batch(shape, dtype).input
    out = np.zeros_like(x)
    _floor.copy1(candidates.words(x), candidates.words(out), 1)
    copied = x.nbytes // 8 * 8
    assert copied > 100
    assert out.tobytes()[:copied] == x.tobytes()[:copied]


# The inputs


@pytest.mark.parametrize("layout", points.LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "tensors", "others"),
    [
        ("float16", np.float16, np.float32),
        ("bfloat16", ml_dtypes.bfloat16, np.float32),
        ("float32", np.float32, np.float32),
        ("float64", np.float64, np.float64),
    ],
)
def test_the_types_and_the_statistics_of_a_batch(dtype, tensors, others, layout):
    batch = points.make_batch((31, 5, 17), dtype)
    batch = points.channels_last(batch) if layout == "nhwc" else batch
    assert {a.dtype for a in (batch.input, batch.normalized_delta)} == {np.dtype(tensors)}
    assert {a.dtype for a in batch[1:5]} == {np.dtype(others)}
    assert all(np.ptp(a.astype(np.float64)) > 0.1 for a in batch[:6])
    assert batch[6:] == (None, None)
    exact = batch.input.astype(np.float64)
    axes = (0, 1) if layout == "nhwc" else (0, 2)
    np.testing.assert_allclose(batch.mean, exact.mean(axes), rtol=2e-7)
    np.testing.assert_allclose(batch.variance, exact.var(axes), rtol=2e-7)


@pytest.mark.parametrize("layout", points.LAYOUTS)
@pytest.mark.parametrize("dtype", measure.TOLERANCE)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("addend", [False, True])
def test_the_inputs_of_an_activation(dtype, activation, addend, layout):
    plain = points.make_batch((31, 5, 17), dtype)
    batch = points.with_activation(plain, str(activation), addend)
    y = reference.batch_norm_inference(*batch[:5], candidates.EPSILON, addend=batch.addend)
    assert (batch.addend is None) != addend
    for bound, is_flat in ((0, y <= 0), (6, y >= 6)):
        share = np.mean(batch.normalized == bound)
        if bound == 0 or activation == "relu6":
            assert 0.05 < share < 0.7
            assert share == pytest.approx(np.mean(is_flat), abs=0.01)
        else:
            assert share < 0.02
    last = points.channels_last(batch)
    for name, a, b in zip(batch._fields, batch, last, strict=True):
        assert (a is None) == (b is None) == (name == "addend" and not addend)
        if a is not None:
            assert a.dtype == b.dtype == (batch.input if a.ndim > 1 else batch.gamma).dtype
            assert b.flags.c_contiguous
            np.testing.assert_array_equal(a, np.moveaxis(b, -1, 1) if a.ndim > 1 else b)


# The measurement


def measure_here(point, peers=(), dtype="float32"):
    settings = measure.Settings(peers=peers, dtype=dtype, rounds=1, activation=point.activation, addend=point.addend)
    return measure.Benchmark(settings).measure(point)


@pytest.mark.parametrize("dtype", measure.TOLERANCE)
@pytest.mark.parametrize("layout", points.LAYOUTS)
@pytest.mark.parametrize("operator", Operator)
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5, 6), (2, 3, 4, 3, 2)])
def test_bnbp_and_numpy_are_right_for_any_number_of_axes(operator, layout, shape, dtype):
    row = measure_here(points.Point("odd", shape, 1, operator, layout, 2), ("numpy",), dtype)
    assert row.notes == {}
    assert row.deviations.keys() == {"bnbp", "bnbp fresh", "numpy"}
    assert max(row.deviations.values()) < RIGHT[dtype]
    assert row.seconds.keys() - {"read"} == {"floor", *row.deviations}
    assert ("read" in row.seconds) == operator.startswith("training")


FUSED = [("relu", False), ("relu6", False), ("relu", True), ("relu6", True)]


@pytest.mark.parametrize("dtype", measure.TOLERANCE)
@pytest.mark.parametrize("layout", points.LAYOUTS)
@pytest.mark.parametrize("operator", Operator)
@pytest.mark.parametrize(("activation", "addend"), FUSED)
def test_bnbp_and_numpy_are_right_with_an_activation(activation, addend, operator, layout, dtype):
    row = measure_here(points.Point("odd", (6, 4, 7, 6), 1, operator, layout, 2, activation, addend), ("numpy",), dtype)
    assert row.notes == {}
    assert row.deviations.keys() == {"bnbp", "bnbp fresh", "bnbp plain", "numpy"}
    assert max(row.deviations.values()) < 2 * RIGHT[dtype]
    assert row.seconds.keys() - {"read"} == {"floor", *row.deviations}


@pytest.mark.parametrize(("activation", "addend"), FUSED)
@pytest.mark.parametrize("operator", Operator)
def test_an_answer_without_the_activation_or_the_addend_is_wrong(monkeypatch, operator, activation, addend):
    """Also one with the other activation, and a gradient that lacks that of the addend."""
    point = points.Point("small", (8, 16, 8, 8), 1, operator, "nchw", 1, activation, addend)
    other = next(other for other in Activation if other != activation)

    class Forgetful(peers.NumPy):
        name = "forgetful"
        point = None

        def candidate(self, point, batch):
            call = super().candidate(self.point, batch).call
            if self.point.activation is None:
                call = super().candidate(self.point, batch._replace(addend=None, normalized=None)).call
            return candidates.Candidate(self.name, call, tuple, self.name)

    monkeypatch.setitem(peers.PEERS, "forgetful", Forgetful)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for changed in (point.plain, dataclasses.replace(point, activation=str(other))):
        monkeypatch.setattr(Forgetful, "point", changed)
        row = measure_here(point, ("forgetful",))
        assert row.notes["forgetful"].startswith("wrong answer: ")
        assert "forgetful" not in row.seconds
    if addend and operator.endswith("backprop"):
        monkeypatch.setattr(Forgetful, "point", dataclasses.replace(point, addend=False))
        row = measure_here(point, ("forgetful",))
        assert row.notes == {"forgetful": "wrong answer: there is no addend_delta"}


def test_the_mask_is_not_that_of_the_reference():
    """In float64 some numbers are on the other side of the edge: these the reference is not asked about."""
    point = points.Point("small", (64, 16, 8, 8), 1, "training_backprop", "nchw", 1, "relu6", False)
    row = measure_here(point, dtype="bfloat16")
    assert row.deviations["bnbp"] < RIGHT["bfloat16"]
    batch = points.with_activation(points.make_batch(point.shape, "bfloat16"), "relu6", False)
    wrong = reference.batch_norm_training_backprop(*batch[:6], candidates.EPSILON, activation="relu6")
    right = measure.right_answer(point, batch)
    assert measure.deviation(wrong.input_delta, right[0]) > measure.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("peer", [TORCH, *OTHERS])
def test_a_peer_is_right(tmp_path, peer, dtype):
    """In a process of its own: they do not like to be forked, as other tests do."""
    assert importlib.util.find_spec(peer), f"this test needs {peer}"
    program = """
import sys
from bnbp.cli.benchmark import points
from bnbp.__main__ import main
points.SETS["small"] = {(6, 5): 1, (3, 4, 5, 6): 1, (2, 3, 4, 3, 2): 1}
sys.exit(main())
"""
    arguments = f"--set small --rounds 1 --peer {peer} --dtype {dtype} --threads {machine.cpus()} --json x.json"
    done = bnbp_bench(arguments, cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == 5 * 4  # of two axes there is one layout
    for row in rows:
        if peer in row["notes"] and dtype != "float32":  # on some CPUs TensorFlow has that one for channels-last alone
            case = (row["point"]["operator"], row["point"]["layout"])
            assert (peer, *case) == ("tensorflow", "inference_backprop", "nchw")
            assert row["notes"][peer].startswith("it fails: ")
            continue
        assert row["notes"] == {}
        assert row["deviations"][peer] < RIGHT[dtype]
        assert peer in row["seconds"]


SMALL_SET = """
import sys
from bnbp.cli.benchmark import points
from bnbp.__main__ import main
points.SETS["small"] = {(40, 5): 1, (6, 5, 7, 3): 1}
sys.exit(main())
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("peer", [TORCH, OTHERS[1]])
@pytest.mark.parametrize(("activation", "addend"), FUSED)
def test_a_peer_is_right_with_an_activation(tmp_path, activation, addend, peer, dtype):
    assert importlib.util.find_spec(peer), f"this test needs {peer}"
    arguments = f"--set small --rounds 1 --peer {peer} --dtype {dtype} --threads {machine.cpus()}"
    arguments += f" --json x.json --activation {activation}" + " --addend" * addend
    done = bnbp_bench(arguments, cwd=tmp_path, program=("-c", SMALL_SET))
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == 3 * 4
    for row in rows:
        assert row["notes"] == {}
        assert row["deviations"][peer] < 2 * RIGHT[dtype]
        assert peer in row["seconds"]


@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "addend"), [("float32", False), ("bfloat16", True)])
def test_what_torch_compiles_is_right(tmp_path, dtype, addend):
    """For each shape, layout and number of threads there is a version, more of them than PyTorch keeps of one."""
    assert importlib.util.find_spec("torch"), "this test needs torch"
    arguments = "--set small --rounds 1 --peer torch.compile --threads 1,2 --json x.json --activation relu6"
    arguments += f" --dtype {dtype}" + " --addend" * addend
    done = bnbp_bench(arguments, tmp_path, ("-c", SMALL_SET), 600, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "c"))
    # PyTorch with CUDA says so where there is no GPU.
    printed = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert (done.returncode, printed) == (0, [])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == 3 * 4 * 2
    for row in rows:
        if (row["point"]["operator"], dtype) == ("training", "bfloat16"):  # it rounds the statistics to that type
            assert row["notes"]["torch.compile"].startswith("wrong answer: batch_mean is off by 0.00")
            continue
        assert row["notes"] == {}
        assert row["deviations"]["torch.compile"] < 2 * RIGHT[dtype]


@pytest.mark.torch
def test_without_a_compiler_what_torch_compiles_is_left_out(tmp_path):
    assert importlib.util.find_spec("torch"), "this test needs torch"
    arguments = "--set small --rounds 1 --peer torch --peer torch.compile --threads 1 --json x.json --activation relu"
    environment = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    done = bnbp_bench(arguments, tmp_path, ("-c", SMALL_SET), **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch.compile: it fails: No working C++ compiler found" in done.stdout
    for row in json.loads((tmp_path / "x.json").read_text())["rows"]:
        assert row["notes"].keys() == {"torch.compile"}
        assert "torch" in row["seconds"]


def test_torch_compile_is_a_peer_of_activations_alone(monkeypatch):
    looked_for = []
    monkeypatch.setattr(importlib.util, "find_spec", looked_for.append)
    assert "torch.compile" not in command._peers(None, None)
    names = command._peers(None, Activation.relu)
    assert set(names) == peers.PEERS.keys()
    benchmark = measure.Benchmark(measure.Settings(peers=names))
    assert benchmark.absent == dict.fromkeys(names, "not installed")
    assert set(looked_for) == {"torch", "tensorflow", "jax", "numpy"}  # the packages


class Wrong(peers.NumPy):
    """One element of one output is a little off."""

    name = "wrong"
    output = 0

    def candidate(self, point, batch):
        right = super().candidate(point, batch)

        def call():
            results = [np.array(array) for array in right.call()]
            results[self.output].flat[-1] += 0.05 * np.abs(results[self.output]).max()
            return results

        return candidates.Candidate(self.name, call, tuple, self.name)


@pytest.mark.parametrize("dtype", measure.TOLERANCE)
@pytest.mark.parametrize(("output", "name"), [*enumerate(OUTPUTS["training_backprop"])])
def test_a_wrong_answer_is_told_and_not_timed(monkeypatch, output, name, dtype):
    monkeypatch.setattr(Wrong, "output", output)
    monkeypatch.setitem(peers.PEERS, "wrong", Wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    row = measure_here(POINT, ("wrong",), dtype)
    assert row.notes == {"wrong": f"wrong answer: {name} is off by 0.05 of its largest value"}
    assert "wrong" not in row.seconds
    assert "bnbp" in row.seconds
    assert list(report.remarks([row])) == [f"wrong: {row.notes['wrong']}"]


@pytest.mark.parametrize("dtype", measure.TOLERANCE)
@pytest.mark.parametrize("forgotten", [0, 1])
def test_a_formula_that_lacks_a_term_is_a_wrong_answer(monkeypatch, forgotten, dtype):
    class Forgetful(peers.NumPy):
        name = "forgetful"

        def candidate(self, point, batch):
            sums = [*reference.batch_norm_training_backprop_reduce(batch.input, batch.mean, batch.normalized_delta)]
            sums[forgotten] = np.zeros(16)
            wrong = reference.batch_norm_training_backprop_apply(*batch[:6], *sums, 2 * 8 * 8, candidates.EPSILON)
            _, *right = super().candidate(point, batch).call()
            return candidates.Candidate(self.name, lambda: (wrong.input_delta, *right), tuple, self.name)

    monkeypatch.setitem(peers.PEERS, "forgetful", Forgetful)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    row = measure_here(POINT, ("forgetful",), dtype)
    assert row.notes.keys() == {"forgetful"}
    assert row.notes["forgetful"].startswith("wrong answer: input_delta is off by ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda dx: dx * np.float32(np.nan), "off by nan"),
        (lambda dx: dx[:1], r"has the shape \(1, 16, 8, 8\), not \(2, 16, 8, 8\)"),
        (lambda dx: dx[0], r"has the shape \(16, 8, 8\)"),
    ],
)
def test_a_wrong_answer_of_bnbp_is_told_too(monkeypatch, change, says):
    right = bnbp.batch_norm_training_backprop

    def wrong(*arguments, **options):
        dx, dgamma, dbeta = right(*arguments, **options)
        return change(dx), dgamma, dbeta

    monkeypatch.setattr(bnbp, "batch_norm_training_backprop", wrong)
    row = measure_here(POINT)
    assert row.notes.keys() == {"bnbp", "bnbp fresh"}
    for note in row.notes.values():
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(note)
    assert row.seconds.keys() == {"floor", "read"}


def test_a_peer_that_fails_is_told_and_the_others_are_measured(monkeypatch):
    class Failing(peers.NumPy):
        name = "failing"

        def candidate(self, point, batch):
            return candidates.Candidate(self.name, lambda: 1 / 0, tuple, self.name)

    class Broken(peers.NumPy):
        name = "broken"

        def __init__(self, threads, dtype):
            raise ImportError("a library is missing\nand more")

    for peer in (Failing, Broken):
        monkeypatch.setitem(peers.PEERS, peer.name, peer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "absent" else name)
    benchmark = measure.Benchmark(measure.Settings(peers=("absent", "broken", "failing", "numpy"), rounds=1))
    assert benchmark.absent == {"absent": "not installed", "broken": "it fails: a library is missing"}
    row = benchmark.measure(POINT)
    assert row.notes == {"failing": "it fails: division by zero"}
    assert "numpy" in row.seconds


def test_turns_go_forwards_and_backwards_and_rest_between_libraries(monkeypatch):
    log = []
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: log.append("rest"))
    monkeypatch.setattr(measure, "sample", lambda call, repeats: call() or 1.0)
    names = {"a": "bnbp", "b": "bnbp", "c": "torch"}
    calls = [candidates.Candidate(name, lambda name=name: log.append(name), None, lib) for name, lib in names.items()]
    seconds = measure.take_turns(calls, 2, rest=True)
    assert "".join(log).replace("rest", "-") == "abc" + "-ab-c" + "c-ba"
    assert seconds == [[1.0, 1.0]] * 3


def test_the_floor_that_applies(monkeypatch):
    monkeypatch.setattr(points, "cache_limit", lambda: 32 * 2**20)

    def second_read(shape, layout="nchw", operator="training_backprop", dtype="float32"):
        return points.Point("network", shape, 1, operator, layout, 1).second_read(dtype)

    assert not second_read((32, 64, 112, 112))  # a channel is 3 MB in two tensors
    assert second_read((32, 64, 112, 112), "nhwc")
    assert not second_read((32, 64, 112, 112), "nhwc", "inference_backprop")
    assert not second_read((32, 512, 7, 7), "nhwc")
    assert not second_read((8192, 256))
    assert second_read((8192, 256), dtype="float64") is False  # exactly what is assumed to fit
    assert second_read((8200, 256), dtype="float64")
    assert not second_read((32768, 256), dtype="bfloat16")
    assert second_read((32800, 256), dtype="bfloat16")
    assert second_read((8, 1, 1024, 1024))


def test_the_network_is_resnet_50():
    assert sum(points.SETS["network"].values()) == 53
    elements = sum(math.prod(shape) * times for shape, times in points.SETS["network"].items())
    assert elements == 32 * sum(c * s * s * times for (c, s), times in points.RESNET_50.items())


# The set of the caches

#: Those of the design's section "In the caches", without the channels-last doubles.
DESIGN = {
    *((1, 64, 14, 14), (4, 64, 14, 14), (1, 512, 7, 7), (8, 512, 7, 7), (4, 256, 14, 14), (1, 1024, 14, 14)),
    *((1, 64, 56, 56), (2, 256, 28, 28), (8, 128, 28, 28), (64, 128), (64, 1024)),
}


def test_the_cache_set_has_the_shapes_of_the_design_and_those_between():
    shapes = points.SETS["cache"]
    assert shapes.keys() > DESIGN
    assert set(shapes.values()) == {1}
    sizes = sorted(math.prod(shape) for shape in shapes if shape != (64, 128))
    assert sizes[0] == 64 * 14 * 14  # the smallest of the design, but for (64, 128)
    assert sizes[0] >= 12_000
    assert 700_000 <= sizes[-1] <= 1_000_000
    assert all(larger <= 2.1 * size for size, larger in itertools.pairwise(sizes))
    planes = {shape[2:] for shape in shapes}
    assert planes == {(), (7, 7), (14, 14), (28, 28), (56, 56)}


def made_up_rows(**times):
    """Rows of the set of the caches, in both layouts: for each candidate the minima in microseconds, medians 1.5 x."""
    shapes = [(1, 64, 14, 14), (1, 512, 7, 7), (2, 8, 28, 56), (64, 128)]
    return [
        measure.Row(
            points.Point("cache", shape, 1, "training_backprop", layout, 1),
            False,
            {name: measure.Seconds(each[k] * 1e-6, each[k] * 1.5e-6) for name, each in times.items() if each[k]},
            notes={"jax": "not for us"},
        )
        for layout in points.LAYOUTS
        for k, shape in enumerate(shapes[: 4 if layout == "nchw" else 3])
    ]


TIMES = {
    "floor": (3, 4, 4, 2),
    "bnbp": (12, 30, 40, 13),
    "bnbp fresh": (13, 31, 41, 14),
    "torch": (9, 60, None, 26),
    "numpy": (50, 90, 90, 0.5),
}


def test_the_geometric_mean_of_ratios():
    rows = made_up_rows(**TIMES)[:4]
    least, middle = report.geometric_mean(rows, "torch")
    product = Fraction(12, 9) * Fraction(30, 60) * Fraction(13, 26)
    assert least**3 == pytest.approx(float(product))
    assert middle == pytest.approx(least)
    rows[0].seconds["torch"] = measure.Seconds(9e-6, 36e-6)  # the median is twice what it would be
    assert report.geometric_mean(rows, "torch")[1] ** 3 == pytest.approx(float(product * Fraction(13.5) / 36))
    assert report.geometric_mean(rows, "jax") is None


def test_the_total_is_compared_with_that_without_the_activation():
    rows = made_up_rows(**TIMES, **{"bnbp plain": (10, 20, 20, 10)})[:4]
    rows = [dataclasses.replace(row, point=dataclasses.replace(row.point, set="network", times=2)) for row in rows]
    rows[0].seconds["bnbp"] = measure.Seconds(12e-6, 28e-6)
    assert f"total / without the activation: {95 / 60:.2f} {152.5 / 90:.2f}" in report.remarks(rows)


def test_what_bnbp_is_compared_with():
    assert report.rival(made_up_rows(**TIMES)) == "torch"
    assert report.rival(made_up_rows(**{**TIMES, "torch": (99, 99, 99, 99)})) == "torch"  # though others are faster
    others = {name: times for name, times in TIMES.items() if name != "torch"}
    assert report.rival(made_up_rows(**others)) == "numpy"
    assert report.rival(made_up_rows(**others, tensorflow=(5, 5, 5, 5))) == "tensorflow"
    assert report.rival(made_up_rows(floor=TIMES["floor"], bnbp=TIMES["bnbp"])) is None


def test_rows_survive_being_saved():
    rows = made_up_rows(**TIMES)
    rows[0] = dataclasses.replace(rows[0], point=dataclasses.replace(rows[0].point, activation="relu", addend=True))
    file = io.BytesIO()
    report.save(file, measure.Settings(), {}, rows)
    content = json.loads(file.getvalue())
    assert report.load(content) == rows
    for row in content["rows"][1:]:  # as they were saved before there were activations
        del row["point"]["activation"], row["point"]["addend"]
    assert report.load(content) == rows
    first = content["totals"][0]
    assert first["geometric_means"].keys() == {"floor", "bnbp fresh", "torch", "numpy"}
    assert first["geometric_means"]["torch"]["minimum"] ** 3 == pytest.approx(1 / 3)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, and saved as usual."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **how: figures.append(self) or savefig(self, *to, **how))
    return figures


def test_the_plot_of_the_caches_has_a_panel_for_each_layout_and_a_line_for_each_implementation(drawn):
    rows = made_up_rows(**TIMES)
    file = io.BytesIO()
    plot.draw(file, "png", rows, "a machine")
    assert file.getvalue().startswith(b"\x89PNG")
    [figure] = drawn
    titles = [axes.get_title("left") for axes in figure.axes]
    assert [title.partition(", ")[2] for title in titles] == ["channels first", "(N, C)", "channels last"]
    for axes in figure.axes:
        assert len(axes.lines) == len(TIMES)
        assert axes.get_xscale() == "log"
        assert axes.get_xlabel() == "elements"
    colours = {line.get_color() for axes in figure.axes for line in axes.lines}
    assert len(colours) == len(TIMES)
    [first] = [line for line in figure.axes[0].lines if line.get_color() == plot.COLOURS["bnbp"]]
    sizes, times = first.get_data()
    assert list(sizes) == [64 * 14 * 14, 512 * 7 * 7]  # the second and the third shape have one size
    assert times == pytest.approx([12e3 / (64 * 14 * 14), math.sqrt(30 * 40) * 1e3 / (512 * 7 * 7)])
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["bnbp, out=", "bnbp fresh", "torch", "numpy", "floor: a copy"]


def test_a_plot_with_other_sets_shows_ratios(drawn):
    rows = made_up_rows(**TIMES)
    rows.append(dataclasses.replace(rows[0], point=POINT))
    plot.draw(io.BytesIO(), "svg", rows, "a machine")
    [figure] = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == ["time / floor that applies (medians)"] * 2


# The command


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_prints_a_table_and_saves_numbers_and_a_plot(tmp_path, dtype):
    arguments = f"--set small --rounds 2 --peer none --dtype {dtype} --threads 1 --json x.json --plot x.png"
    done = bnbp_bench(arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("cpu:", "isa", "openmp", "training_backprop, nhwc, 1 thread", "/ (floor + read)", "bnbp fresh"):
        assert text in done.stdout
    assert re.search(r"^bnbp isa forced: (yes|no)$", done.stdout, re.MULTILINE)
    assert re.search(r"^bnbp caches l2: .*(bytes|iB)$", done.stdout, re.MULTILINE)
    assert any(line.split()[0] == "16x32x14x14" for line in done.stdout.splitlines() if line.strip())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["environment"]["versions"]["numpy"] == np.__version__
    assert saved["environment"]["bnbp"]["version"] == bnbp.__version__
    assert (saved["settings"]["rounds"], saved["settings"]["dtype"]) == (2, dtype)
    assert len(saved["rows"]) == 3 * 4 * 2
    assert len(saved["totals"]) == 4 * 2
    for row in saved["rows"]:
        assert tuple(row["point"]["shape"]) in points.SETS["small"]
        assert row["notes"] == {}
        assert {"floor", "bnbp", "bnbp fresh"} <= row["seconds"].keys()
        assert all(0 < times["minimum"] <= times["median"] for times in row["seconds"].values())


def test_the_cache_set_is_shown_in_microseconds_beside_the_geometric_mean(tmp_path):
    """On shapes of our own, one of which would otherwise be shown in milliseconds."""
    program = """
import sys
from bnbp.cli.benchmark import points
from bnbp.__main__ import main
points.SETS["cache"] = {(1, 16, 7, 7): 1, (4, 64, 112, 112): 1}
sys.exit(main())
"""
    arguments = "--set cache --op training_backprop --rounds 1 --peer numpy --threads 1 --json x.json --plot x.svg"
    done = bnbp_bench(arguments, cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stderr) == (0, "")
    assert "training_backprop, nchw, 1 thread, us" in done.stdout
    assert "training_backprop, nhwc, 1 thread, us" in done.stdout
    assert ", ms" not in done.stdout
    assert "+ read " not in done.stdout.partition("Times are medians")[0]
    assert "/ torch is bnbp's time over PyTorch's" in " ".join(done.stdout.split())
    assert "<svg" in (tmp_path / "x.svg").read_text()

    content = json.loads((tmp_path / "x.json").read_text())
    lines = [line.split() for line in done.stdout.splitlines()]
    tables = [line for line in lines if line[:1] == ["cache"]]
    assert [line[-2:] for line in tables] == [["/", "numpy"]] * 2
    for line, layout in zip([line for line in lines if line[:2] == ["geometric", "mean"]], points.LAYOUTS, strict=True):
        seconds = [row["seconds"] for row in content["rows"] if row["point"]["layout"] == layout]
        assert "read" not in seconds[0]
        ratios = [
            math.prod(each["bnbp"][statistic] / each[name][statistic] for each in seconds) ** 0.5
            for name in ("floor", "numpy")
            for statistic in ("minimum", "median")
        ]
        assert [float(text) for text in line[2:]] == pytest.approx(ratios, abs=0.0051)


@pytest.mark.parametrize("addend", [False, True])
def test_the_command_with_an_activation_says_so_and_compares_with_the_operator_without_it(tmp_path, addend):
    program = """
import sys
from bnbp.cli.benchmark import points
from bnbp.__main__ import main
points.SETS["network"] = {(6, 5, 4, 5): 2, (8, 6, 4, 4): 1}
points.SETS["cache"] = {(8, 6, 4, 4): 1}
sys.exit(main())
"""
    arguments = (
        "--set network --set cache --rounds 1 --peer numpy --threads 1 --activation relu6 --json x.json --plot x.svg"
    )
    done = bnbp_bench(arguments + " --addend" * addend, cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stderr) == (0, "")
    case = "relu6 and addend" if addend else "relu6"
    assert done.stdout.count(f"training_backprop with {case}, nchw, 1 thread") == 2
    assert done.stdout.count("total / without the activation: ") == 4 * 2
    assert "bnbp plain is the operator without the activation" in " ".join(done.stdout.split())
    tables = [line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["network"], ["cache"])]
    assert len(tables) == 2 * 4 * 2
    assert all("plain" in line for line in tables)
    assert all(line[-6:] == ["numpy", "/", "numpy", "/", "bnbp", "plain"] for line in tables if line[0] == "cache")
    content = json.loads((tmp_path / "x.json").read_text())
    assert (content["settings"]["activation"], content["settings"]["addend"]) == ("relu6", addend)
    for row in content["rows"]:
        assert (row["point"]["activation"], row["point"]["addend"], row["notes"]) == ("relu6", addend, {})
        assert {"floor", "bnbp", "bnbp fresh", "bnbp plain", "numpy"} <= row["seconds"].keys()
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_the_command_names_what_is_not_installed_and_shows_the_total(tmp_path):
    """On shapes of our own: those of the network would take long."""
    program = """
import importlib.util, sys
from bnbp.cli.benchmark import points
from bnbp.__main__ import main
points.SETS["network"] = {(2, 3, 4, 5): 2, (3, 2, 4, 4): 1}
importlib.util.find_spec = lambda name: None if name == "torch" else name
sys.exit(main())
"""
    arguments = "--rounds 1 --peer torch --peer numpy --threads 1,2 --op inference --dtype float64"
    done = bnbp_bench(arguments, cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("not installed") == 1
    assert done.stdout.count("total of numpy / bnbp: ") == 4
    assert "2x3x4x5, 2 times" in done.stdout
    assert "inference, nhwc, 2 threads" in done.stdout
    assert "+ read " not in done.stdout.partition("Times are medians")[0]


def test_bfloat16_alone_needs_its_package(tmp_path):
    program = """
import sys
sys.modules["ml_dtypes"] = None
from bnbp.cli.benchmark import points
from bnbp.__main__ import main
points.SETS["small"] = {(2, 3, 4, 5): 1}
sys.exit(main())
"""
    arguments = "--set small --rounds 1 --peer numpy --threads 1 --dtype"
    done = bnbp_bench(f"{arguments} float16", cwd=tmp_path, program=("-c", program))
    assert (done.returncode, done.stderr) == (0, "")
    done = bnbp_bench(f"{arguments} bfloat16", cwd=tmp_path, program=("-c", program))
    message = "bnbp: bfloat16 needs ml_dtypes; run: pip install 'bnbp[bench]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_the_command_fails_if_bnbp_is_wrong(tmp_path):
    program = """
import sys
import bnbp
from bnbp.__main__ import main
bnbp.batch_norm_inference = lambda x, *rest, **options: x
sys.exit(main())
"""
    arguments = "--set small --rounds 1 --peer none --threads 1 --op inference --layout nchw --json x.json"
    done = bnbp_bench(arguments, cwd=tmp_path, program=("-c", program))
    assert done.returncode == 1
    assert done.stderr.startswith("bnbp: bnbp itself is wrong in 6 places; first inference, nchw, 1 thread, 2x16x8x8: ")
    assert "wrong answer: normalized is off by" in done.stdout
    assert "wrong answer" in json.loads((tmp_path / "x.json").read_text())["rows"][0]["notes"]["bnbp"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("--set large", 2, "'network', 'odd', 'small', 'cache'"),
        ("--op forward", 2, "'training_backprop'"),
        ("--threads 0", 2, "numbers of threads such as 1,2"),
        ("--threads 1,", 2, "numbers of threads such as 1,2"),
        ("--rounds 0", 2, "--rounds"),
        ("--peer none --peer numpy", 2, "none does not go with others"),
        ("--dtype float8", 2, "'float32'"),
        ("--activation gelu", 2, "'relu', 'relu6'"),
        ("--addend", 2, "it needs --activation"),
        ("--plot plot.txt", 2, ".png"),
        ("--json same.png --plot same.png", 2, "it is the file of --json"),
        ("--json there.json", 1, "it exists; --force replaces it"),
        ("--plot no/plot.png", 1, "there is no folder no"),
    ],
)
def test_a_command_that_is_not_understood(tmp_path, arguments, code, says):
    (tmp_path / "there.json").write_text("precious")
    done = bnbp_bench(arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("bnbp: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "precious"
