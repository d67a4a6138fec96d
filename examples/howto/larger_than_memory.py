"""Batch norm on files, a part at a time. ``python examples/howto/larger_than_memory.py FOLDER``."""

import sys
from pathlib import Path

import numpy as np

import bnbp

SHAPE, PART = (60, 16, 28, 28), 8  # shape of the file's tensors, and samples in memory at a time


def make(folder):
    """Write a batch and the incoming gradient, a part at a time."""
    rng = np.random.default_rng(0)
    for name, mean in (("input", 5), ("normalized_delta", 0)):
        tensor = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, SHAPE)
        for k in range(0, len(tensor), PART):
            tensor[k : k + PART] = rng.normal(mean, 2, tensor[k : k + PART].shape)


def parts_of(*tensors):
    """Matching parts of tensors in files, as views: a part is read when it is used."""
    for k in range(0, SHAPE[0], PART):
        yield tuple(tensor[k : k + PART] for tensor in tensors)


folder = Path(sys.argv[1])
make(folder)
x = np.load(folder / "input.npy", mmap_mode="r")
dy = np.load(folder / "normalized_delta.npy", mmap_mode="r")
y = np.lib.format.open_memmap(folder / "normalized.npy", "w+", np.float32, SHAPE)
dx = np.lib.format.open_memmap(folder / "input_delta.npy", "w+", np.float32, SHAPE)

# First pass: the statistics.
statistics = (bnbp.batch_norm_training_statistics(part) for (part,) in parts_of(x))
whole = bnbp.merge_statistics(statistics)
mean, variance = whole.mean.astype(np.float32), whole.variance.astype(np.float32)

# Second pass: the results, written straight into their file, and the sums for the gradient.
sums = np.zeros((2, SHAPE[1]))
for x_part, dy_part, y_part in parts_of(x, dy, y):
    bnbp.batch_norm_inference(x_part, None, None, mean, variance, out=y_part)
    sums += bnbp.batch_norm_training_backprop_reduce(x_part, mean, dy_part)

# Third pass: the gradient.
for x_part, dy_part, dx_part in parts_of(x, dy, dx):
    given = x_part, None, None, mean, variance, dy_part, *sums, whole.count
    _, dgamma, dbeta = bnbp.batch_norm_training_backprop_apply(*given, out=(dx_part, None, None))

np.save(folder / "mean.npy", mean)
np.save(folder / "variance.npy", variance)
print(f"{x.nbytes / 1e6:.1f} MB in parts of {PART * x[0].nbytes / 1e6:.1f} MB")

# This file is small enough to compare the whole of it with NumPy.
exact, delta = x.astype(np.float64), dy.astype(np.float64)
xhat = exact - exact.mean((0, 2, 3), keepdims=True)
inv_std = 1 / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
xhat *= inv_std
np.testing.assert_allclose(dgamma, (delta * xhat).sum((0, 2, 3)), rtol=1e-5)
delta -= delta.mean((0, 2, 3), keepdims=True) + xhat * (delta * xhat).mean((0, 2, 3), keepdims=True)
np.testing.assert_allclose(y, xhat, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(dx, delta * inv_std, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(dbeta, dy.sum((0, 2, 3), dtype=np.float64), rtol=1e-5)
print("agrees with NumPy on the whole file")
