"""bnbp.dask on a cluster of processes: the same bits, also if a worker dies; arrays larger than a worker's memory."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from conftest import make_telling, same_bits

import bnbp.dask

pytestmark = pytest.mark.cluster

distributed = pytest.importorskip("distributed")

EXAMPLE = Path(__file__).parents[1] / "examples" / "larger_than_memory.py"


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=":0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def operators(x, delta, batch, **options):
    forward = bnbp.dask.batch_norm_training(x, batch.gamma, batch.beta, **options)
    backward = bnbp.dask.batch_norm_training_backprop(
        x, batch.gamma, batch.beta, forward.batch_mean, forward.batch_variance, delta, **options
    )
    return *forward, *backward


def slowly(block, seconds=0.05):
    """What makes a chunk, in another process."""
    time.sleep(seconds)
    return block


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("persisted", [True, False])
def test_a_cluster_has_the_bits_of_one_process(client, reproducible, persisted):
    batch = make_telling((24, 6, 50), dtype=np.float32)
    chunks = ((5, 8, 11), (2, 4), (50,))
    x, delta = (da.from_array(each, chunks=chunks) for each in (batch.input, batch.normalized_delta))
    expected = dask.compute(*operators(x, delta, batch, reproducible=reproducible), scheduler="synchronous")
    if persisted:
        x, delta = client.persist([x, delta])
    results = client.gather(client.compute(operators(x, delta, batch, reproducible=reproducible)))
    assert same_bits(results, expected)


def test_what_a_cluster_has_in_memory_is_not_computed_again(client):
    x = da.random.default_rng(0).normal(size=(24, 3, 4), chunks=(4, 3, 4)).map_blocks(slowly, 0)
    persisted = client.persist(x)
    distributed.wait(persisted)
    result = bnbp.dask.batch_norm_training(persisted)
    assert not [key for key in result.normalized.dask.to_dict() if "slowly" in str(key) and key not in persisted.dask]
    np.testing.assert_allclose(result.batch_mean.compute(), x.mean(axis=(0, 2)).compute(), rtol=1e-12)


@pytest.mark.parametrize("step", ["bnbp-whole", "bnbp-normalized"])
def test_a_worker_killed_midway_changes_no_bit(client, step):
    batch = make_telling((48, 4, 30), dtype=np.float32)
    x, delta = (
        da.from_array(each, chunks=(2, 4, 30)).map_blocks(slowly, dtype=each.dtype, meta=each[:0])
        for each in (batch.input, batch.normalized_delta)
    )
    lazy = operators(x, delta, batch)
    expected = dask.compute(*lazy, scheduler="synchronous")
    before = client.run(os.getpid)
    futures = client.compute(lazy)

    def done(dask_scheduler):
        return sum(task.state == "memory" for key, task in dask_scheduler.tasks.items() if step in str(key))

    for _ in range(600):
        if client.run_on_scheduler(done) >= 4:
            break
        time.sleep(0.02)
    assert not all(future.done() for future in futures)  # midway
    killed = next(iter(before.values()))
    os.kill(killed, signal.SIGKILL)
    assert same_bits(client.gather(futures), expected)
    client.wait_for_workers(2)
    after = client.run(os.getpid).values()
    assert killed not in after
    assert len(after) == 2


def test_the_example_goes_through_arrays_larger_than_its_workers_memory(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLE),
        "--gigabytes",
        "0.27",
        "--memory-limit",
        "256MB",
        "--folder",
        str(tmp_path),
    ]
    environment = {**os.environ, "BNBP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    match = re.fullmatch(
        r"4 tensors of (\d+) MB in [\d.]+ s; workers of 256MB took up to (\d+) MB", result.stdout.strip()
    )
    assert match, result.stdout
    size, peak = map(int, match.groups())
    assert size > 256
    assert peak < 256
    assert not list(tmp_path.iterdir())
