"""The command line, run as its users run it: as a process of its own."""

import errno
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import bnbp
from bnbp import reference

OUTPUTS = {
    "training": ("normalized", "batch_mean", "batch_variance"),
    "training_backprop": ("input_delta", "gamma_delta", "beta_delta"),
    "inference": ("normalized",),
    "inference_backprop": ("input_delta", "gamma_delta", "beta_delta"),
}
INPUTS = {
    "training": ("input", "gamma", "beta"),
    "training_backprop": ("input", "gamma", "beta", "mean", "variance", "normalized_delta"),
    "inference": ("input", "gamma", "beta", "mean", "variance"),
    "inference_backprop": ("input", "gamma", "beta", "mean", "variance", "normalized_delta"),
}


def bnbp_command(*arguments, cwd, program=("-m", "bnbp"), **options):
    # A fixed width: messages must not depend on the terminal that the tests run in.
    environment = {**os.environ, "COLUMNS": "80", **options.pop("env", {})}
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False, **options
    )


def make_arrays(op="training_backprop", dtype=np.float32, shape=(4, 3, 5), channel_axis=1, seed=0):
    rng = np.random.default_rng(seed)
    channels = shape[channel_axis]
    everything = {
        "input": rng.normal(1, 2, shape),
        "gamma": rng.normal(1, 0.5, channels),
        "beta": rng.normal(0, 1, channels),
        "mean": rng.normal(1, 0.1, channels),
        "variance": rng.uniform(1, 4, channels),
        "normalized_delta": rng.normal(0, 1, shape),
    }
    return {name: everything[name].astype(dtype) for name in INPUTS[op]}


@pytest.fixture
def folder(tmp_path):
    """A folder with a good file in it, from which the bad ones are made."""
    np.savez(tmp_path / "in.npz", **make_arrays())
    return tmp_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_refused(folder, *arguments, code=1, says=(), **options):
    """One line on standard error, none on the other, the exit code, and a folder as it was."""
    before = contents(folder)
    done = bnbp_command(*arguments, cwd=folder, **options)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.startswith("bnbp: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n")
    for text in says:
        assert text in done.stderr
    assert contents(folder) == before
    return done.stderr


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# What it does


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", OUTPUTS)
def test_run_agrees_with_the_reference(tmp_path, op, dtype):
    arrays = make_arrays(op, dtype)
    np.savez(tmp_path / "in.npz", **arrays)
    done = bnbp_command("run", "in.npz", "-o", "out.npz", "--op", op, "--epsilon", "0.25", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert names_in(tmp_path) == ["in.npz", "out.npz"]

    expected = getattr(reference, f"batch_norm_{op}")(**arrays, epsilon=0.25)
    expected = expected if isinstance(expected, tuple) else (expected,)
    with np.load(tmp_path / "out.npz") as results:
        assert tuple(results.files) == OUTPUTS[op]
        for name, value in zip(OUTPUTS[op], expected, strict=True):
            assert results[name].dtype == dtype
            tolerance = 64 * np.finfo(dtype).eps
            np.testing.assert_allclose(results[name], value, rtol=tolerance, atol=tolerance)
            assert np.ptp(value) > 0.1  # not degenerate


def make_fused(op, activation, addend, dtype=np.float32):
    """Arguments of an operator with an activation or an addend: arrays and options."""
    arrays, options = make_arrays(op, dtype), {"activation": activation}
    arrays["gamma"] *= 4
    added = np.random.default_rng(1).normal(0, 3, arrays["input"].shape).astype(dtype) if addend else None
    if op.endswith("backprop"):
        forward = [arrays[name] for name in INPUTS["inference"]]
        normalized = bnbp.batch_norm_inference(*forward, 0.25, activation=activation, addend=added)
        assert activation is None or 5 < np.count_nonzero(normalized == 0) < 55  # of 60: not degenerate
        assert (activation == "relu6") == (np.count_nonzero(normalized == 6) > 2)
        if activation and addend:
            arrays["normalized"] = normalized
        options["addend"] = addend
    elif addend:
        arrays["addend"] = added
    return arrays, options


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("activation", "addend"), [("relu", False), ("relu6", False), ("relu", True), ("relu6", True), (None, True)]
)
@pytest.mark.parametrize("op", OUTPUTS)
def test_run_with_an_activation_and_an_addend_agrees_with_the_reference(tmp_path, op, activation, addend, dtype):
    arrays, options = make_fused(op, activation, addend, dtype)
    np.savez(tmp_path / "in.npz", **arrays)
    is_backprop = op.endswith("backprop")
    command = ["--activation", activation] if activation else []
    command += ["--addend"] if addend and is_backprop else []
    done = bnbp_command("run", "in.npz", "-o", "out.npz", "--op", op, "--epsilon", "0.25", *command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")

    expected = getattr(reference, f"batch_norm_{op}")(**arrays, **options, epsilon=0.25)
    expected = expected if isinstance(expected, tuple) else (expected,)
    names = (*OUTPUTS[op], "addend_delta") if addend and is_backprop else OUTPUTS[op]
    with np.load(tmp_path / "out.npz") as results:
        assert tuple(results.files) == names
        for name, value in zip(names, expected, strict=True):
            assert results[name].dtype == dtype
            tolerance = 256 * np.finfo(dtype).eps
            np.testing.assert_allclose(results[name], value, rtol=tolerance, atol=tolerance)


def test_run_takes_the_forward_result_for_the_mask_with_an_activation_alone(tmp_path):
    arrays = make_arrays()
    np.savez(tmp_path / "in.npz", **arrays, normalized=np.zeros_like(arrays["input"]))
    for arguments, is_flat in (([], False), (["--activation", "relu"], True)):
        done = bnbp_command("run", "in.npz", "-o", "out.npz", "--force", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        with np.load(tmp_path / "out.npz") as results:
            assert np.any(results["input_delta"]) != is_flat


def test_run_needs_neither_gamma_nor_beta_and_takes_channels_last(tmp_path):
    arrays = make_arrays(shape=(4, 5, 3), channel_axis=-1)
    del arrays["gamma"], arrays["beta"]
    np.savez_compressed(tmp_path / "in.npz", **arrays)
    done = bnbp_command(
        "run", "in.npz", "--output", "out.npz", "--channel-axis", "-1", "--num-threads", "2", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = reference.batch_norm_training_backprop(**arrays, gamma=None, beta=None, channel_axis=-1)
    with np.load(tmp_path / "out.npz") as results:
        for name, value in expected._asdict().items():
            np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=1e-5)


def test_two_bytes_of_no_type_are_taken_for_bfloat16(tmp_path):
    arrays = make_arrays()
    arrays |= {name: arrays[name].astype(ml_dtypes.bfloat16) for name in ("input", "normalized_delta")}
    np.savez(tmp_path / "in.npz", **arrays)
    done = bnbp_command("run", "in.npz", "-o", "out.npz", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bfloat16" in done.stdout
    with np.load(tmp_path / "out.npz") as results:
        input_delta = results["input_delta"].view(ml_dtypes.bfloat16).astype(np.float64)
    expected = reference.batch_norm_training_backprop(**arrays).input_delta
    np.testing.assert_allclose(input_delta, expected, rtol=2**-7, atol=2**-7)


def test_run_says_what_it_saved_and_where(folder):
    output = folder / ("long-" * 30 + "[red] name.npz")
    done = bnbp_command("run", "in.npz", "-o", output, cwd=folder)
    lines = done.stdout.splitlines()
    assert f"saved in {output}" in lines  # neither wrapped nor taken for markup
    assert any(line.split() == ["input_delta", "(4,", "3,", "5)", "float32"] for line in lines)
    assert "\x1b" not in done.stdout


def test_run_gives_the_output_the_usual_permissions(folder):
    bnbp_command("run", "in.npz", "-o", "out.npz", cwd=folder, umask=0o027)
    assert (folder / "out.npz").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("name", "file"), [("g3", "g3.npz"), ("g3.1", "g3.1.npz"), ("g3.npz", "g3.npz")])
def test_the_name_of_an_output_may_leave_out_its_suffix(folder, name, file):
    done = bnbp_command("run", "in.npz", "-o", name, cwd=folder)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"saved in {file}")
    assert names_in(folder) == sorted([file, "in.npz"])
    assert_refused(folder, "run", "in.npz", "-o", name, says=[f"cannot write {file}: it exists"])


# The page


def test_what_the_page_shows_is_what_happens(tmp_path, monkeypatch):
    """From the first block of Python on: each block is run where it stands, and prints what follows it."""
    page = (Path(__file__).parent.parent / "docs" / "command_line.rst").read_text("utf-8")
    page = page[page.index(".. code-block:: python") : page.index("Completion in the shell")]
    monkeypatch.chdir(tmp_path)
    commands, names = [], {}
    for kind, block in re.findall(r"^\.\. code-block:: (\w+)\n\n((?:   .*\n|\n)+)", page, re.MULTILINE):
        text = textwrap.dedent(block).rstrip()
        if kind == "python":
            exec(text, names)
            continue
        command, *printed = text.splitlines()
        commands.append(command)
        done = bnbp_command(*shlex.split(command.removeprefix("$ bnbp ")), cwd=tmp_path)
        lines = [line.rstrip() for line in (done.stdout or done.stderr).splitlines()]
        assert [line for line in lines if line] == [line.rstrip() for line in printed if line]
    assert len(commands) == 3
    assert all(command.startswith("$ bnbp run layer") for command in commands)


# Runs that are chained


def save_batch(path, dtype=np.float32, **more):
    """An .npz file with the inputs of training, and a gradient of its output that is not there yet."""
    arrays = make_arrays(dtype=dtype)
    delta = arrays.pop("normalized_delta")
    np.savez_compressed(path, **{name: arrays[name] for name in INPUTS["training"]}, **more)
    return [arrays[name] for name in INPUTS["training"]], delta


def add(path, **arrays):
    with np.load(path) as old:
        np.savez(path, **old, **arrays)


def agrees(path, expected):
    with np.load(path) as results:
        for name, value in expected._asdict().items():
            np.testing.assert_array_equal(results[name], value)


@pytest.mark.parametrize("kind", ["relu", None])
def test_a_file_is_chained(tmp_path, kind):
    path, options = tmp_path / "f.npz", ["--activation", kind] if kind else []
    inputs, delta = save_batch(path)
    for arguments in (["--op", "training"], []):
        done = bnbp_command("run", "f.npz", "-o", "f.npz", *arguments, *options, cwd=tmp_path)
        assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", "saved in f.npz")
        if arguments:
            add(path, normalized_delta=delta)
    forward = bnbp.batch_norm_training(*inputs, activation=kind)
    backward = bnbp.batch_norm_training_backprop(*inputs, *forward[1:], delta, activation=kind)
    agrees(path, forward)
    agrees(path, backward)
    assert np.ptp(backward.input_delta) > 0.1
    with np.load(path) as archive:
        assert len(archive.files) == 10  # each once
        np.testing.assert_array_equal(archive["input"], inputs[0])
    assert names_in(tmp_path) == ["f.npz"]
    assert_refused(tmp_path, "run", "f.npz", "-o", "f.npz", *options, says=["f.npz: it has ", "_delta; --force"])
    assert bnbp_command("run", "f.npz", "-o", "f.npz", *options, "--force", cwd=tmp_path).returncode == 0
    agrees(path, backward)


def test_results_are_chained_through_a_file_of_their_own(tmp_path):
    inputs, delta = save_batch(tmp_path / "a.npz")
    assert bnbp_command("run", "a.npz", "-o", "b", "--op", "training", cwd=tmp_path).returncode == 0
    add(tmp_path / "b.npz", input=inputs[0], gamma=inputs[1], normalized_delta=delta)
    done = bnbp_command("run", "b.npz", "-o", "c", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    forward = bnbp.batch_norm_training(*inputs)
    agrees(tmp_path / "c.npz", bnbp.batch_norm_training_backprop(inputs[0], inputs[1], None, *forward[1:], delta))


@pytest.mark.parametrize("op", ["inference", "training_backprop"])
def test_a_mean_and_a_variance_win_over_those_of_the_batch(tmp_path, op):
    arrays = make_arrays(op)
    batch = {"batch_mean": arrays["mean"] + 5, "batch_variance": arrays["variance"] * 3}
    np.savez(tmp_path / "in.npz", **batch, **arrays)
    assert bnbp_command("run", "in.npz", "-o", "out", "--op", op, cwd=tmp_path).returncode == 0
    result = getattr(bnbp, f"batch_norm_{op}")(**arrays)
    with np.load(tmp_path / "out.npz") as results:
        np.testing.assert_array_equal(results[OUTPUTS[op][0]], result if op == "inference" else result.input_delta)


def test_what_is_added_to_a_file_leaves_the_rest_as_it_was(tmp_path):
    """Also what is compressed, of a type that NumPy has no name for, or no input of the operator."""
    half = ml_dtypes.bfloat16
    inputs, _ = save_batch(tmp_path / "f.npz", half, addend_delta=np.zeros(10_000))
    (tmp_path / "link.npz").symlink_to("f.npz")
    with zipfile.ZipFile(tmp_path / "f.npz") as archive:
        before = {info.filename: (info.compress_size, archive.read(info)) for info in archive.infolist()}
    assert bnbp_command("run", "f.npz", "-o", "link.npz", "--op", "training", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.npz").is_symlink()
    with zipfile.ZipFile(tmp_path / "f.npz") as archive:
        after = {info.filename: (info.compress_size, archive.read(info)) for info in archive.infolist()}
        assert archive.testzip() is None
    assert before.items() < after.items()
    with np.load(tmp_path / "f.npz") as archive:
        result = bnbp.batch_norm_training(*inputs)
        np.testing.assert_array_equal(archive["normalized"].view(half), result.normalized)


def test_an_array_that_is_left_alone_but_cannot_be_copied(folder):
    np.savez(folder / "in.npz", **make_arrays(), beta_delta=np.arange(1000.0))
    data = (folder / "in.npz").read_bytes()
    middle = data.rindex(b"NUMPY") + 200
    (folder / "in.npz").write_bytes(data[:middle] + b"x" + data[middle + 1 :])
    says = ["in.npz: cannot read beta_delta.npy: Bad CRC-32"]
    assert_refused(folder, "run", "in.npz", "-o", "in.npz", "--op", "inference", says=says)


def test_force_replaces_an_output_and_keeps_a_link_a_link(folder):
    (folder / "real.npz").write_text("something else")
    (folder / "out.npz").symlink_to("real.npz")
    done = bnbp_command("run", "in.npz", "-o", "out.npz", "--force", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "out.npz").is_symlink()
    with np.load(folder / "real.npz") as results:
        assert tuple(results.files) == OUTPUTS["training_backprop"]


def test_info_says_what_show_config_says(tmp_path):
    done = bnbp_command("info", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    config = bnbp.show_config("dicts")
    for key, value in config.items():
        assert key in done.stdout
        for name in value if isinstance(value, dict) else ():
            assert name in done.stdout
    assert config["version"] in done.stdout
    assert config["threads"]["source"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], [bnbp.__version__]),
        (["--help"], ["info", "run", "demo", "--install-completion"]),
        ([], ["Usage: bnbp", "info", "run", "demo"]),
        (["run", "--help"], ["--output", "--op", "--epsilon", "--channel-axis", "--num-threads", "--force"]),
        (["run", "--help"], ["--activation", "relu6", "--addend"]),
    ],
)
def test_help_and_version(tmp_path, arguments, says):
    done = bnbp_command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(text in done.stdout for text in says)
    assert "bool" not in done.stdout


def test_info_has_numbers_as_people_write_them(tmp_path):
    done = bnbp_command("info", cwd=tmp_path, env={"BNBP_POOL_MIB": "1536"})
    rows = dict(line.split(maxsplit=2)[1:] for line in done.stdout.splitlines() if len(line.split(maxsplit=2)) == 3)
    assert rows["limit"] == "1.5 GiB"
    assert re.fullmatch(r"[\d.]+ [KM]iB", rows["l2"])
    version = bnbp.show_config("dicts")["openmp"]["version"]
    assert version is None or re.fullmatch(r"\d\.\d", done.stdout.partition("openmp version")[2].split()[0])


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("bnbp r", {"run"}),
        ("bnbp run --op infer", {"inference", "inference_backprop"}),
        ("bnbp run --act", {"--activation"}),
        ("bnbp bench --dtype b", {"bfloat16"}),
    ],
)
def test_a_shell_completes_commands_options_and_values(tmp_path, words, offers):
    place = str(len(words.split()) - 1)
    env = {"_BNBP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
    done = bnbp_command(cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr, set(done.stdout.split())) == (0, "", offers)


def test_the_installed_command_is_the_same(tmp_path):
    command = shutil.which("bnbp", path=Path(sys.executable).parent)
    assert command is not None
    done = subprocess.run([command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"bnbp {bnbp.__version__}\n"


# What it refuses: the command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "FILE.npz|FOLDER"),
        (["run", "in.npz"], "--output"),
        (["run", "in.npz", "-o", "out.npz", "--op", "forward"], "'training_backprop'"),
        (["run", "in.npz", "-o", "out.npz", "--activation", "gelu"], "'relu', 'relu6'"),
        (["run", "in.npz", "-o", "out.npz", "--op", "training", "--addend"], "training adds the array addend if there"),
        (["run", "in.npz", "-o", "out.npz", "--colour"], "--colour"),
        (["run", ".", "-o", "out.npz"], "the results of a folder are saved in a folder"),
        (["bench", "--addend"], "it needs --activation"),
        (["demo", "--epochs", "0"], "--epochs"),
        (["demo", "--plot", "plot.txt"], ".png"),
    ],
)
def test_a_command_that_is_not_understood(folder, arguments, says):
    command = {"rum": "bnbp"}.get(arguments[0], f"bnbp {arguments[0]}")
    assert_refused(folder, *arguments, code=2, says=[says, f"; see {command} --help\n"])


@pytest.mark.parametrize("command", [["-m", "bnbp"], [shutil.which("bnbp", path=Path(sys.executable).parent)]])
def test_an_instruction_set_that_there_is_not(tmp_path, command):
    command = command if command[0] == "-m" else command[:1]
    env = {"BNBP_ISA": "x86-64-v9", "PYTHONPATH": str(Path(bnbp.__file__).parent.parent)}
    message = assert_refused(tmp_path, "info", program=command, env=env)
    assert message.startswith("bnbp: BNBP_ISA: expected one of ")
    program = ["-c", "import sys; sys.argv[0] = 'tool'; import bnbp"]  # elsewhere it is an error that can be caught
    done = bnbp_command("-m", "bnbp", program=program, cwd=tmp_path, env=env)
    assert done.stderr.splitlines()[-1].startswith("ImportError: BNBP_ISA: expected one of ")


def test_a_source_folder_without_the_core_is_one_line(tmp_path):
    package = Path(bnbp.__file__).parent
    for source in (package / "__init__.py", *package.glob("_*.py"), *package.glob("engine/*.py")):
        copy = tmp_path / "bnbp" / source.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    code = """import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # would find the core
sys.path.insert(0, "")
sys.argv[0] = "/bin/bnbp"
import bnbp"""
    message = assert_refused(
        tmp_path, "info", program=["-c", code], env={"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert message.startswith("bnbp: the compiled core is missing. ")
    assert "pip install -e ." in message


# What it refuses: the arrays


def without(*names):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


def changed(**arrays):
    return lambda others: {**others, **arrays}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("input"), ["in.npz: missing input", "normalized_delta"]),
        (without("mean", "variance"), ["missing mean, variance;"]),
        (
            changed(gama=np.ones(3)),
            ["unknown array 'gama' (did you mean gamma?)", "input, gamma, beta, mean, variance"],
        ),
        (lambda arrays: {"arr_0": arrays["input"]}, ["unknown array 'arr_0'"]),
        (changed(batch_means=np.ones(3)), ["unknown array 'batch_means'"]),
        (
            lambda arrays: {**without("mean")(arrays), "batch_mean": np.ones(3, np.float32)},
            ["in.npz: missing mean;"],  # with a variance of its own, the batch's mean would be of another run
        ),
        (changed(gamma=np.ones(4, np.float32)), ["gamma", "(3,)", "(4,)"]),
        (changed(input=np.ones((4, 3, 5), np.int64)), ["input", "int64"]),
        (changed(input=np.array([None, {}])), ["input holds Python objects"]),
    ],
)
def test_arrays_that_do_not_fit(folder, change, says):
    np.savez(folder / "in.npz", **change(make_arrays()))
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epsilon", "-1"], "epsilon"),
        (["--channel-axis", "3"], "channel_axis"),
        (["--activation", "relu", "--addend"], "in.npz: missing normalized; training_backprop with an activation and"),
    ],
)
def test_options_that_do_not_fit_the_arrays(folder, arguments, says):
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", *arguments, says=[says])


# What it refuses: the files


def test_an_input_that_is_not_there(folder):
    name = "not-there-" * 12 + "[bold].npz"
    assert_refused(folder, "run", name, "-o", "out.npz", says=[f"cannot read {name}: No such file"])


def test_a_name_with_control_characters_stays_on_one_line(folder):
    assert_refused(folder, "run", "a\nb\x1b[31m.npz", "-o", "out.npz", says=[r"a\nb\x1b[31m.npz"])


def truncated(data):
    return data[: len(data) // 2]


def damaged(data):
    middle = data.index(b"NUMPY") + 200  # inside the first array's elements: the checksum no longer fits
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def with_a_bad_header(data):
    return data.replace(b"'descr'", b"'desrc'")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"", "not an .npz file"),
        (lambda data: b"input,gamma\n1,2\n", "not an .npz file"),
        (truncated, "not an .npz file"),
        (damaged, "cannot read input: Bad CRC-32"),
        (with_a_bad_header, "cannot read input: "),
    ],
)
def test_an_input_that_is_not_a_sound_archive(folder, change, says):
    data = (folder / "in.npz").read_bytes()
    assert change(data) != data
    (folder / "in.npz").write_bytes(change(data))
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", says=["in.npz", says])


def test_an_input_that_is_a_single_array(folder):
    with (folder / "in.npz").open("wb") as stream:
        np.save(stream, np.ones(3))
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", says=[".npy"])


def test_an_archive_member_that_is_not_an_array(folder):
    with zipfile.ZipFile(folder / "in.npz", "w") as archive:
        for name in INPUTS["training"]:
            archive.writestr(name, "text")
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", "--op", "training", says=["input is not an array"])


def test_an_output_that_exists(folder):
    (folder / "out.npz").write_text("precious")
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", says=["out.npz", "it exists", "--force"])


def test_an_output_that_is_a_folder(folder):
    (folder / "out").mkdir()
    assert_refused(folder, "run", "in.npz", "-o", "out", "--force", says=["it is a folder"])
    assert names_in(folder / "out") == []


def test_an_output_in_a_folder_that_is_not_there(folder):
    assert_refused(folder, "run", "in.npz", "-o", "no/out.npz", says=["no/out.npz", "there is no folder no"])


def test_an_output_that_is_not_an_ordinary_file(folder):
    os.mkfifo(folder / "pipe.npz")
    assert_refused(folder, "run", "in.npz", "-o", "pipe", "--force", says=["it is not an ordinary file"])
    assert (folder / "pipe.npz").is_fifo()


def test_an_output_whose_name_is_too_long(folder):
    assert_refused(folder, "run", "in.npz", "-o", "x" * 300, says=["File name too long"])


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_disk_without_room(folder, room):
    """A limit of the file size stands in for a full disk: the write fails after so many bytes."""
    np.savez(folder / "in.npz", **make_arrays(shape=(4, 3, 5000)))  # larger than any buffer
    (folder / "out.npz").write_text("precious")
    assert_refused(
        folder,
        *("run", "in.npz", "-o", "out.npz", "--force"),
        says=["cannot write out.npz: File too large"],
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )


WHILE_WRITING = """
import errno, os, pathlib, signal, sys
import numpy as np
from bnbp.__main__ import main

def interfere(stream, **arrays):
    stream.write(b"half of it")
    stream.flush()
    assert len(list(pathlib.Path().iterdir())) == 2, "the temporary file is in the folder"
    {event}

np.savez = interfere
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", "cannot write out.npz: No space left on device"),
        ("os.kill(os.getpid(), signal.SIGINT)", "interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "interrupted"),
    ],
)
def test_nothing_is_left_of_a_write_that_fails(folder, event, says):
    program = ["-c", WHILE_WRITING.format(event=event)]
    assert_refused(folder, "run", "in.npz", "-o", "out.npz", program=program, says=[says])


def test_an_output_that_appears_meanwhile_is_not_overwritten(folder):
    program = ["-c", WHILE_WRITING.format(event="pathlib.Path('out.npz').write_text('precious')")]
    done = bnbp_command("run", "in.npz", "-o", "out.npz", program=program, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "bnbp: cannot write out.npz: File exists\n")
    assert names_in(folder) == ["in.npz", "out.npz"]
    assert (folder / "out.npz").read_text() == "precious"


def test_a_file_system_without_hard_links_will_do(folder):
    no_links = """def refuse(*names):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    os.link = refuse"""
    program = ["-c", WHILE_WRITING.format(event=no_links)]
    assert bnbp_command("run", "in.npz", "-o", "out.npz", program=program, cwd=folder).returncode == 0
    assert names_in(folder) == ["in.npz", "out.npz"]
    assert (folder / "out.npz").read_bytes() == b"half of it"  # all that was written
    program = ["-c", WHILE_WRITING.format(event=no_links + "; pathlib.Path('new.npz').write_text('precious')")]
    (folder / "out.npz").unlink()
    done = bnbp_command("run", "in.npz", "-o", "new.npz", program=program, cwd=folder)
    assert (done.returncode, done.stderr) == (1, "bnbp: cannot write new.npz: File exists\n")
    assert (folder / "new.npz").read_text() == "precious"
    assert names_in(folder) == ["in.npz", "new.npz"]


def test_an_interrupt_while_reading(folder):
    os.mkfifo(folder / "pipe")
    command = [sys.executable, "-m", "bnbp", "run", "pipe", "-o", "out.npz"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        writer = open_when_read(folder / "pipe", process)  # it waits for what we never write
        error = interrupt(process)
        os.close(writer)
    assert (process.returncode, error) == (1, "bnbp: interrupted\n")
    assert names_in(folder) == ["in.npz", "pipe"]


def interrupt(process):
    """Ctrl-C, and again where Python was just about to wait and has not noticed; what the process says."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[1]
    process.kill()
    pytest.fail("the process goes on")


def open_when_read(pipe, reader):
    """Open a named pipe for writing as soon as a process has opened it for reading."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads yet
                raise
            assert reader.poll() is None, "the process has ended without reading"
            time.sleep(0.01)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_behind_standard_output(folder):
    command = [sys.executable, "-m", "bnbp", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "bnbp: cannot write to standard output: No space left on device\n")


# What it refuses: an installation without the extras


def without_package(name):
    return ["-c", f"import sys; sys.modules[{name!r}] = None; from bnbp.__main__ import main; sys.exit(main())"]


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_packages_of_the_command_line(folder, package):
    message = assert_refused(folder, "info", program=without_package(package))
    assert message == "bnbp: the command line needs two more packages; run: pip install 'bnbp[cli]'\n"


def test_the_demo_without_its_packages(folder):
    message = assert_refused(folder, "demo", program=without_package("sklearn"))
    assert message == "bnbp: the demo needs scikit-learn and matplotlib; run: pip install 'bnbp[demo]'\n"


def test_bfloat16_without_its_package(folder):
    arrays = make_arrays()
    np.savez(folder / "in.npz", **{**arrays, "input": arrays["input"].astype(ml_dtypes.bfloat16)})
    program = without_package("ml_dtypes")
    message = assert_refused(folder, "run", "in.npz", "-o", "out.npz", program=program)
    assert message == "bnbp: in.npz: input holds bfloat16; run: pip install ml_dtypes\n"


def test_a_damaged_header_that_is_strange_python(folder):
    (folder / "in").mkdir()
    for name, array in make_arrays().items():
        np.save(folder / "in" / f"{name}.npy", array)
    path = folder / "in" / "mean.npy"
    path.write_bytes(path.read_bytes().replace(b"(3,)", b"3if "))
    assert_refused(folder, "run", "in", "-o", "out", says=("not an .npy file, or a damaged one",))
