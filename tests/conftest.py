"""What the tests share: data, and a new interpreter."""

import math
import os
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from typing import NamedTuple

# Many tests ask for more threads than there are CPUs, and one that spins while it waits keeps others from their work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # which OpenMP reads when it is loaded

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

import bnbp
from bnbp.engine import boundary

# What these import at their beginning. Without PyTorch, `-m torch` finds no test then, and fails; likewise the others.
NEEDS = {"test_torch_*.py": ["torch"], "test_jax_*.py": ["jax"], "test_mpi*.py": ["mpi4py"], "test_dask*.py": ["dask"]}
collect_ignore_glob = [files for files, modules in NEEDS.items() if not all(map(find_spec, modules))]

settings.register_profile("bnbp", deadline=None)  # no test asserts a time
settings.load_profile("bnbp")

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

# The types of tensors, and of parameters and statistics.
MIXED = [(dtype, dtype) for dtype in DTYPES] + [(dtype, np.float32) for dtype in DTYPES[:2]]

# What the kernels tell apart: runs shorter and longer than the lanes and than a chunk, chunks of many runs or rows and
# many chunks in a run, groups of channels, one channel, one element, and every place for the channel axis.
LAYOUTS = [
    ((4, 3, 2, 2), 1),
    ((6, 1), 1),
    ((1, 5), 1),
    ((2000, 3), 1),
    ((520, 66), 1),
    ((3, 2, 2500), 1),
    ((2, 1, 64, 129), 1),
    ((16, 5, 9, 9), 1),
    ((6, 5, 19), 1),
    ((40, 4, 3, 5, 7), 1),
    ((2, 9, 11, 70), -1),
    ((7, 300, 3), 0),
    ((3, 4, 5, 6), -2),
]


class Batch(NamedTuple):
    """The inputs of an operator, in its order."""

    input: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    normalized_delta: np.ndarray


def make_batch(shape, axis=1, dtype=np.float64, seed=0, offset=3.0, parameters=None) -> Batch:
    """A batch whose channels differ in mean and spread, with statistics that are its own."""
    parameters = parameters or dtype
    rng = np.random.default_rng(seed)
    channels = shape[axis]
    along = np.ones(len(shape), int)
    along[axis] = channels
    spread = rng.uniform(0.5, 4, channels).reshape(along)
    x = (rng.normal(size=shape) * spread + offset * rng.normal(size=channels).reshape(along)).astype(dtype)
    others = tuple(k for k in range(len(shape)) if k != axis % len(shape))
    exact = x.astype(np.float64)
    mean, variance = exact.mean(others), exact.var(others)
    gamma, beta = rng.uniform(-2, 2, (2, channels))
    dy = rng.normal(0.3, 1, shape).astype(dtype)
    return Batch(x, *(vector.astype(parameters) for vector in (gamma, beta, mean, variance)), dy)


def make_telling(shape, axis=1, dtype=np.float64, seed=0) -> Batch:
    """A batch whose sums tell in which order they were made, as far as the type has numbers for it.

    Numbers of very different sizes, each once with either sign, in `input` as in `normalized_delta`: the exact sums are
    next to nothing. What comes out is what was rounded off, and that is another number for another order.
    """
    rng = np.random.default_rng(seed)
    channels, count = shape[axis], math.prod(shape) // shape[axis]
    scale = {np.float16: 12, np.float64: 60}.get(dtype, 30)
    order = rng.permutation(count)

    def numbers(size):
        exponents = rng.integers(-scale, scale, (channels, size))
        return np.ldexp(rng.choice([-1, 1], exponents.shape) * rng.uniform(1, 2, exponents.shape), exponents)

    def tensor(*parts):
        rest = [shape[k] for k in range(len(shape)) if k != axis % len(shape)]
        values = np.concatenate([*parts, numbers(count % 4) * 2.0**-scale], 1)[:, order]
        return np.ascontiguousarray(np.moveaxis(values.reshape(channels, *rest), 0, axis).astype(dtype))

    x, delta = numbers(count // 4), numbers(count // 4)
    gamma, beta, mean, variance = (numbers(1)[:, 0].astype(dtype) for _ in range(4))
    return Batch(tensor(x, x, -x, -x), gamma, beta, mean, abs(variance), tensor(delta, -delta, delta, -delta))


def sums_of(batch, axis=1, **options):
    """All that bnbp gives in float64: mean, squared deviations and the two sums of the gradient."""
    x, mean, delta = batch.input, batch.mean, batch.normalized_delta
    return (
        *bnbp.batch_norm_training_statistics(x, channel_axis=axis, **options)[1:],
        *bnbp.batch_norm_training_backprop_reduce(x, mean, delta, channel_axis=axis, **options),
    )


def eps(dtype) -> float:
    """The distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps)


def tiny(dtype) -> float:
    """The smallest number above 0."""
    return float(ml_dtypes.finfo(dtype).smallest_subnormal)


def unit_of(value) -> Fraction:
    """From a number to the next larger one of its type: a unit in its last place."""
    return Fraction(float(np.spacing(abs(value)))) if value else Fraction(tiny(value.dtype))


def sum_bound(value, magnitude, dtype, ulps=None) -> Fraction:
    """The contract: what a sum over tensors of `dtype` may be off by, as it is returned; `magnitude` is the terms'.

    It is right to the last place, or 4 of float64, as long as the terms are less than 2^20 times as large as the sum.
    Sums of the gradient over 16-bit tensors, for which no `ulps` are given, are off by 2^-20 of the terms at most.
    """
    if np.dtype(dtype).itemsize == 2 and ulps is None:
        return unit_of(value) + magnitude / 2**20
    ulps = ulps or (4 if dtype == np.float64 else 1)
    return ulps * max(unit_of(value), Fraction(eps(value.dtype)) / 2**21 * magnitude)


def sum_error(dtype) -> float:
    """What sums over tensors of `dtype` may be off by before they are rounded, relative to the terms' magnitude.

    What the reference is off by is in it.
    """
    return 2.0**-20 if np.dtype(dtype).itemsize == 2 else 64 * np.finfo(np.float64).eps


def same_bits(first, second) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def dtype(request):
    return request.param


@pytest.fixture(params=MIXED, ids=lambda types: "-".join(np.dtype(dtype).name for dtype in types))
def types(request):
    return request.param


@pytest.fixture
def l2_size():
    """Sets the size of the cache that the kernels believe in, until the test is over."""
    old = boundary.set_l2_size(1 << 20)
    yield boundary.set_l2_size
    boundary.set_l2_size(old)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{'x'.join(map(str, layout[0]))}@{layout[1]}")
def layout(request):
    return request.param


def python(code, **environment):
    """What a new interpreter prints."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
