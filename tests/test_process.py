"""The package in its process: forks, other libraries, subinterpreters, and an import without a compiled core."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python

import bnbp

PACKAGE = Path(bnbp.__file__).parent


# ---------------------------------------------------------------- forks, and others in the process

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@needs_fork
def test_a_forked_child_runs_serially_with_the_same_bits():
    code = """
import os, sys, numpy as np, bnbp
x = np.random.default_rng(0).normal(size=(8, 16, 40, 40)).astype(np.float32)
def run(): return bnbp.batch_norm_training(x, None, None, num_threads=2)
assert bnbp.show_config("dicts")["threads"]["source"] != "serial: a forked process"
before = run()
child = os.fork()
if child == 0:
    ok = all(a.tobytes() == b.tobytes() for a, b in zip(before, run()))
    ok = ok and bnbp.show_config("dicts")["threads"] == {
        "default": 1, "source": "serial: a forked process"}
    os._exit(0 if ok else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == "0"


FORK = """
import os, threading, numpy as np, bnbp
x = np.random.default_rng(0).normal(size=(8, 16, 40, 40)).astype(np.float32)
def run(): return b"".join(array.tobytes() for array in bnbp.batch_norm_training(x, None, None, num_threads=2))
def exit_code(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@needs_fork
def test_a_team_that_another_library_started_does_not_hang_a_forked_child():
    """The kernels cannot know of it: any library may use the same OpenMP. Here it is the floor of the benchmark."""
    code = """
from bnbp.cli.benchmark import candidates
assert candidates.load_floor().read1(np.ones(1 << 16, np.uint64), 2) == 1 << 16
child = os.fork()
if child == 0:
    os._exit(0 if run() else 1)
print(exit_code(child))
"""
    assert python(FORK + code) == "0"


@needs_fork
def test_a_fork_that_python_does_not_know_of_is_noticed():
    code = """
import ctypes
expected = run()
child = ctypes.PyDLL(None).fork()
if child == 0:
    os._exit(0 if run() == expected else 1)
print(exit_code(child))
"""
    assert python(FORK + code) == "0"


@needs_fork
def test_a_fork_while_another_thread_is_inside_a_call():
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, that a fork beside threads may hang
expected, over = run(), threading.Event()
def work():
    while not over.is_set():
        run()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        os._exit((run() != expected) + (exit_code(grandchild) if grandchild else 0))
    codes.append(exit_code(child))
over.set()
for thread in threads: thread.join()
print(sum(codes))
"""
    assert python(FORK + code) == "0"


@needs_fork
def test_a_child_forked_by_another_thread_heeds_signals():
    """The call would take minutes, and the child may use only some seconds of the CPU."""
    code = """
import resource, signal, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, that a fork beside threads may hang
class Woken(Exception): pass
def wake(*_): raise Woken
signal.signal(signal.SIGALRM, wake)
def work():
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            bnbp.batch_norm_training_statistics(np.broadcast_to(np.float32(1), (1 << 25, 1, 1 << 17)))
        except Woken:
            os._exit(0)
        os._exit(1)
    codes.append(exit_code(child))
codes = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(codes)
"""
    assert python(FORK + code) == "[0]"


WORKERS = """
import multiprocessing
import sys
import numpy as np, bnbp

def run(seed):
    x = np.random.default_rng(seed).normal(size=(8, 16, 40, 40)).astype(np.float32)
    return b"".join(array.tobytes() for array in bnbp.batch_norm_training(x, None, None, num_threads=2))

def processes(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(run, range(4))

def futures(method):
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        return list(pool.map(run, range(4)))

def joblib(backend):
    from joblib import Parallel, delayed
    return list(Parallel(n_jobs=2, backend=backend)(delayed(run)(seed) for seed in range(4)))

if __name__ == "__main__":
    expected = [run(seed) for seed in range(4)]  # the parent has had a team
    kind, how = sys.argv[1:]
    print(globals()[kind](how) == expected)
"""


@pytest.mark.skipif(os.name != "posix", reason="this system has spawn alone")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("processes", method) for method in ("fork", "forkserver", "spawn")),
        *(("futures", method) for method in ("fork", "spawn")),
        *(("joblib", backend) for backend in ("loky", "multiprocessing", "threading")),
    ],
)
def test_worker_processes_compute_the_same_bits(kind, how, tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    command = [sys.executable, "workers.py", kind, how]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


@pytest.mark.torch
@pytest.mark.parametrize("order", ["torch, bnbp", "bnbp, torch"])
def test_together_with_pytorch(order):
    """PyTorch brings an OpenMP of its own. Both compute in turns, at once, and ours in a forked child."""
    code = f"""
import os, threading, {order}
import numpy as np
x = np.random.default_rng(0).normal(size=(8, 16, 40, 40)).astype(np.float32)
t = torch.from_numpy(x)
def ours(): return bnbp.batch_norm_training(x, None, None, num_threads=2).normalized.tobytes()
def theirs(): return torch.relu(t).numpy().tobytes()
expected, wrong = (ours(), theirs()), []
def work(function, expected):
    for _ in range(20):
        if function() != expected: wrong.append(function)
threads = [threading.Thread(target=work, args=pair) for pair in zip((ours, theirs, ours), (*expected, expected[0]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
if child == 0:
    os._exit(0 if ours() == expected[0] else 1)
print(len(wrong), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == "0 0"


INSIDE = """
import warnings
warnings.simplefilter("ignore")  # what NumPy says of subinterpreters
try:
    import bnbp
    print(bnbp.batch_norm_training([[1.0], [3.0]], None, None, 0.0).normalized.ravel().tolist())
except ImportError as error:
    print("ImportError:", error)
"""


@pytest.mark.parametrize("first", ["", "import bnbp"])
def test_a_subinterpreter_computes_or_says_that_it_cannot(first):
    code = f"""
try:
    import _interpreters as interpreters
    run = interpreters.exec
except ImportError:
    import _xxsubinterpreters as interpreters
    run = interpreters.run_string
{first}
run(interpreters.create(), {INSIDE!r})
"""
    said = python(code)
    assert said == "[-1.0, 1.0]" or re.match(r"ImportError: .*(interpreter|more than once per process)", said), said


# ---------------------------------------------------------------- installation


@pytest.mark.skipif(not Path("/sys/devices/system/cpu/cpu0/cache/index2").exists(), reason="this system does not say")
def test_the_caches_are_those_of_this_cpu():
    kilobytes = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip().removesuffix("K")
    assert bnbp.show_config("dicts")["caches"]["l2"] == int(kilobytes) * 1024


def test_show_config_prints_what_it_returns(capsys):
    config = bnbp.show_config("dicts")
    assert config["version"] == bnbp.__version__
    assert config["isa"]["used"] in config["isa"]["built"]
    assert config["openmp"]["enabled"] is (config["openmp"]["version"] is not None)
    assert bnbp.show_config() is None
    printed = capsys.readouterr().out
    assert all(text in printed for text in (bnbp.__version__, config["threads"]["source"]))
    with pytest.raises(ValueError, match=r"^mode: expected 'stdout' or 'dicts', got 'json'$"):
        bnbp.show_config("json")


def test_a_source_folder_without_the_core_says_what_to_do(tmp_path):
    for source in PACKAGE.rglob("*.py"):
        copy = tmp_path / "bnbp" / source.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # would find the core
try:
    import bnbp
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith("bnbp: the compiled core is missing. ")
    assert "pip install -e ." in result.stdout


@pytest.mark.torch
@pytest.mark.parametrize("order", ["import torch, bnbp", "import bnbp, torch", "import bnbp.torch, torch"])
def test_pytorch_and_the_kernels_have_one_team_of_threads(order):
    """Of two runtimes, each would have one, and its threads would wait in the way of the other's."""
    code = f"""
import os
{order}
import numpy as np
torch.set_num_threads(3)
x = torch.randn(8, 16, 64, 64)
torch.relu(x)
tasks = len(os.listdir("/proc/self/task"))
bnbp.batch_norm_training(x.numpy(), num_threads=3)
print(tasks > 1, len(os.listdir("/proc/self/task")) - tasks)
"""
    assert python(code) == "True 0"
