"""Whole training steps: the networks, what is measured of them, and the example. No test looks at a time."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import python

import bnbp.torch
from bnbp.cli import train_bench
from bnbp.cli.benchmark.measure import Seconds
from bnbp.cli.training import cases, measure, memory, networks, report, steps
from bnbp.cli.training.cases import CHANNELS_LAST, CONTIGUOUS, SETS, Case, Result, Row, Settings, Way

pytestmark = pytest.mark.torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.py"
MLP = Settings(set="tiny", networks=("mlp",), rounds=1, steps=0, memory=False)


def command(*arguments, cwd, timeout=60):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout, done.stderr


def results_of(settings=MLP):
    return {result.candidate: result for result in measure.Benchmark(settings).measure("mlp", 1).results}


@pytest.fixture
def no_code_generator(monkeypatch):
    """The compiler traces, and what it has traced runs as it is: to generate code takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


# The networks


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mobilenet_v1", 4_231_976),
        ("mobilenet_v2", 3_504_872),
        ("resnet50", 25_557_032),
        ("densenet121", 7_978_856),
        ("efficientnet", 5_288_548),
    ],
)
def test_the_networks_have_the_published_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        network = getattr(networks, name)()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST])
@pytest.mark.parametrize("case", SETS["tiny"].values(), ids=SETS["tiny"])
def test_a_converted_network_has_the_losses_of_the_network(case, memory_format):
    own, right = (measure.losses(case, Way(name, memory_format), 1, 5) for name in ("converted", "eager"))
    assert own == pytest.approx(right, rel=1e-4)
    assert right[-1] != pytest.approx(right[0], rel=1e-3)  # it has learnt something


def test_the_weights_and_the_batch_are_the_same_however_they_are_computed(no_code_generator):
    ways = [Way(name, layout) for name in cases.CANDIDATES for layout in cases.FORMATS]
    first, *others = (steps.Training(SETS["tiny"]["gan"], way) for way in ways)
    for other in others:
        for pair in zip(first.modules, other.modules, strict=True):
            ours, theirs = (module.state_dict() for module in pair)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(map(torch.equal, first.data, other.data))


def test_the_converted_candidate_is_converted_and_the_others_are_not(no_code_generator):
    for name in cases.CANDIDATES:
        [network] = steps.Training(SETS["tiny"]["resnet50"], Way(name)).modules
        norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert {isinstance(norm, bnbp.torch.BatchNorm2d) for norm in norms} == {"converted" in name}


def test_the_tensors_of_channels_last_are_channels_last():
    training = steps.Training(SETS["tiny"]["resnet50"], Way("eager", CHANNELS_LAST))
    weight = training.modules[0].conv1.weight
    for tensor in (training.data[0], weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


# The measurement


def test_a_wrong_gradient_is_refused_before_the_clock_starts(monkeypatch):
    timed = []

    def convert(model):
        model[3].weight.register_hook(lambda gradient: 1.01 * gradient)
        return model

    def take_turns(candidates, rounds, rest):
        timed.extend(candidate.name for candidate in candidates)
        return [[1.0] * rounds for _ in candidates]

    monkeypatch.setattr(bnbp.torch, "convert", convert)
    monkeypatch.setattr(measure, "take_turns", take_turns)
    results = results_of(Settings(set="tiny", candidates=("converted", "eager"), rounds=1, steps=0, memory=False))
    assert timed == ["eager"]
    assert results["converted"].seconds is None
    assert results["converted"].note.startswith("wrong gradients: off by 0.01")
    assert results["eager"].note is None


def test_a_gradient_that_is_missing_is_wrong():
    right = ([torch.tensor(1.0)], [{"0.weight": torch.ones(2), "0.bias": torch.ones(2)}])
    for gradients in ({"0.weight": torch.ones(2)}, {"0.weight": torch.ones(2), "0.bias": torch.ones(1)}):
        with pytest.raises(measure.WrongAnswer, match=r"there is none of 0\.bias"):
            measure.deviation((right[0], [gradients]), right)


def test_the_deviation_is_that_of_the_worst_layer():
    right = (
        [torch.tensor(2.0)],
        [{"a.weight": torch.tensor([3.0, 4.0]), "a.bias": torch.zeros(1), "b.weight": torch.ones(1)}],
    )
    off = [{"a.weight": torch.tensor([3.0, 4.0]), "a.bias": torch.tensor([0.5]), "b.weight": torch.tensor([1.01])}]
    assert measure.deviation((right[0], off), right) == pytest.approx(0.5 / 5)
    assert measure.deviation(([torch.tensor(3.0)], right[1]), right) == pytest.approx(0.5)
    assert math.isnan(measure.deviation(([torch.tensor(math.nan)], right[1]), right))


def test_the_gradients_of_a_compiled_network_are_compared(no_code_generator):
    for result in results_of(Settings(**{**vars(MLP), "candidates": cases.CANDIDATES})).values():
        assert (result.note, result.seconds is None) == (None, False)
        assert 0 < result.deviation < 1e-4


def test_a_candidate_that_fails_is_told_and_the_others_are_measured(monkeypatch):
    def fail(model):
        raise RuntimeError("there is no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    results = results_of()
    assert (results["compile"].note, results["compile"].seconds) == ("it fails: there is no compiler", None)
    assert results["eager"].seconds
    assert results["converted"].seconds


def test_the_threads_are_those_asked_for_and_afterwards_those_before(monkeypatch):
    seen, step = set(), steps.Training.step

    def watched(self):
        seen.add(torch.get_num_threads())
        return step(self)

    monkeypatch.setattr(steps.Training, "step", watched)
    before = torch.get_num_threads()
    row = measure.Benchmark(Settings(**{**vars(MLP), "candidates": ("eager",), "steps": 1})).measure("mlp", 3)
    assert seen == {3, 1}
    assert row.losses.keys() == {"eager", "eager, other threads"}
    assert torch.get_num_threads() == before


def test_the_memory_of_a_step_is_at_least_that_of_the_activations_kept_for_the_gradient():
    """Of each convolution the result, what is left by the ReLU, and by the pooling: 4 bytes, of 64 images."""
    assert memory.available() == (sys.platform == "linux")
    sizes = [channels * (2 * side**2 + (side // 2) ** 2) for channels, side in ((32, 32), (64, 16), (128, 8))]
    kept = 4 * 64 * sum(sizes)
    if memory.available():
        assert kept < memory.peak("full", "small_convnet", Way("eager"), 1) < 3 * kept


# What is made of it


def row_with(*results):
    return Row("mlp", (2, 3), 1, 2, [Result(*result) for result in results])


def test_the_speedup_is_that_of_the_fastest_of_each():
    row = row_with(
        ("eager", CONTIGUOUS, Seconds(6, 7)),
        ("eager", CHANNELS_LAST, Seconds(4, 6)),
        ("compile", CONTIGUOUS, Seconds(5, 5)),
        ("converted", CONTIGUOUS, Seconds(2, 4)),
        ("converted", CHANNELS_LAST, Seconds(3, 3)),
        ("converted+compile", CONTIGUOUS, Seconds(1, 1)),
        ("compile", CHANNELS_LAST, None),
    )
    assert report.speedup(row) == (2, 1.5)
    assert report.milliseconds(row.best("eager")) == "4000 *"
    assert report.milliseconds(row.best("converted")) == "2000"
    assert report.speedup(row_with(("eager", CONTIGUOUS, Seconds(1, 1)))) is None


def test_the_memory_ratio_is_of_the_same_format_and_the_larger_one():
    row = row_with(
        ("eager", CONTIGUOUS, None, 100),
        ("eager", CHANNELS_LAST, None, 200),
        ("converted", CONTIGUOUS, None, 110),
        ("converted", CHANNELS_LAST, None, 210),
        ("compile", CONTIGUOUS, None, 50),
    )
    assert report.memory_ratio(row) == pytest.approx(1.1)
    assert report.memory_ratio(row_with(("converted", CONTIGUOUS, None, 1))) is None


def test_the_losses_are_compared_step_by_step():
    row = row_with()
    row.losses = {"eager": [2.0, 1.0], "converted": [2.0, 1.1]}
    assert report.losses_apart(row, "converted") == pytest.approx(0.1)
    assert report.losses_apart(row, "eager, other threads") is None


def test_the_sets_and_the_options_have_the_same_networks():
    names = [str(name) for name in train_bench.Network]
    assert [list(chosen) for chosen in SETS.values()] == [names, names]
    assert list(cases.TITLES) == names
    assert all(isinstance(case, Case) and hasattr(networks, name) for name, case in SETS["full"].items())


# The command


def test_the_command_saves_what_it_has_measured(tmp_path):
    options = "--set tiny --network mlp --candidate eager --candidate converted --threads 1 --rounds 2 --steps 3"
    arguments = ("-m", "bnbp", "train-bench", *options.split(), "--json", "x.json", "--plot", "x.svg")
    code, output, error = command(*arguments, cwd=tmp_path)
    assert (code, error) == (0, "")
    assert "PyTorch / converted" in output
    assert "MLP   32x16" in output
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["settings"]["candidates"] == ["eager", "converted"]
    assert content["environment"]["versions"]["torch"] == torch.__version__
    [row] = report.load(content)
    assert (row.network, row.shape, row.threads, row.parameters) == ("mlp", (32, 16), 1, 2 * (17 * 16 + 32) + 170)
    assert [str(result.way) for result in row.results] == ["eager, contiguous", "converted, contiguous"]
    for result in row.results:
        assert 0 < result.seconds.minimum <= result.seconds.median
        assert 0 < result.deviation < 1e-4
        assert (result.memory is not None) == memory.available()
        assert result.note is None
    assert {len(losses) for losses in row.losses.values()} == {3}
    assert row.losses.keys() == {"eager", "eager, other threads", "converted"}
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_the_command_fails_if_the_converted_network_is_wrong(tmp_path):
    program = """
import sys
import bnbp.torch
from bnbp.__main__ import main
def convert(model):
    model[0].weight.register_hook(lambda gradient: -gradient)
    return model
bnbp.torch.convert = convert
sys.exit(main())
"""
    options = "train-bench --set tiny --network mlp --candidate converted --threads 1 --rounds 1 --steps 0 --no-memory"
    code, output, error = command("-c", program, *options.split(), cwd=tmp_path)
    assert code == 1
    assert "MLP, converted, contiguous: wrong gradients: off by 2" in output
    assert error.startswith("bnbp: bnbp itself is wrong in 1 places; first MLP, converted, contiguous: wrong gradients")


def test_without_pytorch_the_command_says_what_it_needs_and_the_others_work(tmp_path):
    program = "import sys; sys.modules['torch'] = None; from bnbp.__main__ import main; sys.exit(main())"
    message = "bnbp: train-bench needs PyTorch; run: pip install 'bnbp[train]'\n"
    assert command("-c", program, "train-bench", cwd=tmp_path) == (1, "", message)
    assert command("-c", program, "--version", cwd=tmp_path)[0] == 0


def test_the_command_line_does_not_import_pytorch():
    assert python("import sys, bnbp.cli; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("--network alexnet", 2, "'resnet50'"),
        ("--candidate jit", 2, "'converted+compile'"),
        ("--threads 0", 2, "numbers of threads such as 1,2"),
        ("--json same.png --plot same.png", 2, "it is the file of --json"),
        ("--json there.json", 1, "it exists; --force replaces it"),
    ],
)
def test_a_command_that_is_not_understood(tmp_path, arguments, code, says):
    (tmp_path / "there.json").write_text("precious")
    got, output, error = command("-m", "bnbp", "train-bench", *arguments.split(), cwd=tmp_path)
    assert (got, output) == (code, "")
    assert error.startswith("bnbp: ")
    assert error.count("\n") == 1
    assert says in error
    assert os.listdir(tmp_path) == ["there.json"]


# The example


def test_the_example_reads_the_digits(tmp_path):
    code, output, error = command("-W", "error", EXAMPLE, "--epochs", 2, cwd=tmp_path)
    assert (code, error) == (0, "")
    assert float(output.rpartition("accuracy on the test images: ")[2]) > 0.95
