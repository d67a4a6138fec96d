"""A batch that several processes share. ``python examples/howto/several_processes.py``."""

from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import bnbp

EPSILON = 1e-5
GAMMA, BETA = np.linspace(0.5, 1.5, 8, dtype=np.float32), np.zeros(8, np.float32)


def load(folder, part):
    """The samples of one process: of `x`, and of the incoming gradient."""
    return (np.load(Path(folder, name), mmap_mode="r")[part] for name in ("x.npy", "dy.npy"))


def statistics_of(folder, part):
    """First round: the statistics of a part, a few numbers for each channel."""
    x, _ = load(folder, part)
    return bnbp.exact.batch_norm_training_statistics(x, num_threads=1)


def normalize(folder, part, mean, variance):
    """Second round: normalise with the statistics of the whole batch, and sum for the gradient."""
    x, dy = load(folder, part)
    y = bnbp.batch_norm_inference(x, GAMMA, BETA, mean, variance, EPSILON, num_threads=1)
    return y, bnbp.exact.batch_norm_training_backprop_reduce(x, mean, dy, num_threads=1)


def gradient(folder, part, mean, variance, sums, count):
    """Third round: the gradient of a part, from the sums of the whole batch."""
    x, dy = load(folder, part)
    return bnbp.batch_norm_training_backprop_apply(
        x, GAMMA, BETA, mean, variance, dy, *sums, count, EPSILON, num_threads=1
    )


def run(folder, samples, processes):
    """Compute all results on some processes."""
    borders = [samples * k // processes for k in range(processes + 1)]
    parts = [slice(*pair) for pair in pairwise(borders)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:

        def each(function, *arguments):
            """Call a function for each part, in the processes."""
            futures = [pool.submit(function, folder, part, *arguments) for part in parts]
            return [future.result() for future in futures]

        first, *others = each(statistics_of)
        whole = first.merge(*others).round()
        mean, variance = whole.mean.astype(np.float32), whole.variance.astype(np.float32)
        normalized, sums = zip(*each(normalize, mean, variance), strict=True)
        total = sums[0].merge(*sums[1:]).round()
        gradients = each(gradient, mean, variance, total, whole.count)
    dx = np.concatenate([each.input_delta for each in gradients])
    return np.concatenate(normalized), dx, gradients[0].gamma_delta, gradients[0].beta_delta


def main():
    """Compare one process, three and NumPy."""
    x, dy = np.random.default_rng(0).normal(5, 2, (2, 13, 8, 14, 14)).astype(np.float32)
    with TemporaryDirectory() as folder:
        np.save(Path(folder, "x.npy"), x)
        np.save(Path(folder, "dy.npy"), dy)
        results = [run(folder, len(x), processes) for processes in (1, 3)]
    same = all(one.tobytes() == three.tobytes() for one, three in zip(*results, strict=True))
    print("same bits on 1 and 3 processes:", same)

    # The whole batch at once, in NumPy.
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    xhat = (x - mean) / np.sqrt(variance + EPSILON)
    scale = GAMMA[:, None, None] / np.sqrt(variance + EPSILON)
    dgamma, dbeta = (dy * xhat).sum((0, 2, 3)), dy.sum((0, 2, 3))
    means = (dy * xhat).mean((0, 2, 3), keepdims=True), dy.mean((0, 2, 3), keepdims=True)
    expected = GAMMA[:, None, None] * xhat, scale * (dy - means[1] - xhat * means[0]), dgamma, dbeta
    for ours, theirs in zip(results[0], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    print("agrees with NumPy on the whole batch")


if __name__ == "__main__":  # not in the processes, which import this file
    main()
