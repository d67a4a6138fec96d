"""How many threads a call takes when it does not say."""

import os
import warnings
from pathlib import Path

__all__ = ["default_num_threads", "openmp_num_threads"]


def default_num_threads() -> tuple[int, str]:
    """The number of threads, and where it came from."""
    for name in ("BNBP_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").strip()
        if not value:
            continue
        number = _number(value)
        if number is not None:
            return number, name
        warnings.warn(f"{name}: expected a number of threads, got {value!r}; ignored", RuntimeWarning, stacklevel=2)
    cpus, quota = _affinity(), _cgroup_quota()
    if quota is not None and quota < cpus:
        return quota, "cgroup quota"
    return cpus, "CPUs this process may use"


def openmp_num_threads() -> int:
    """The number of threads that OpenMP takes, as long as nobody tells it another one."""
    return _number(os.environ.get("OMP_NUM_THREADS", "")) or _affinity()


def _number(value: str) -> int | None:
    first = value.split(",")[0].strip()  # OpenMP takes a list, a number for each level of nesting
    return int(first) if first.isdecimal() and 1 <= int(first) < 2**31 else None


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cgroup_quota(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """CPUs' worth of time that the control group grants, rounded up; None where nothing limits it.

    Version 2 has ``cpu.max`` ("quota period", or "max period"), version 1 two files. A limit of a parent group holds
    for its children. Inside a container the group's own path is often not visible; its limit is then at the root.
    """
    quotas = []
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            if controllers:
                quotas.append((_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")))
            else:
                quota, _, period = _read(group / "cpu.max").partition(" ")
                quotas.append((quota, period))
            if group == base:
                break
    limits = [
        -(-int(quota) // int(period))
        for quota, period in quotas
        if quota.isdecimal() and period.isdecimal() and int(period) > 0
    ]
    return max(min(limits), 1) if limits else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
