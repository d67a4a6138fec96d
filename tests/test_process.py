"""The package in its process: threads, forks, the GIL, and an import without a compiled core."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_batch, same_bits

import bnbp
from bnbp import _threads

PACKAGE = Path(bnbp.__file__).parent


def python(code, **environment):
    """What a new interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# ---------------------------------------------------------------- the number of threads

ASK = "import bnbp; t = bnbp.show_config('dicts')['threads']; print(t['default'], t['source'])"


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({"BNBP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3 BNBP_NUM_THREADS"),
        ({"BNBP_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
        ({"BNBP_NUM_THREADS": "", "OMP_NUM_THREADS": " 4,2 "}, "4 OMP_NUM_THREADS"),
    ],
)
def test_the_environment_decides_the_number_of_threads(environment, answer):
    assert python(ASK, **environment) == answer


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", str(2**40)])
def test_a_malformed_number_of_threads_is_a_warning_and_ignored(value, monkeypatch):
    monkeypatch.setenv("BNBP_NUM_THREADS", value)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    with pytest.warns(RuntimeWarning, match=f"^BNBP_NUM_THREADS: expected a number of threads, got '{value}'; ignored"):
        assert _threads.default_num_threads() == (6, "OMP_NUM_THREADS")


def test_without_a_word_it_is_the_cpus_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv("BNBP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(_threads, "_cgroup_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert _threads.default_num_threads() == (3, "CPUs this process may use")
    monkeypatch.setattr(_threads, "_cgroup_quota", lambda: 2)
    assert _threads.default_num_threads() == (2, "cgroup quota")


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/not/visible/here", {"cpu.max": "50000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/a\n1:memory:/x", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
    ],
)
def test_the_cgroup_quota_is_rounded_up(groups, files, quota, tmp_path):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _threads._cgroup_quota(tmp_path / "groups", tmp_path / "fs") == quota


def test_no_cgroup_file_is_no_quota(tmp_path):
    assert _threads._cgroup_quota(tmp_path / "none") is None


# ---------------------------------------------------------------- forks and threads

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
from bnbp import bench
assert bench.load_floor().read1(np.ones(1 << 16, np.float32), 2) == 1 << 16
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


@pytest.mark.framework
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


def test_many_python_threads_at_once_give_the_same_bits():
    batches = [make_batch((6, 8, 40, 40), dtype=np.float32, seed=seed) for seed in range(4)]
    expected = [bnbp.batch_norm_training_backprop(*batch) for batch in batches]
    wrong = []

    def work(index):
        for _ in range(20):
            got = bnbp.batch_norm_training_backprop(*batches[index], num_threads=2)
            if not same_bits(expected[index], got):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index % 4,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_the_gil_is_released_during_a_call():
    batch = make_batch((32, 32, 100, 100))
    running, ticks = threading.Event(), []

    def tick():
        while not running.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    bnbp.batch_norm_training_backprop(*batch, num_threads=1)
    end = time.perf_counter()
    running.set()
    thread.join()
    inside = [t for t in ticks if begin < t < end]
    assert len(inside) >= 3  # with the GIL held, at most the one before the kernel and the one after it


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
    copy = tmp_path / "bnbp"
    copy.mkdir()
    for source in PACKAGE.glob("*.py"):
        (copy / source.name).write_bytes(source.read_bytes())
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
