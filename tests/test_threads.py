"""Threads: what decides their number, what limits it, and what many of them do to each other."""

import os
import subprocess
import sys
import threading
import time
from functools import cache

import numpy as np
import pytest
from conftest import make_batch, same_bits
from threadpoolctl import threadpool_info, threadpool_limits

import bnbp
from bnbp.engine import threads

BITS = """
import hashlib, numpy as np, bnbp
x = np.random.default_rng(0).normal(size=(8, 16, 40, 40)).astype(np.float32)
digest = hashlib.sha256()
for view in (x, x[:, ::2], x.reshape(8, 16, -1).transpose(0, 2, 1).reshape(-1, 16)):
    for array in bnbp.batch_norm_training(view, None, None, num_threads=NUM_THREADS):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""
ASK = "import bnbp; t = bnbp.show_config('dicts')['threads']; print(t['default'], t['source'])"

openmp = pytest.mark.skipif(not bnbp.show_config("dicts")["openmp"]["enabled"], reason="built without OpenMP")
LLVM = any(library["prefix"] == "libomp" for library in threadpool_info())
gnu = pytest.mark.skipif(LLVM, reason="LLVM's OpenMP may end the process if OMP_NUM_THREADS is no number")


def python(code, **environment):
    """What a new interpreter prints, and what it says of errors."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "BNBP_NUM"))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**clean, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip(), result.stderr


def default():
    return bnbp.show_config("dicts")["threads"]["default"]


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({"BNBP_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3 BNBP_NUM_THREADS"),
        ({"BNBP_NUM_THREADS": "", "OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
        ({"BNBP_NUM_THREADS": "two", "OMP_NUM_THREADS": "6"}, "6 OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": " 4,2 "}, "4 OMP_NUM_THREADS"),
    ],
)
def test_the_environment_decides_the_number_of_threads(environment, answer):
    assert python(ASK, **environment)[0] == answer


def test_without_a_word_it_is_the_cpus_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv("BNBP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert threads.default_num_threads() == (3, "CPUs this process may use")
    for quota, answer in ((2, (2, "cgroup quota")), (3, (3, "CPUs this process may use")),
                          (5, (3, "CPUs this process may use"))):  # fmt: skip
        monkeypatch.setattr(threads, "_cgroup_quota", lambda quota=quota: quota)
        assert threads.default_num_threads() == answer


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_of_the_process_decides():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + ASK
    assert python(code)[0].split(maxsplit=1)[0] == "1"


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", "2;3", "0x4", "99999999999999999999", ",2"])
@pytest.mark.parametrize("name", ["BNBP_NUM_THREADS", "OMP_NUM_THREADS"])
def test_a_malformed_number_is_a_warning_and_the_default(name, value, monkeypatch):
    monkeypatch.delenv("BNBP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = threads.default_num_threads()
    monkeypatch.setenv(name, value)
    with pytest.warns(RuntimeWarning, match=f"^{name}: expected a number of threads, got '{value}'; ignored"):
        assert threads.default_num_threads() == expected
    assert threads.openmp_num_threads() >= 1


@gnu
def test_an_import_with_malformed_numbers_warns_and_works():
    said, warned = python(ASK, BNBP_NUM_THREADS="many", OMP_NUM_THREADS="many")
    assert int(said.split()[0]) >= 1
    assert "BNBP_NUM_THREADS: expected" in warned
    assert "OMP_NUM_THREADS: expected" in warned


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "150000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, 2),
        ("0::/not/visible/here", {"cpu.max": "50000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("4:cpu,cpuacct:/a\n1:memory:/x", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {}, None),
        ("nonsense\n\n0::/a", {"a/cpu.max": "200000 100000"}, 2),
        ("0::/a", {"a/cpu.max": ""}, None),
        ("0::/a", {"a/cpu.max": "200000"}, None),
        ("0::/a", {"a/cpu.max": "200000 often"}, None),
        ("0::/a", {"a/cpu.max": "200000 0"}, None),
        ("0::/../../a", {"cpu.max": "100000 100000"}, 1),
        ("2:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "200000"}, None),
        ("0::/v2\n2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "1", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_the_quota_of_control_groups_is_rounded_up_and_nonsense_ignored(groups, files, quota, tmp_path):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert threads._cgroup_quota(tmp_path / "groups", tmp_path / "fs") == quota


def test_no_cgroup_file_is_no_quota(tmp_path):
    assert threads._cgroup_quota(tmp_path / "none") is None


@openmp
def test_threadpoolctl_sees_and_limits_the_threads():
    assert [library for library in threadpool_info() if library["user_api"] == "openmp"]
    before = default()
    with threadpool_limits(1, user_api="openmp"):
        assert default() == 1
    assert default() == before


@openmp
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list threads")
def test_a_limited_call_starts_no_thread():
    code = """
import os, threadpoolctl, numpy as np, bnbp
x = np.ones((8, 16, 40, 40), np.float32)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
with threadpoolctl.threadpool_limits(1, user_api="openmp"):
    bnbp.batch_norm_training(x, None, None)
inside = count()
bnbp.batch_norm_training(x, None, None)
print(inside - before, count() - before, bnbp.show_config("dicts")["threads"])
"""
    said = "0 2 {'default': 3, 'source': 'BNBP_NUM_THREADS'}"
    assert python(code, BNBP_NUM_THREADS="3", OMP_NUM_THREADS="2")[0] == said


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_THREAD_LIMIT": "2"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_PROC_BIND": "true"},
        {"OMP_WAIT_POLICY": "active"},
        pytest.param({"OMP_NUM_THREADS": "many"}, marks=gnu),
        {"OMP_MAX_ACTIVE_LEVELS": "0"},
    ],
    ids=lambda environment: "=".join(*environment.items()),
)
def test_openmp_may_give_fewer_threads_than_asked_for(environment):
    expected = bits_of_one_thread()
    code = "import warnings; warnings.simplefilter('ignore')\n" + BITS.replace("NUM_THREADS", "5")
    assert python(code, **environment)[0] == expected


@cache
def bits_of_one_thread():
    return python(BITS.replace("NUM_THREADS", "1"))[0]


@pytest.mark.parametrize("shape", [(6, 8, 40, 40), (3000, 24), (2, 1, 300, 300)], ids=str)
def test_eight_threads_for_each_cpu_give_the_same_bits(shape):
    teams, calls = 8, 5
    batch = make_batch(shape, dtype=np.float32)
    expected = bnbp.batch_norm_training_backprop(*batch, num_threads=1)
    team, wrong = len(getattr(os, "sched_getaffinity", lambda _: range(2))(0)), []

    def work():
        for _ in range(calls):
            got = bnbp.batch_norm_training_backprop(*batch, num_threads=team)
            wrong.append(not same_bits(expected, got))

    threads = [threading.Thread(target=work) for _ in range(teams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * teams * calls


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
