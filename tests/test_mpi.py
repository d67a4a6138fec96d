"""`bnbp.mpi`: the results of the whole batch, whatever each process has of it; and one error everywhere."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python
from mpirun import mpirun

pytestmark = pytest.mark.cluster

WORKER = Path(__file__).with_name("mpi_worker.py")
SIZES = (1, 2, 3, 5)

# What needs as many processes shares them.
EVERYWHERE = ["operators", "in_place", "nothing", "far", "special", "communicators"]
SCENARIOS = {size: EVERYWHERE + (["disagreements", "failures"] if size > 1 else []) for size in SIZES}


def launch(folder, size, scenarios):
    """What each process answers to each scenario."""
    done = mpirun(size, WORKER, folder, *scenarios, cwd=folder, timeout=300)
    files = sorted(folder.glob("*.json"))
    answers = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(files))]
    failed = [each["failed"] for answer in answers for each in answer.values() if "failed" in each]
    assert not failed, failed[0]
    assert done.returncode == 0, done.stderr
    assert len(answers) == size
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the processes of one launch answered to a scenario."""

    @functools.cache
    def launched(size):
        return launch(tmp_path_factory.mktemp("mpi"), size, SCENARIOS[size])

    return lambda scenario, size: [every[scenario] for every in launched(size)]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_compute_what_the_reference_does_on_the_whole_batch(answers, size):
    """All operators, types, layouts, activations and addends, on uneven and empty parts; within the contract."""
    for answer in answers("operators", size):
        assert set(answer["worst"]) == {
            *("mean", "variance", "normalized", "input_delta", "gamma_delta", "beta_delta", "addend_delta")
        }
        assert all(value <= 1 for value in answer["worst"].values()), answer["worst"]


@pytest.mark.parametrize("size", SIZES)
def test_statistics_and_parameter_gradients_have_the_same_bits_on_all_ranks(answers, size):
    assert len({answer["common"] for answer in answers("operators", size)}) == 1


@pytest.mark.parametrize("size", SIZES[1:])
def test_reproducible_results_have_the_bits_of_one_rank(answers, size):
    (one,) = answers("operators", 1)
    for answer in answers("operators", size):
        assert answer["reproducible"] == one["reproducible"]
        assert answer["plain"] != one["plain"]  # or the data could not tell


def test_equal_runs_have_equal_bits(answers, tmp_path):
    """With a merge in the order of arrival, some of many sums would differ."""
    again = launch(tmp_path, 5, ["operators"])
    assert [each["operators"] for each in again] == answers("operators", 5)


@pytest.mark.parametrize("size", SIZES)
def test_out_and_output_mask_are_each_ranks_own(answers, size):
    for answer in answers("in_place", size):
        assert len(answer["same"]) > 20
        assert all(answer["same"])


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_that_is_empty_everywhere(answers, size):
    for answer in answers("nothing", size):
        assert answer == {"shapes": [[0, 4, 3]] * 2, "nan": [True] * 2, "zero": [True] * 2}


@pytest.mark.parametrize("size", SIZES)
def test_a_mean_of_a_million_costs_nothing(answers, size):
    """The mean in float32 is off by up to 0.03, and the deviations are about 1."""
    assert all(answer["error"] < 1e-5 for answer in answers("far", size))


@pytest.mark.parametrize("size", SIZES)
def test_nan_and_infinities_do_not_leave_their_channels(answers, size):
    assert all(answer["same"] == [True] * 6 for answer in answers("special", size))


# Errors

LAST = {2: ("rank 0", "rank 1"), 3: ("ranks 0, 1", "rank 2"), 5: ("ranks 0-3", "rank 4")}
DISAGREEMENTS = {
    "operator": "operator: {} called batch_norm_training_backprop, {} called batch_norm_training",
    "epsilon": "epsilon: {} passed 1e-05, {} passed 0.001",
    "channels": "input: {} passed 4 channels, {} passed 3 channels",
    "type": "input: {0} passed float32, {1} passed float64; "
    "gamma, beta and statistics: {0} passed float32, {1} passed float64",
    "parameter type": "gamma, beta and statistics: {} passed float32, {} passed float16",
    "activation": 'activation: {} passed None, {} passed "relu"',
    "addend": "addend: {} passed none, {} passed one",
    "reproducible": "reproducible: {} passed True, {} passed False",
    "gamma": "gamma: {} passed certain values, {} passed other values",
    "beta": "beta: {} passed an array, {} passed None",
    "mean": "mean: {} passed certain values, {} passed other values",
    "variance": "variance: {} passed certain values, {} passed other values",
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
@pytest.mark.parametrize("size", SIZES[1:])
def test_ranks_that_disagree_all_raise_the_same_error(answers, size, kind):
    """And the communicator works afterwards: a good call follows each of them."""
    expected = ["ValueError", DISAGREEMENTS[kind].format(*LAST[size])]
    assert [answer[kind] for answer in answers("disagreements", size)] == [expected] * size


FAILURES = {
    "shape": ("ValueError", "gamma: expected shape (4,) for the 4 channels of input ", None),
    "type": ("TypeError", "input: expected float16, bfloat16, float32 or float64, got int64", None),
    "out": ("ValueError", "out[2] (batch_variance): expected shape (4,)", None),
    "out of the gradient": ("ValueError", "out[2] (beta_delta): expected shape (4,)", None),
    "array": ("TypeError", "input: expected an array, got Broken: 'no data'", None),
    "memory": ("MemoryError", "", "MemoryError"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("size", SIZES[1:])
def test_an_error_of_one_rank_is_raised_on_all(answers, size, kind):
    *others, last = (answer[kind] for answer in answers("failures", size))
    name, message, elsewhere = FAILURES[kind]
    assert last[0] == name
    assert last[1].startswith(message)
    assert others == [[name, f"rank {size - 1}: {elsewhere or last[1]}"]] * (size - 1)


@pytest.mark.parametrize("size", SIZES[1:])
def test_an_error_of_all_ranks_is_each_ones_own_and_nothing_is_written(answers, size):
    for answer in answers("failures", size):
        assert answer["all"] == ["ValueError", "epsilon: expected a finite number >= 0, got -1"]
        assert answer["untouched"]


@pytest.mark.parametrize("size", SIZES)
def test_communicators(answers, size):
    """Each half of the ranks with a whole batch, rank 0 alone, and what is refused."""
    for rank, answer in enumerate(answers("communicators", size)):
        assert answer["half"] < 1e-14
        if rank == 0:
            assert max(answer["self"], answer["inference"]) < 1e-13
        wrong = [
            ["TypeError", "comm: expected an mpi4py.MPI.Intracomm or None, got int"],
            ["ValueError", "comm: expected a communicator that this process belongs to, got MPI.COMM_NULL"],
            ["TypeError", "comm: expected an intra-communicator, got an inter-communicator; its Merge() makes one"],
        ]
        assert answer["wrong"] == wrong[: 3 if size > 1 else 2]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("sys.modules['mpi4py'] = None", "bnbp.mpi needs mpi4py; run: pip install 'bnbp[mpi]'"),
        ("os.environ['MPI4PY_LIBMPI'] = '/nowhere.so'", "bnbp.mpi needs an MPI library, and mpi4py finds none"),
    ],
)
def test_without_mpi(block, says):
    code = f"import os, sys; {block}\ntry:\n    import bnbp.mpi\nexcept ImportError as error:\n    print(error)"
    assert python(code).startswith(says)


def test_the_package_does_not_import_mpi():
    assert python("import sys, bnbp, bnbp.exact; print('mpi4py' in sys.modules)") == "False"


def test_a_rank_that_dies_ends_the_others(tmp_path):
    """Which MPI sees to."""
    program = "import os, bnbp.mpi, numpy as np; from mpi4py import MPI\n" + (
        "if MPI.COMM_WORLD.Get_rank() == 1: os.kill(os.getpid(), 9)\nbnbp.mpi.batch_norm_training(np.ones((2, 3)))"
    )
    assert mpirun(3, "-c", program, cwd=tmp_path, timeout=60).returncode != 0


def test_the_examples(tmp_path):
    code = "import doctest, bnbp.mpi._operators as m; print(doctest.testmod(m).failed)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"
