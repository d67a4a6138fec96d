"""What a strict type checker makes of the package, and whether that is what happens."""

import os
import subprocess
import sys
from pathlib import Path

import bnbp

ROOT = Path(__file__).parent.parent
PACKAGE = Path(bnbp.__file__).parent
# An editable installation is found by an import hook, which type checkers do not run.
ENVIRONMENT = {**os.environ, "MYPYPATH": str(ROOT) if PACKAGE.parent == ROOT else ""}

RIGHT = """
from typing import Any, assert_type
import numpy as np
from numpy.typing import ArrayLike, NDArray
import bnbp

x: NDArray[np.float32] = np.ones((2, 3), np.float32)
half = x.astype(np.float16)
sums = [1.0, 2.0, 3.0]

# Forward: tensors have the type of the input.
assert_type(bnbp.batch_norm_training(x).normalized, NDArray[np.float32])
forward = bnbp.batch_norm_training(x, None, [1.0, 2.0, 3.0], epsilon=1e-3, out=(x, None, None))
y, mean, variance = forward
assert_type(y, NDArray[np.float32])
assert_type(mean, NDArray[np.float32])
assert_type(bnbp.batch_norm_training(x.astype(np.float64)).batch_mean, NDArray[np.float64])
assert_type(bnbp.batch_norm_training(half).normalized, NDArray[np.float16])
assert_type(bnbp.batch_norm_training(half, mean).batch_mean, NDArray[np.floating[Any]])  # float32, or that of half
assert_type(bnbp.batch_norm_training([[1.0], [2.0]]).normalized, NDArray[np.floating[Any]])
assert_type(bnbp.batch_norm_inference(x, None, None, mean, variance, out=x), NDArray[np.float32])
assert_type(bnbp.reference.batch_norm_training(x).normalized, NDArray[np.float64])

# Gradients: vectors have the type of the mean.
backward = bnbp.batch_norm_training_backprop(
    x, None, None, forward.batch_mean, forward.batch_variance, x, channel_axis=-1, out=None, num_threads=2)
assert_type(backward.input_delta, NDArray[np.float32])
assert_type(backward[2], NDArray[np.float32])
mixed = bnbp.batch_norm_inference_backprop(half, None, None, mean, variance, half, addend=True)
assert_type(mixed.gamma_delta, NDArray[np.float32])
assert_type(mixed.addend_delta, NDArray[np.float16])
lists = bnbp.batch_norm_training_backprop([[1.0], [2.0]], None, None, [1.5], [0.25], [[1.0], [0.0]])
assert_type(lists.gamma_delta, NDArray[np.floating[Any]])

# What a mask leaves out is None.
a, b, c = bnbp.batch_norm_training_backprop(x, None, None, mean, variance, x, output_mask=(True, False, False))
assert_type(a, NDArray[np.float32])
assert_type(b, None)
assert_type(c, None)
a1, b1, c1 = bnbp.batch_norm_inference_backprop(x, None, None, mean, variance, x, output_mask=(False, True, False))
assert_type(a1, None)
assert_type(b1, NDArray[np.float32])
assert_type(c1, None)
a2, b2, c2 = bnbp.batch_norm_training_backprop_apply(
    x, None, None, mean, variance, x, sums, sums, 4, output_mask=(True, True, False))
assert_type(a2, NDArray[np.float32])
assert_type(b2, NDArray[np.float32])
assert_type(c2, None)
a3, b3, c3, d3 = bnbp.batch_norm_training_backprop(
    x, None, None, mean, variance, x, addend=True, output_mask=(True, False, False, True))
assert_type(b3, None)
assert_type(d3, NDArray[np.float32])
a4, b4, c4, d4 = bnbp.batch_norm_training_backprop_apply(
    x, None, None, mean, variance, x, sums, sums, 4, addend=True, output_mask=(False, True, True, False))
assert_type(a4, None)
assert_type(c4, NDArray[np.float32])
assert_type(d4, None)

def with_a_mask(mask: tuple[bool, bool, bool], addend: bool) -> None:
    some = bnbp.batch_norm_training_backprop(x, None, None, mean, variance, x, output_mask=mask)
    assert_type(some.input_delta, NDArray[np.float32] | None)
    four = bnbp.batch_norm_training_backprop(x, None, None, mean, variance, x, addend=True, output_mask=[*mask, False])
    assert_type(four.addend_delta, NDArray[np.float32] | None)
    either = bnbp.batch_norm_training_backprop(x, None, None, mean, variance, x, addend=addend)
    assert_type(len(either), int)

# Arrays of which nothing is known, and results that are named alone.
def with_anything(x: ArrayLike, m: ArrayLike) -> bnbp.BatchNormTrainingBackpropResult:
    result = bnbp.batch_norm_training_backprop(x, None, None, m, m, x)
    assert_type(result.beta_delta, NDArray[np.floating[Any]])
    assert_type(bnbp.batch_norm_training_backprop(x, None, None, m, m, x, addend=True).addend_delta,
                NDArray[np.floating[Any]])
    assert_type(bnbp.batch_norm_training(x).batch_mean, NDArray[np.floating[Any]])
    return result

assert_type(bnbp.show_config("dicts"), dict[str, Any])
assert_type(bnbp.get_include(), str)
"""

WRONG = {
    "bnbp.batch_norm_training()": "require at least one argument",
    "bnbp.batch_norm_training_backprop(x, None, None, v, v, x).addend_delta": 'no attribute "addend_delta"',
    "bnbp.batch_norm_training_backprop(x, None, None, v, v, x, output_mask=(False, True, True)).input_delta.shape":
        '"None" has no attribute "shape"',
    "bnbp.batch_norm_training_backprop(x, None, None, v, v, x, output_mask=mask).input_delta.shape":
        'Item "None" of',
    "bnbp.batch_norm_training_backprop(x, None, None, v, v, x, epsilon=None)": "No overload variant",
    'bnbp.batch_norm_training(x, activation="tanh")': "No overload variant",
    'bnbp.show_config("json")': "show_config",
}  # fmt: skip

START = """
import numpy as np
from numpy.typing import NDArray
import bnbp

def wrong(x: NDArray[np.float32], v: NDArray[np.float32], mask: list[bool]) -> None:
"""


def mypy(folder, *arguments, module="mypy"):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_a_strict_type_checker_infers_what_users_expect(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(START + "".join(f"    {line}\n" for line in WRONG))
    done = mypy(tmp_path, "--strict", "--cache-dir", str(tmp_path / "cache"), "right.py", "wrong.py")
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert not [line for line in errors if line.startswith("right.py")], done.stdout
    assert len(errors) == len(WRONG), done.stdout
    for error, says in zip(errors, WRONG.values(), strict=True):
        assert says in error


def test_what_the_checker_expects_is_what_comes(tmp_path):
    """The same lines, run: each type that was asserted is that of the value."""
    code = (
        RIGHT.replace("from typing import Any, assert_type", "from typing import Any, get_args")
        + """
assert b is c is a1 is c1 is c2 is b3 is a4 is d4 is None
"""
    )
    (tmp_path / "run.py").write_text(CHECK + code)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PYTHONPATH": str(PACKAGE.parent)}, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


CHECK = """
def assert_type(value, expected):
    if expected is None:
        assert value is None
    elif getattr(expected, "__origin__", None) is np.ndarray:
        (element,) = get_args(get_args(expected)[1])
        assert isinstance(value, np.ndarray), value
        assert issubclass(value.dtype.type, getattr(element, "__origin__", element)), (value, expected)
"""


def test_the_stub_has_the_functions_as_they_are(tmp_path):
    done = mypy(tmp_path, "bnbp.ops", module="mypy.stubtest")
    assert done.returncode == 0, done.stdout
