"""``bnbp run`` on a folder of .npy files: the operators' results, in bounded memory, and nothing left of a failure."""

import math
import os
import resource
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import make_batch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import INPUTS, OUTPUTS, assert_refused, bnbp_command, names_in, without_package

import bnbp
from bnbp import cli, reference
from bnbp.cli import outofcore

# With slabs of 64 bytes: some of an index, single indices, several of them; many channels, some, and one.
LAYOUTS = [
    ((4, 3, 5, 6), 1),
    ((40, 3), 1),
    ((3, 50), 1),
    ((1, 1, 300), 1),
    ((6, 5, 4), -1),
    ((25, 7, 3), 0),
    ((1, 3, 1), 1),
    ((0, 3, 4), 1),
]

#: An activation, whether there is an addend, and whether the gradient is given the forward operator's result.
FUSED = [
    ("relu", False, False),
    ("relu6", False, True),
    ("relu", True, True),
    ("relu6", True, True),
    (None, True, False),
]


def save_folder(folder, op="training_backprop", shape=(4, 3, 5, 6), axis=1, dtype=np.float32, orders="CC"):
    """Save the inputs of an operator, the tensors in C or Fortran order; return them."""
    with np.errstate(all="ignore"):  # a batch without elements has no mean
        batch = make_batch(shape, axis, np.float64 if 0 in shape else dtype)._asdict()
    if 0 in shape:
        batch |= {"mean": np.zeros(shape[axis]), "variance": np.ones(shape[axis])}
    parameters = dtype if np.dtype(dtype) in (np.float32, np.float64) else np.float32
    arrays = {
        name: batch[name].astype(dtype if name in outofcore.TENSORS else parameters, order=order)
        for name, order in zip(INPUTS[op], orders[0] + "CCCC" + orders[1], strict=False)
    }
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays


def save_fused(folder, op, activation, addend, normalized, **how):
    """The same for an operator with an activation or an addend; return its arguments."""
    arrays = save_folder(folder, op, **how)
    shape, axis = arrays["input"].shape, how.get("axis", 1)
    arrays["gamma"] *= 4  # now some are beyond 6
    added = np.random.default_rng(9).normal(0, 3, shape).astype(arrays["input"].dtype) if addend else None
    arguments = {**arrays, "activation": activation}
    if op.endswith("backprop"):
        forward = [arrays[name] for name in INPUTS["inference"]]
        result = bnbp.batch_norm_inference(*forward, activation=activation, addend=added, channel_axis=axis)
        new = {"normalized": np.asarray(result, order=how.get("orders", "CC")[1])} if normalized else {}
        arguments["addend"] = addend
        if math.prod(shape) > 100 and activation:
            zero, six = np.mean(result == 0), np.mean(result == 6)
            assert 0.1 < zero < 0.9  # not degenerate
            assert (six > 0.01) == (activation == "relu6")
    else:
        new = {"addend": np.asarray(added, order=how.get("orders", "CC")[1])} if addend else {}
    for name, array in {**new, "gamma": arrays["gamma"]}.items():
        np.save(folder / f"{name}.npy", array)
    return arguments | new


def options_of(op, activation, addend):
    chosen = ["--activation", activation] if activation else []
    return ["--op", op, *chosen, *(["--addend"] if addend and op.endswith("backprop") else [])]


def outputs_of(op, addend):
    return (*OUTPUTS[op], *(["addend_delta"] if addend and op.endswith("backprop") else []))


def load(path, dtype=None):
    array = np.load(path)
    return array.view(dtype) if dtype else array


def run_here(*arguments):
    assert not cli.app(["run", *map(str, arguments)], prog_name="bnbp", standalone_mode=False)


@pytest.fixture
def folder(tmp_path):
    """A folder with the good folder ``in``, from which the bad ones are made."""
    save_folder(tmp_path / "in")
    return tmp_path


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setattr(outofcore, "SLAB", 64)


# What it does


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:Mean of empty", "ignore:Degrees of freedom")
@pytest.mark.parametrize("orders", ["CC", "FF", "CF", "FC"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("op", OUTPUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_folder_has_the_results_of_the_operator(tmp_path, small_slabs, op, shape, axis, orders, dtype):
    arrays = save_folder(tmp_path / "in", op, shape, axis, dtype, orders)
    run_here(tmp_path / "in", "-o", tmp_path / "out", "--op", op, "--epsilon", "0.25", "--channel-axis", axis)
    assert names_in(tmp_path / "out") == sorted(f"{name}.npy" for name in OUTPUTS[op])
    expected = getattr(bnbp, f"batch_norm_{op}")(**arrays, epsilon=0.25, channel_axis=axis)
    for name, value in zip(OUTPUTS[op], expected if isinstance(expected, tuple) else (expected,), strict=True):
        result = load(tmp_path / "out" / f"{name}.npy")
        assert (result.dtype, result.shape) == (value.dtype, value.shape)
        eps = np.finfo(dtype).eps
        # A sum may be smaller than its terms, and an error is then a larger part of it.
        scale = math.sqrt(max(value.size, math.prod(shape) / shape[axis])) if name != "normalized" else 1
        np.testing.assert_allclose(result, value, rtol=8 * eps, atol=8 * eps * scale)
        if value.ndim > 1:
            assert result.flags.fnc == np.asarray(arrays["input"]).flags.fnc


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:Mean of empty", "ignore:Degrees of freedom")
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("op", OUTPUTS)
@pytest.mark.parametrize(("activation", "addend", "normalized"), FUSED)
def test_a_folder_has_the_results_with_an_activation_and_an_addend(
    tmp_path, small_slabs, op, shape, axis, activation, addend, normalized
):
    how = {"shape": shape, "axis": axis, "orders": "CC" if activation == "relu" else "FC"}
    arguments = save_fused(tmp_path / "in", op, activation, addend, normalized, **how)
    run_here(tmp_path / "in", "-o", tmp_path / "out", *options_of(op, activation, addend), "--channel-axis", axis)
    names = outputs_of(op, addend)
    assert names_in(tmp_path / "out") == sorted(f"{name}.npy" for name in names)
    expected = getattr(bnbp, f"batch_norm_{op}")(**arguments, channel_axis=axis)
    for name, value in zip(names, expected if isinstance(expected, tuple) else (expected,), strict=True):
        result = load(tmp_path / "out" / f"{name}.npy")
        assert (result.dtype, result.shape) == (value.dtype, value.shape)
        eps = np.finfo(np.float32).eps
        scale = 4 * math.sqrt(max(value.size, math.prod(shape) / shape[axis])) if name != "normalized" else 4
        np.testing.assert_allclose(result, value, rtol=8 * eps, atol=8 * eps * scale)
        if value.ndim > 1:
            assert result.flags.fnc == np.asarray(arguments["input"]).flags.fnc
        if name == "addend_delta":
            assert result.tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("op", OUTPUTS)
@pytest.mark.parametrize(("activation", "addend", "normalized"), FUSED)
def test_sixteen_bits_with_an_activation_and_an_addend(
    tmp_path, small_slabs, op, dtype, activation, addend, normalized
):
    arguments = save_fused(tmp_path / "in", op, activation, addend, normalized, dtype=dtype)
    run_here(tmp_path / "in", "-o", tmp_path / "out", *options_of(op, activation, addend))
    expected = getattr(bnbp, f"batch_norm_{op}")(**arguments)
    for name, value in zip(
        outputs_of(op, addend), expected if isinstance(expected, tuple) else (expected,), strict=True
    ):
        kind = dtype if value.ndim > 1 else np.float32
        result, right = load(tmp_path / "out" / f"{name}.npy", kind).astype(np.float64), value.astype(np.float64)
        tolerance = 4 * float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(result, right, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("addend", [False, True])
def test_with_an_activation_the_statistics_are_used_as_they_are_returned(tmp_path, small_slabs, addend, dtype):
    """To the bit; where their rounding is much beside the deviations, which the other operator makes up for."""
    arguments = save_fused(tmp_path / "in", "training", "relu", addend, False, dtype=dtype)
    arguments["input"] = (arguments["input"].astype(np.float32) / 4 + np.float32(1e3 + 0.3)).astype(dtype)
    np.save(tmp_path / "in" / "input.npy", arguments["input"])
    results = {}
    for activation in ("relu", None):
        out = tmp_path / str(activation)
        run_here(tmp_path / "in", "-o", out, *options_of("training", activation, addend))
        x, gamma, beta, added = (arguments.get(name) for name in ("input", "gamma", "beta", "addend"))
        statistics = load(out / "batch_mean.npy"), load(out / "batch_variance.npy")
        same = bnbp.batch_norm_inference(x, gamma, beta, *statistics, activation=activation, addend=added)
        results[activation] = load(out / "normalized.npy", dtype).tobytes() == same.tobytes()
    assert results["relu"]
    assert not results[None] or dtype != np.float32  # or the data could not tell


@pytest.mark.parametrize("op", ["training_backprop", "inference_backprop"])
def test_the_mask_is_that_of_the_forward_result_without_the_gradient_of_the_addend_too(tmp_path, small_slabs, op):
    arguments = save_fused(tmp_path / "in", op, "relu", True, True)
    own = getattr(bnbp, f"batch_norm_{op}")(**{name: arguments[name] for name in INPUTS[op]}, activation="relu")
    given = getattr(bnbp, f"batch_norm_{op}")(**arguments)
    assert np.abs(own.input_delta - given.input_delta).max() > 0.1  # the addend makes a difference
    run_here(tmp_path / "in", "-o", tmp_path / "out", *options_of(op, "relu", False))
    for name in OUTPUTS[op]:
        np.testing.assert_allclose(load(tmp_path / "out" / f"{name}.npy"), getattr(given, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", ["training_backprop", "inference_backprop"])
def test_results_of_a_forward_run_may_lie_in_the_folder(tmp_path, op):
    """They are inputs of the gradient where it has an activation, and else they are left alone."""
    arguments = save_fused(tmp_path / "in", op, "relu", True, True)
    plain = getattr(bnbp, f"batch_norm_{op}")(**{name: arguments[name] for name in INPUTS[op]})
    masked = getattr(bnbp, f"batch_norm_{op}")(**arguments)
    assert np.abs(plain.input_delta - masked.input_delta).max() > 0.1  # or the two could be taken for each other
    for name in ("batch_mean", "batch_variance", "addend"):
        np.save(tmp_path / "in" / f"{name}.npy", np.ones(1))
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    run_here(tmp_path / "in", "-o", tmp_path / "in", "--op", op)
    np.testing.assert_allclose(load(tmp_path / "in" / "input_delta.npy"), plain.input_delta, atol=1e-6)
    run_here(tmp_path / "in", "-o", tmp_path / "in", *options_of(op, "relu", True), "--force")
    np.testing.assert_allclose(load(tmp_path / "in" / "input_delta.npy"), masked.input_delta, atol=1e-6)
    assert {path: path.read_bytes() for path in before} == before
    # A forward run takes none of them, and replaces what is its own result.
    for name in ("normalized_delta", *(["mean", "variance"] if op == "training_backprop" else [])):
        (tmp_path / "in" / f"{name}.npy").unlink()
    np.save(tmp_path / "in" / "addend.npy", arguments["normalized"])
    run_here(tmp_path / "in", "-o", tmp_path / "in", "--op", op.removesuffix("_backprop"), "--force")
    assert load(tmp_path / "in" / "normalized.npy").min() < 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("op", OUTPUTS)
def test_sixteen_bits_an_element(tmp_path, small_slabs, op, dtype):
    arrays = save_folder(tmp_path / "in", op, dtype=dtype)
    run_here(tmp_path / "in", "-o", tmp_path / "out", "--op", op)
    expected = getattr(reference, f"batch_norm_{op}")(**arrays)
    for name, value in zip(OUTPUTS[op], expected if isinstance(expected, tuple) else (expected,), strict=True):
        kind = dtype if value.ndim > 1 else np.float32
        result = load(tmp_path / "out" / f"{name}.npy", kind).astype(np.float64)
        tolerance = 4 * float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(result, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OUTPUTS)
def test_neither_gamma_nor_beta_is_needed_and_bits_do_not_depend_on_threads(tmp_path, op):
    save_folder(tmp_path / "in", op, (5, 8, 90, 90))
    (tmp_path / "in" / "gamma.npy").unlink()
    (tmp_path / "in" / "beta.npy").unlink()
    program = ["-c", "import sys; from bnbp import cli; cli.outofcore.SLAB = 500_000; sys.exit(cli.main())"]
    for threads in "12":
        arguments = ("run", "in", "--output", threads, "--op", op, "--num-threads", threads)
        done = bnbp_command(*arguments, program=program, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    for name in OUTPUTS[op]:
        assert (tmp_path / "1" / f"{name}.npy").read_bytes() == (tmp_path / "2" / f"{name}.npy").read_bytes()
        assert np.ptp(load(tmp_path / "1" / f"{name}.npy")) > 0.1  # not degenerate


def test_a_mean_of_a_million_costs_nothing(tmp_path, small_slabs):
    arrays = save_folder(tmp_path / "in", "training")
    arrays["input"] += np.float32(1e6 + 0.3)
    np.save(tmp_path / "in" / "input.npy", arrays["input"])
    run_here(tmp_path / "in", "-o", tmp_path / "out", "--op", "training")
    expected = bnbp.batch_norm_training(**arrays)
    assert np.ptp(expected.normalized) > 1  # not degenerate
    np.testing.assert_allclose(load(tmp_path / "out" / "normalized.npy"), expected.normalized, rtol=1e-6, atol=1e-6)


def test_results_may_lie_beside_the_inputs_and_are_replaced_if_wanted(folder):
    (folder / "in" / "notes.txt").write_text("mine")
    done = bnbp_command("run", "in", "-o", "in", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "saved in the folder in"
    assert any(line.split() == ["input_delta", "(4,", "3,", "5,", "6)", "float32"] for line in done.stdout.splitlines())
    saved = {name: load(folder / "in" / f"{name}.npy") for name in OUTPUTS["training_backprop"]}
    message = assert_refused(folder, "run", "in", "-o", "in")
    assert message == "bnbp: cannot write in/input_delta.npy: it exists; --force replaces it\n"

    (folder / "in" / "input_delta.npy").write_text("something else")
    os.symlink(folder / "in" / "input.npy", folder / "in" / "link.npy")
    os.replace(folder / "in" / "link.npy", folder / "in" / "beta_delta.npy")  # --force does not follow it
    before = (folder / "in" / "input.npy").read_bytes()
    assert bnbp_command("run", "in", "-o", "in", "--force", cwd=folder).returncode == 0
    assert (folder / "in" / "input.npy").read_bytes() == before
    for name, array in saved.items():
        np.testing.assert_array_equal(load(folder / "in" / f"{name}.npy"), array)


@pytest.mark.parametrize("kind", ["relu", None])
def test_a_folder_is_chained(tmp_path, small_slabs, kind):
    arrays = save_folder(tmp_path / "f")
    for name in ("mean", "variance", "normalized_delta"):
        (tmp_path / "f" / f"{name}.npy").unlink()
    options = ["--activation", kind] if kind else []
    run_here(tmp_path / "f", "-o", tmp_path / "f", "--op", "training", *options)
    np.save(tmp_path / "f" / "normalized_delta.npy", arrays["normalized_delta"])
    run_here(tmp_path / "f", "-o", tmp_path / "f", *options)
    run_here(tmp_path / "f", "-o", tmp_path / "f", "--op", "inference", *options, "--force")  # also of the batch's own
    x, gamma, beta = (arrays[name] for name in INPUTS["training"])
    forward = bnbp.batch_norm_training(x, gamma, beta, activation=kind)
    backward = bnbp.batch_norm_training_backprop(
        x, gamma, beta, *forward[1:], arrays["normalized_delta"], activation=kind
    )
    for name, value in {**forward._asdict(), **backward._asdict()}.items():
        np.testing.assert_allclose(load(tmp_path / "f" / f"{name}.npy"), value, rtol=1e-5, atol=1e-5)
    assert np.ptp(backward.gamma_delta) > 0.1  # not degenerate


def test_a_mean_and_a_variance_win_over_those_of_the_batch(folder):
    run_here(folder / "in", "-o", folder / "plain")
    np.save(folder / "in" / "batch_mean.npy", np.full(3, 7, np.float32))
    np.save(folder / "in" / "batch_variance.npy", np.full(3, 7, np.float32))
    run_here(folder / "in", "-o", folder / "out")
    results = [load(folder / where / "input_delta.npy") for where in ("plain", "out")]
    np.testing.assert_array_equal(*results)
    (folder / "in" / "mean.npy").unlink()
    assert_refused(folder, "run", "in", "-o", "new", says=["in: missing mean; "])


def test_progress_is_shown_on_a_terminal(folder):
    done = bnbp_command("run", "in", "-o", "out", cwd=folder, env={"FORCE_COLOR": "1"})
    assert "2/2" in done.stdout  # a slab, twice
    assert "2/2" not in bnbp_command("run", "in", "-o", "new", cwd=folder).stdout


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple), st.sampled_from([1, 2, 4, 8]), st.integers(8, 99)
)
def test_slabs_follow_each_other_through_the_file(shape, itemsize, limit):
    elements = np.arange(math.prod(shape)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outofcore, "SLAB", limit)
        parts = [elements[box].ravel() for box in outofcore.slabs(shape, itemsize)]
    np.testing.assert_array_equal(np.concatenate(parts), elements.ravel())
    assert all(part.size * itemsize <= limit for part in parts)
    assert len(parts) <= 4 * math.ceil(elements.size * itemsize / limit)  # and not in crumbs


# What it refuses


def saved(name, array):
    return lambda folder: np.save(folder / f"{name}.npy", array)


def edited(name, change):
    def edit(folder):
        data = (folder / f"{name}.npy").read_bytes()
        assert change(data) != data
        (folder / f"{name}.npy").write_bytes(change(data))

    return edit


def removed(name):
    return lambda folder: (folder / f"{name}.npy").unlink()


def a_pipe(folder):
    (folder / "gamma.npy").unlink()
    os.mkfifo(folder / "gamma.npy")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (removed("input"), "in: missing input; training_backprop takes input, gamma, beta, mean,"),
        (saved("gama", np.ones(3)), "in: unknown array 'gama' (did you mean gamma?); training_backprop takes input,"),
        (saved("normalised", np.ones(3)), "in: unknown array 'normalised' (did you mean normalized_delta?)"),
        (
            saved("mean", np.ones(4, np.float32)),
            "mean: expected shape (3,) for the 3 channels of input (4, 3, 5, 6), got (4,)",
        ),
        (saved("normalized_delta", np.ones((4, 3, 5, 5), np.float32)), "normalized_delta: expected shape (4, 3, 5, 6)"),
        (saved("input", np.ones((4, 3), np.int64)), "input: expected "),
        (saved("variance", np.ones(3)), "variance: expected float32"),
        (saved("gamma", np.array([None, {}])), "in/gamma.npy holds Python objects"),
        (saved("gamma", np.float32(1)), "gamma: expected shape (3,)"),
        (edited("input", lambda data: data[:-7]), "cannot read in/input.npy: it ends 7 bytes early"),
        (edited("mean", lambda data: b"1, 2, 3\n"), "cannot read in/mean.npy: not an .npy file"),
        (edited("mean", lambda data: b""), "cannot read in/mean.npy: not an .npy file"),
        (
            edited("mean", lambda data: data.replace(b"'descr'", b"'desrc'")),
            "cannot read in/mean.npy: not an .npy file",
        ),
        (edited("mean", lambda data: data.replace(b"(3,)", b"(-3,)")), "cannot read in/mean.npy: not an .npy file"),
        (edited("mean", lambda data: data.replace(b"\x01\x00", b"\x07\x00")), "cannot read in/mean.npy: not an .npy"),
        (edited("input", lambda data: data.replace(b"(4, ", b"(4000000000, ")), "cannot read in/input.npy: it ends"),
        (a_pipe, "cannot read in/gamma.npy: it is not an ordinary file"),
    ],
)
def test_a_folder_that_does_not_fit(folder, change, says):
    change(folder / "in")
    assert_refused(folder, "run", "in", "-o", "out", says=[f"bnbp: {says}"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "file"], "cannot write file: it is not a folder"),
        (["-o", "file", "--force"], "cannot write file: it is not a folder"),
        (["-o", "no/out"], "cannot write no/out: there is no folder no"),
        (["-o", "x" * 300], "File name too long"),
        (["-o", "full", "--force"], "cannot write full/gamma_delta.npy: it is a folder"),
        (["-o", "out", "--epsilon", "-1"], "epsilon: expected a finite number >= 0"),
        (["-o", "out", "--channel-axis", "4"], "channel_axis: expected -4 to 3"),
        (["-o", "out", "--num-threads", "0"], "num_threads: expected at least 1"),
    ],
)
def test_a_command_that_does_not_fit(folder, arguments, says):
    (folder / "file").write_text("precious")
    (folder / "full" / "gamma_delta.npy").mkdir(parents=True)
    assert_refused(folder, "run", "in", *arguments, says=[says])


GRADIENT = "input, gamma, beta, mean, variance, normalized_delta"


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (
            removed("normalized"),
            ["--activation", "relu", "--addend"],
            "in: missing normalized; training_backprop with an activation and an addend takes "
            f"{GRADIENT}, normalized (gamma and beta may be left out)\n",
        ),
        (
            removed("normalized"),
            ["--activation", "relu", "--op", "inference_backprop"],
            "in: missing normalized; inference_backprop with an activation and an addend takes ",
        ),
        (
            removed("mean"),
            ["--activation", "relu6"],
            "in: missing mean; training_backprop with an activation and an addend takes ",
        ),
        (removed("mean"), ["--addend"], f"in: missing mean; training_backprop takes {GRADIENT} (gamma and beta may"),
        (saved("normalized", np.ones((4, 3, 5, 5), np.float32)), ["--activation", "relu"], "normalized: expected "),
        (saved("normalized", np.ones((4, 3, 5, 6))), ["--activation", "relu", "--addend"], "normalized: expected "),
        (edited("normalized", lambda data: data[:-7]), ["--activation", "relu"], "cannot read in/normalized.npy: it"),
        (saved("addend_delta", np.ones(1)), ["--addend", "-o", "in"], "cannot write in/addend_delta.npy: it exists"),
    ],
)
def test_a_folder_that_does_not_fit_an_activation_or_an_addend(tmp_path, change, arguments, says):
    """There is an addend in the folder: without `normalized`, the mask would be that of a call without it."""
    save_fused(tmp_path / "in", "training_backprop", "relu", True, True)
    np.save(tmp_path / "in" / "addend.npy", np.ones((4, 3, 5, 6), np.float32))
    change(tmp_path / "in")
    assert_refused(tmp_path, "run", "in", "-o", "out", *arguments, says=[f"bnbp: {says}"])


def test_without_an_addend_the_forward_result_is_not_needed(tmp_path):
    save_fused(tmp_path / "in", "training_backprop", "relu", False, False)
    run_here(tmp_path / "in", "-o", tmp_path / "out", "--activation", "relu")
    (tmp_path / "in" / "mean.npy").unlink()
    says = f"takes {GRADIENT}, normalized (gamma, beta and normalized may be left out)\n"
    assert_refused(tmp_path, "run", "in", "-o", "new", "--activation", "relu", says=[says])


@pytest.mark.parametrize("op", ["training", "inference"])
@pytest.mark.parametrize("addend", [np.ones((4, 3, 5, 5), np.float32), np.ones((4, 3, 5, 6))])
def test_an_addend_that_does_not_fit(tmp_path, op, addend):
    save_folder(tmp_path / "in", op)
    np.save(tmp_path / "in" / "addend.npy", addend)
    assert_refused(tmp_path, "run", "in", "-o", "out", "--op", op, says=["bnbp: addend: expected "])


def test_bfloat16_without_its_package(tmp_path):
    save_folder(tmp_path / "in", dtype=ml_dtypes.bfloat16)
    message = assert_refused(tmp_path, "run", "in", "-o", "out", program=without_package("ml_dtypes"))
    assert message == "bnbp: in/input.npy holds bfloat16; run: pip install ml_dtypes\n"


# What it leaves of a run that fails: nothing


@pytest.mark.parametrize("room", [0, 1_000, 100_000])
def test_a_disk_without_room(tmp_path, room):
    """A limit of the file size stands in for a full disk: the write fails after so many bytes."""
    save_folder(tmp_path / "in", shape=(4, 3, 5000))  # larger than any buffer
    assert_refused(
        tmp_path,
        *("run", "in", "-o", "out"),
        says=["cannot write out: File too large"],
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )


WHILE_WRITING = """
import errno, os, pathlib, signal, sys
import bnbp
from bnbp.cli import outofcore
from bnbp.__main__ import main

outofcore.SLAB = 64
apply, calls = bnbp.batch_norm_training_backprop_apply, 0

def interfere(*arguments, **options):
    global calls
    calls += 1
    if calls == 5:
        assert len(list(pathlib.Path("out").glob("*.tmp"))) == 3, "the temporary files are in the folder"
        {event}
    return apply(*arguments, **options)

bnbp.batch_norm_training_backprop_apply = interfere
sys.exit(main())
"""


def while_writing(event):
    return ["-c", WHILE_WRITING.format(event=event)]


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    ("event", "says"),
    [
        ("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", "cannot write out: No space left on device"),
        ("raise MemoryError", "there is not enough memory"),
        ("os.kill(os.getpid(), signal.SIGINT)", "interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "interrupted"),
    ],
)
def test_nothing_is_left_of_a_run_that_fails(folder, event, says, force):
    program = while_writing(event)
    assert assert_refused(folder, "run", "in", "-o", "out", *force, program=program) == f"bnbp: {says}\n"
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("precious")
    assert assert_refused(folder, "run", "in", "-o", "out", *force, program=program) == f"bnbp: {says}\n"


@pytest.mark.parametrize("name", ["input", "normalized_delta", "variance", "normalized"])
@pytest.mark.parametrize("change", ["os.truncate({path!r}, 200)", "os.utime({path!r}, ns=(0, 0))"])
def test_an_input_that_changes_meanwhile(folder, name, change):
    program = while_writing(change.format(path=f"in/{name}.npy"))
    np.save(folder / "in" / "normalized.npy", np.ones((4, 3, 5, 6), np.float32))
    done = bnbp_command("run", "in", "-o", "out", "--activation", "relu", program=program, cwd=folder)
    assert (done.returncode, done.stderr) == (1, f"bnbp: cannot read in/{name}.npy: it has changed meanwhile\n")
    assert names_in(folder) == ["in"]


def test_a_result_that_appears_meanwhile_is_not_overwritten(folder):
    program = while_writing("pathlib.Path('out/gamma_delta.npy').write_text('precious')")
    done = bnbp_command("run", "in", "-o", "out", program=program, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "bnbp: cannot write out: File exists\n")
    assert names_in(folder / "out") == ["gamma_delta.npy"]
    assert (folder / "out" / "gamma_delta.npy").read_text() == "precious"


def test_only_temporary_files_are_left_of_a_run_that_is_killed(folder):
    done = bnbp_command("run", "in", "-o", "out", program=while_writing("os.kill(os.getpid(), 9)"), cwd=folder)
    assert done.returncode == -signal.SIGKILL
    assert [Path(name).suffix for name in names_in(folder / "out")] == [".tmp"] * 3
    assert bnbp_command("run", "in", "-o", "out", cwd=folder).returncode == 0


# How much memory it takes

WITH_LITTLE_MEMORY = """
import resource, sys
from bnbp import cli

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {room}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = cli.main()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


def save_sparse(path, shape):
    """A file of zeros that takes no room."""
    with path.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + 4 * math.prod(shape))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux has /proc")
@pytest.mark.parametrize("op", ["inference", "training_backprop"])
def test_memory_does_not_grow_with_the_files(tmp_path, op):
    save_folder(tmp_path / "in", op, (4, 2, 3))
    for name in set(INPUTS[op]) & set(outofcore.TENSORS):
        save_sparse(tmp_path / "in" / f"{name}.npy", (4, 2, 1 << 23))  # 256 MiB
    program = ["-c", WITH_LITTLE_MEMORY.format(room=192 << 20)]
    done = bnbp_command("run", "in", "-o", "out", "--op", op, "--num-threads", "1", program=program, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.splitlines()[-1]) < 160 << 10  # KiB: two windows and a result of 32 MiB, and some to spare


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux has /proc")
def test_memory_does_not_grow_with_an_addend_either(tmp_path):
    save_folder(tmp_path / "in", "training_backprop", (4, 2, 3))
    for name in ("input", "normalized_delta", "normalized"):
        save_sparse(tmp_path / "in" / f"{name}.npy", (4, 2, 1 << 23))
    program = ["-c", WITH_LITTLE_MEMORY.format(room=288 << 20)]
    arguments = ("--activation", "relu", "--addend", "--num-threads", "1")
    done = bnbp_command("run", "in", "-o", "out", *arguments, program=program, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.splitlines()[-1]) < 224 << 10  # three windows and two results, and some to spare
