"""`SyncBatchNorm` over processes: statistics and gradients of the whole batch, whatever each process has of it."""

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

WORKER = Path(__file__).with_name("sync_worker.py")

# PyTorch takes seconds to import: what needs as many processes shares them.
SCENARIOS = {
    1: ["gradients"],
    2: ["gradients", "collectives", "ddp", "other_addends", "too_small", "compiled"],
    3: ["gradients", "group", "ddp", "other_addends", "twice", "partly", "average"],
    4: ["gradients"],
}


def launch(folder, world, scenarios):
    """What each process answers to each scenario, or None if it was killed. None may take longer than two minutes."""
    store = folder / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(world), store, *scenarios],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    answers = []
    for process, (output, errors) in zip(processes, outputs, strict=True):
        assert process.returncode in (0, -9), errors
        answers.append(json.loads(output.splitlines()[-1]) if process.returncode == 0 else None)
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the processes of one launch answered to a scenario."""

    @functools.cache
    def launched(world):
        return launch(tmp_path_factory.mktemp("store"), world, SCENARIOS[world])

    def of(scenario, world):
        found = []
        for every in launched(world):
            assert scenario in every, f"not reached: {every}"
            assert "failed" not in every[scenario], every[scenario]["failed"]
            found.append(every[scenario])
        return found

    return of


@pytest.mark.parametrize("world", SCENARIOS)
def test_processes_compute_what_one_does_on_the_whole_batch(answers, world):
    """Forward, all gradients and the running statistics, of uneven and empty shards."""
    for answer in answers("gradients", world):
        assert answer["worst"]["float64"] < 1e-13
        assert answer["worst"]["float32"] < 2e-6
        assert answer["worst"]["bfloat16"] < 2e-2


def test_equal_runs_have_equal_bits(answers, tmp_path):
    again = launch(tmp_path, 3, ["gradients"])
    assert [each["gradients"]["digest"] for each in again] == [each["digest"] for each in answers("gradients", 3)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bits_do_not_depend_on_how_samples_are_spread(answers, world):
    """Nor on the number of processes: uneven and empty parts give the bits of one."""
    (one,) = answers("spread", 1)
    assert {answer["digest"] for answer in answers("spread", world)} == {one["digest"]}


def test_there_is_one_collective_each_way(answers):
    """Of C x 3 numbers forward and C x 2 backward, or of exact sums; and none in evaluation."""
    for answer in answers("collectives", 2):
        assert answer["plain"] == [[12, "torch.float64"], [8, "torch.float64"]]
        assert [kind for _, kind in answer["exact"]] == ["torch.uint8"] * 2


def test_a_group_of_processes_has_statistics_of_its_own(answers):
    """And a process that is not in it normalises by itself, as PyTorch's module does."""
    for answer in answers("group", 3):
        assert answer["distance"] < 1e-14
        assert answer["mean"] < 1e-14


@pytest.mark.parametrize("world", [2, 3])
def test_training_with_ddp_is_training_on_the_whole_batch(answers, world):
    """The parameters' gradients are reduced once: twice, they would be too large by the number of processes."""
    for answer in answers("ddp", world):
        assert answer["distance"] < 1e-10


@pytest.mark.parametrize("world", [2, 3])
def test_addends_of_another_shape_or_type_are_pytorchs(answers, world):
    for answer in answers("other_addends", world):
        assert answer["worst"] < 1


def test_a_second_derivative_is_refused(answers):
    for answer in answers("twice", 3):
        assert "once_differentiable" in answer["error"]


def test_gradients_that_are_not_needed_stop_no_process(answers):
    for answer in answers("partly", 3):
        assert answer["distance"] < 1e-13


def test_running_statistics_can_be_the_average_of_all_batches(answers):
    for answer in answers("average", 3):
        assert answer["distance"] < 1e-14


def test_where_a_process_dies_the_others_get_an_error(tmp_path):
    *others, dead = launch(tmp_path, 3, ["death"])
    assert dead is None
    for answer in others:
        assert answer["death"]["error"] in ("RuntimeError", "DistBackendError", "DistNetworkError")


def test_one_element_in_all_processes_is_an_error_in_each(answers):
    for answer in answers("too_small", 2):
        assert answer["error"] == "Expected more than 1 value per channel when training"


def test_it_runs_under_torch_compile(answers):
    for answer in answers("compiled", 2):
        assert answer["distance"] == 0


# ---------------------------------------------------------------- in one process


def test_without_other_processes_it_is_a_batch_norm():
    import torch

    import bnbp.torch

    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    ours, theirs = bnbp.torch.SyncBatchNorm(4, activation="relu").double(), torch.nn.BatchNorm2d(4).double()
    torch.testing.assert_close(ours(x), torch.relu(theirs(x)))
    torch.testing.assert_close(ours.eval()(x), torch.relu(theirs.eval()(x)))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_conversion_keeps_parameters_statistics_and_activations():
    import torch

    import bnbp.torch

    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.BatchNorm2d(3, eps=1e-3, momentum=None)),
        bnbp.torch.BatchNorm2d(3, activation="relu6"),
        torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False).eval(),
        torch.nn.Conv2d(3, 3, 1),
    )
    model[0](torch.randn(4, 3, 2, 2))
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    converted = bnbp.torch.SyncBatchNorm.convert_sync_batchnorm(model, process_group=None)
    assert converted is model
    assert [type(each) for each in (model[0][0], model[1], model[2])] == [bnbp.torch.SyncBatchNorm] * 3
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert (model[0][0].eps, model[0][0].momentum, model[1].activation) == (1e-3, None, "relu6")
    assert (model[0][0].training, model[2].training, model[2].affine) == (True, False, False)
    assert "activation='relu6'" in repr(model[1])


def test_the_state_is_that_of_pytorchs_module():
    import torch

    import bnbp.torch

    ours, theirs = bnbp.torch.SyncBatchNorm(3, activation="relu"), torch.nn.SyncBatchNorm(3)
    theirs.running_mean.uniform_()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_mean, theirs.running_mean)
    theirs.load_state_dict(ours.state_dict())


def test_what_is_wrong_is_said():
    import torch

    import bnbp.torch

    with pytest.raises(ValueError, match="activation: expected None"):
        bnbp.torch.SyncBatchNorm(3, activation="tanh")
    with pytest.raises(ValueError, match="at least 2D input"):
        bnbp.torch.SyncBatchNorm(3)(torch.ones(3))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        bnbp.torch.SyncBatchNorm(3)(torch.ones(2, 0, 3))
