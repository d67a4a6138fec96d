"""The peak memory of a step, in a process of its own: ``python -m bnbp.cli.training.memory SET NETWORK ...``.

The system knows the most memory that a process ever had. The process sets this mark back after two steps, takes a
third, and prints how far the mark is then above what it had before the step. So the number has all that a step needs
beyond what is there between steps: PyTorch's tensors, bnbp's, and what the libraries below ask for. It is exact because
the C library is told to return every block of 64 KiB or more at once; else what had been freed would count as used.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from .cases import SETS, Way

__all__ = ["available", "peak"]

_STATUS, _MARK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available() -> bool:
    """Whether the system can say it."""
    return _MARK.exists()


def peak(set_name: str, network: str, way: Way, threads: int) -> int:
    """Bytes that a step takes at most.

    Raises
    ------
    RuntimeError
        With the last line that the process wrote.
    """
    command = [sys.executable, "-m", __name__, set_name, network, way.candidate, way.format, str(threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return int(json.loads(done.stdout.splitlines()[-1]))


def _kibibytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _main(set_name: str, network: str, candidate: str, memory_format: str, threads: str) -> None:
    import torch

    from .steps import Training

    torch.set_num_threads(int(threads))
    training = Training(SETS[set_name][network], Way(candidate, memory_format))
    for _ in range(2):  # the first has the momentum made, and the network compiled
        training.step()
    gc.collect()
    _MARK.write_text("5")
    before = _kibibytes("VmRSS")
    training.step()
    print(json.dumps((_kibibytes("VmHWM") - before) * 1024))


if __name__ == "__main__":
    _main(*sys.argv[1:])
