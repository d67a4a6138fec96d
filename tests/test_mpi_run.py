"""`bnbp run` under ``mpirun``: the files of one process, to the byte, and one message of what goes wrong."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import DTYPES
from mpirun import ENVIRONMENT, launcher, mpirun
from test_cli import OUTPUTS, names_in
from test_outofcore import FUSED, LAYOUTS, options_of, save_folder, save_fused

from bnbp.cli import outofcore

pytestmark = pytest.mark.cluster

#: The command with slabs of 64 bytes, and something that happens on one of the processes.
PROGRAM = """
import os, signal, sys
import bnbp
from bnbp import cli
from bnbp.cli import outofcore

outofcore.SLAB = 64
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or 0)
apply, calls = bnbp.batch_norm_training_backprop_apply, 0

def interfere(*arguments, **options):
    global calls
    calls += 1
    if calls == 3:
        {event}
    return apply(*arguments, **options)

bnbp.batch_norm_training_backprop_apply = interfere
sys.exit(cli.main())
"""


def run(number, *arguments, cwd, event="pass", **options):
    return mpirun(number, "-c", PROGRAM.format(event=event), "run", *arguments, cwd=cwd, **options)


def run_alone(folder, out, *arguments):
    """One process; in this one, so that many cases take little time."""
    from bnbp import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outofcore, "SLAB", 64)
        assert not cli.app(["run", str(folder), "-o", str(out), *arguments], prog_name="bnbp", standalone_mode=False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def messages(done):
    """The lines that are bnbp's own: mpirun has something to say of an exit code."""
    return [line for line in done.stderr.splitlines() if line.startswith("bnbp:")]


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:Mean of empty", "ignore:Degrees of freedom")
@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("op", OUTPUTS)
def test_the_files_are_those_of_one_process(tmp_path, op, number):
    """All layouts and orders, with fewer slabs than processes among them; types and activations."""
    batches = []
    for k, (shape, axis) in enumerate(LAYOUTS):
        dtype = DTYPES[k % 4]
        activation, addend, normalized = FUSED[k % 5]
        folder = tmp_path / str(k)
        folder.mkdir()
        how = {"shape": shape, "axis": axis, "dtype": np.float64 if 0 in shape else dtype}
        save_fused(folder / "in", op, activation, addend, normalized, orders=("CC", "FF", "CF")[k % 3], **how)
        batches.append([*options_of(op, activation, addend), "--channel-axis", str(axis)])
        run_alone(folder / "in", folder / "one", *batches[-1])
    # One launch for all of them: starting processes takes longer than what they do.
    program = PROGRAM.format(event="pass").replace("sys.exit(cli.main())", "") + (
        f"for k, arguments in enumerate({batches!r}):\n"
        "    sys.argv[1:] = ['run', f'{k}/in', '-o', f'{k}/all', *arguments]\n"
        "    assert cli.main() == 0, k\n"
    )
    done = mpirun(number, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == len(batches)  # by one process
    for k in range(len(batches)):
        assert sorted(contents(tmp_path / str(k) / "all")) == sorted(contents(tmp_path / str(k) / "one"))
        for name, data in contents(tmp_path / str(k) / "one").items():
            assert contents(tmp_path / str(k) / "all")[name] == data, (k, name)


@pytest.mark.parametrize("groups", [1, 3, 1000])
@pytest.mark.parametrize("op", ["training", "training_backprop"])
def test_groups_of_slabs_belong_to_one_process(tmp_path, op, groups):
    """Fewer groups than processes, groups of several slabs with a shorter one at the end, and single slabs."""
    save_folder(tmp_path / "in", op, (23, 3, 5, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outofcore, "GROUPS", groups)
        run_alone(tmp_path / "in", tmp_path / "one", "--op", op)
    program = PROGRAM.format(event="pass").replace("SLAB = 64", f"SLAB, outofcore.GROUPS = 64, {groups}")
    done = mpirun(2, "-c", program, "run", "in", "-o", "all", "--op", op, cwd=tmp_path)
    assert (done.returncode, messages(done)) == (0, [])
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


def test_mpirun_is_noticed_and_can_be_left_out_of_account(tmp_path):
    save_folder(tmp_path / "in")
    done = run(2, "in", "-o", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("saved in"), messages(done)) == (0, 1, [])
    program = PROGRAM.format(event="pass").replace("cli.main", "sys.argv.append(str(rank)) or cli.main")
    done = mpirun(2, "-c", program, "run", "in", "--comm", "none", "-o", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("saved in"), messages(done)) == (0, 2, [])
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "out")
    done = mpirun(1, "-m", "bnbp", "run", "in", "--comm", "mpi", "-o", "one", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("saved in"), messages(done)) == (0, 1, [])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["in", "-o", "out", "--epsilon", "-1"], 1, "epsilon: expected a finite number >= 0"),
        (["in", "-o", "no/out"], 1, "cannot write no/out: there is no folder no"),
        (["in", "-o", "file"], 1, "cannot write file: it is not a folder"),
        (["none", "-o", "out"], 2, "FILE: 3 processes share the work on a folder of .npy files, not on a single file"),
        (["in", "-o", "out", "--op", "trainin"], 2, "'trainin' is not one of"),
    ],
)
def test_a_mistake_is_told_once(tmp_path, arguments, code, says):
    save_folder(tmp_path / "in")
    (tmp_path / "file").write_text("precious")
    done = run(3, *arguments, cwd=tmp_path)
    assert done.returncode == code, done
    (message,) = messages(done)
    assert says in message
    assert "saved in" not in done.stdout
    assert names_in(tmp_path) == ["file", "in"]


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize(
    ("event", "says"),
    [
        ("raise OSError(28, os.strerror(28))", "cannot write out: No space left on device"),
        ("raise MemoryError", "there is not enough memory"),
        ("os.utime('in/input.npy', ns=(0, 0))", "cannot read in/input.npy: it has changed meanwhile"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "interrupted"),
    ],
)
def test_nothing_is_left_of_a_run_that_fails_on_one_process(tmp_path, event, says, where):
    save_folder(tmp_path / "in")
    done = run(3, "in", "-o", "out", cwd=tmp_path, event=f"if rank == {where}: {event}")
    assert done.returncode == 1
    (message,) = messages(done)
    anywhere = "utime" in event  # the others may be the first to see it
    assert message.endswith(f": {says}") if anywhere else message == f"bnbp: {f'process {where}: ' * (where > 0)}{says}"
    assert names_in(tmp_path) == ["in"]


def test_processes_that_see_different_things(tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        save_folder(tmp_path / name / "in")
    np.save(tmp_path / "1" / "in" / "variance.npy", np.ones(3, np.float32))
    for event, says in (
        ("os.chdir(str(rank))", "process 1 sees a different variance from process 0"),
        ("rank and sys.argv.extend(['--epsilon', '0.5'])", "process 1 was given a different epsilon from process 0"),
    ):
        program = PROGRAM.format(event="pass").replace("sys.exit", f"{event}\nsys.exit")
        folder = "in" if "chdir" in event else "0/in"
        done = mpirun(2, "-c", program, "run", folder, "-o", str(tmp_path / "out"), cwd=tmp_path)
        assert (done.returncode, messages(done)) == (1, [f"bnbp: {says}"])
        assert names_in(tmp_path) == ["0", "1"]


def test_ctrl_c_ends_all_of_them(tmp_path):
    save_folder(tmp_path / "in")
    command, environment = launcher()
    event = "open(f'at-{rank}', 'w').close(); rank == 1 and __import__('time').sleep(60)"  # the others wait for it
    with subprocess.Popen(
        [*command, "-n", "3", sys.executable, "-c", PROGRAM.format(event=event), "run", "in", "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as processes:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "at-1").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
            processes.send_signal(signal.SIGINT)
            processes.communicate(timeout=50)
        finally:
            processes.kill()
    assert processes.returncode != 0
    assert not list(tmp_path.glob("out/*.npy"))
