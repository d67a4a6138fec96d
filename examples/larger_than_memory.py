"""Normalise a batch that is larger than the memory of the workers, and compute its gradient, from zarr to zarr.

Needs Dask, distributed and zarr: ``pip install 'bnbp[dask]' distributed zarr``. By default it makes 2 GB of data in a
temporary folder, of which a worker may have 1 GB in memory:

    python examples/larger_than_memory.py --gigabytes 8 --memory-limit 1GB
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import bnbp.dask


def make(folder, samples, shape):
    """A batch and a gradient as zarr arrays, of 4 samples a chunk."""
    for seed, name in enumerate(("input", "normalized_delta")):
        random = da.random.default_rng(seed).standard_normal((samples, *shape), chunks=(4, *shape), dtype=np.float32)
        (random + seed).to_zarr(folder / name)


def train(folder):
    """What a training step does with a batch norm: forward, and the gradient; return the small results."""
    x, delta = (da.from_zarr(folder / name) for name in ("input", "normalized_delta"))
    channels = x.shape[1]
    gamma, beta = np.linspace(1, 2, channels, dtype=np.float32), np.zeros(channels, np.float32)

    forward = bnbp.dask.batch_norm_training(x, gamma, beta, activation="relu")
    backward = bnbp.dask.batch_norm_training_backprop(
        x, gamma, beta, forward.batch_mean, forward.batch_variance, delta, activation="relu"
    )
    # The small results and the large ones are computed together, so that the sums are made once.
    stored = [
        forward.normalized.to_zarr(folder / "normalized", compute=False),
        backward.input_delta.to_zarr(folder / "input_delta", compute=False),
    ]
    small = forward.batch_mean, forward.batch_variance, backward.gamma_delta, backward.beta_delta
    return da.compute(*small, *stored)[: len(small)]


def check(folder, mean, beta_delta):
    """Compare one channel with NumPy: the whole of it fits in memory."""
    arrays = {name: da.from_zarr(folder / name) for name in ("input", "normalized_delta", "normalized", "input_delta")}
    # Copies, because a view of a channel keeps its whole chunk in memory.
    channels = (array[:, -1].map_blocks(np.copy).compute(scheduler="synchronous") for array in arrays.values())
    x, delta, y, dx = (channel.astype(float) for channel in channels)
    expected = 2 * (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    masked = np.where(y > 0, delta, 0)
    np.testing.assert_allclose(mean[-1], x.mean(), atol=1e-6)
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-4)
    np.testing.assert_allclose(beta_delta[-1], masked.sum(), rtol=1e-5)
    np.testing.assert_allclose([dx.sum(), (dx * x).sum()], 0, atol=1e-4 * abs(dx).sum())  # a gradient through both


def peak():
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main():
    """Make the data, train on it, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2, help="size of each tensor")
    parser.add_argument("--memory-limit", default="1GB", help="memory of each worker, which is killed beyond it")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="threads of each worker")
    parser.add_argument("--folder", type=Path, help="where to put a temporary folder with the data")
    options = parser.parse_args()

    shape = 16, 128, 128  # 1 MB a sample
    samples = max(round(options.gigabytes * 1e9 / (4 * np.prod(shape))), 1)
    cluster = LocalCluster(
        n_workers=options.workers,
        threads_per_worker=options.threads,
        memory_limit=options.memory_limit,
        dashboard_address=":0",
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, cluster, Client(cluster) as client:
        folder = Path(folder)
        make(folder, samples, shape)
        start = time.perf_counter()
        mean, _, _, beta_delta = train(folder)
        seconds = time.perf_counter() - start
        peaks = client.run(peak).values()
        check(folder, mean, beta_delta)
    print(
        f"4 tensors of {samples * np.prod(shape) * 4 / 1e6:.0f} MB in {seconds:.1f} s; "
        f"workers of {options.memory_limit} took up to {max(peaks):.0f} MB"
    )


if __name__ == "__main__":
    main()
