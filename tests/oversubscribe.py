"""Measures calls from many Python threads at once, each with a team of all CPUs. See docs/reliability.rst."""

import os
import threading
import time

import numpy as np

import bnbp

CALLS = 160
X = np.random.default_rng(0).normal(size=(8, 64, 56, 56)).astype(np.float32)
TEAM = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def work(calls):
    out = (np.empty_like(X), None, None)
    for _ in range(calls):
        bnbp.batch_norm_training(X, None, None, out=out, num_threads=TEAM)


work(5)
for count in (1, 2, 4, 8, 16):
    threads = [threading.Thread(target=work, args=(CALLS // count,)) for _ in range(count)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{count:2} Python threads: {(time.perf_counter() - begin) / CALLS * 1e3:.2f} ms a call")
