"""The example for MPI gives the same results on any number of ranks."""

from pathlib import Path

import pytest
from mpirun import mpirun

pytestmark = pytest.mark.cluster

EXAMPLE = Path(__file__).parent.parent / "examples" / "mpi_batch_norm.py"


def test_the_example_prints_one_line_on_any_number_of_ranks(tmp_path):
    """A parameter gradient that is added up once more, or parts in another order, would change the digest."""
    lines = set()
    for ranks in (1, 2, 5):
        done = mpirun(ranks, EXAMPLE, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines.add(done.stdout)
    assert len(lines) == 1
    assert lines.pop().startswith("dgamma[0] = ")
