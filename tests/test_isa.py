"""The builds of the kernels for different instruction sets: all of them pass the same tests, with the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bnbp
from bnbp.engine import isa

USABLE = bnbp.show_config("dicts")["isa"]["usable"]
USED = bnbp.show_config("dicts")["isa"]["used"]
TESTS = Path(__file__).parent

# Every operator on every layout the tests know and on hostile data, and sums that tell their order, as one digest. Of
# what is left of the lanes, which each level masks in its own way, all lengths.
DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import ml_dtypes, numpy as np, bnbp
from conftest import DTYPES, LAYOUTS, MIXED, make_batch, make_telling, sums_of
from test_border import arranged, hostile_numbers, mixed
from test_thresholds import LONG, RESTS, tensors_of, whole_numbers
digest = hashlib.sha256()
np.seterr(all="ignore")
for dtype, parameters in MIXED:
    info = ml_dtypes.finfo(dtype)
    for shape, axis in LAYOUTS:
        for scale in (1.0, 1e-30, 1e30, float(info.smallest_normal) / 4, float(info.max) / 1e3):
            batch = make_batch(shape, axis, dtype, parameters=parameters)
            with np.errstate(all="ignore"):
                batch = batch._replace(input=batch.input * dtype(scale), mean=batch.mean * parameters(scale))
                for spoiled in (batch, batch._replace(normalized_delta=batch.normalized_delta * dtype(scale))):
                    for name, count in (("training", 3), ("training_backprop", 6), ("inference", 5),
                                        ("inference_backprop", 6)):
                        result = getattr(bnbp, "batch_norm_" + name)(*spoiled[:count], channel_axis=axis)
                        for array in [result] if isinstance(result, np.ndarray) else result:
                            array[np.isnan(array)] = np.nan  # the sign of a NaN is nobody's business
                            digest.update(array.tobytes())
for dtype in DTYPES:
    for shape, axis in LAYOUTS + [(shape, 1) for shape in RESTS + LONG]:
        telling = make_telling(shape, axis, dtype)
        for array in sums_of(telling, axis):
            digest.update(array.tobytes())
        digest.update(bnbp.exact.batch_norm_training_statistics(telling.input, channel_axis=axis).to_bytes())
    for shape in RESTS:
        for array in tensors_of(whole_numbers(shape, dtype), shape, 0).values():
            digest.update(array.tobytes())
for dtype, parameters in MIXED:
    channels = mixed(dtype, parameters)
    values = hostile_numbers(channels, 1e-5, dtype)
    for shape in ((3, 80, 33), (90, 80), (31, 80, 3)):
        x, addend = arranged(values, shape, 1), np.flip(arranged(values, shape, 1))
        for activation in ("relu", "relu6"):
            y = bnbp.batch_norm_inference(x, *channels, activation=activation, addend=addend)
            for output in ({}, {"normalized": y, "addend": True}):
                results = bnbp.batch_norm_training_backprop(x, *channels, addend, activation=activation, **output)
                for array in (y, *results):
                    array[np.isnan(array)] = np.nan
                    digest.update(array.tobytes())
print(bnbp.show_config("dicts")["isa"]["used"], digest.hexdigest())
"""


def python(*arguments, level):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent / "tests",
        env={**os.environ, "BNBP_ISA": level},
        capture_output=True,
        text=True,
    )


def test_bits_do_not_depend_on_the_instruction_set():
    digests = set()
    for level in USABLE:
        result = python("-c", DIGEST, str(TESTS), level=level)
        assert result.returncode == 0, result.stderr
        used, digest = result.stdout.split()
        assert used == level
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.parametrize("level", [level for level in USABLE if level != USED])
def test_the_kernels_pass_their_tests_on_every_other_level(level):
    """On the one in use all tests run as they are. Activations have the same bits, by the test above."""
    result = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "test_operators.py",
        "test_accuracy.py",
        "test_schedule.py",
        "test_thresholds.py",
        "test_layouts.py",
        "-k",
        "not gigabyte",
        level=level,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_level_is_an_error_that_lists_what_can_be_had():
    result = python("-c", "import bnbp", level="avx9")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        f"ImportError: BNBP_ISA: expected one of {', '.join(USABLE)}, got 'avx9', "
        "which is not one that bnbp was built for"
    )


def test_the_best_level_is_taken_unless_one_is_forced():
    ask = "import bnbp; print(bnbp.show_config('dicts')['isa'])"
    assert f"'used': '{USABLE[0]}', 'forced': False" in python("-c", ask, level="").stdout
    assert f"'used': '{USABLE[-1]}', 'forced': True" in python("-c", ask, level=USABLE[-1]).stdout


def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(isa, "find_spec", lambda name: True)
    monkeypatch.setenv("BNBP_ISA", "x86-64-v4")
    with pytest.raises(
        ImportError, match=r"^BNBP_ISA: expected one of x86-64-v3, x86-64, .* not supported by this CPU$"
    ):
        isa.load_kernels(lambda level: level != "x86-64-v4")
