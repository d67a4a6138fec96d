"""What the benchmark runs on: the processor, its caches, and the OpenMP libraries of the process."""

import importlib
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["cache_limit", "cache_sizes", "cpu_model", "cpus", "openmp_runtimes"]


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def cache_sizes() -> dict[str, int]:
    """Bytes of the caches that the first CPU has or shares, by level; empty where the system does not say."""
    sizes: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) * 1024
    return sizes


def cache_limit() -> int:
    """Bytes that may be assumed to stay in a cache: the last level, of which a shared machine promises no more."""
    return min(max(cache_sizes().values(), default=2**25), 2**25)


def openmp_runtimes() -> list[str] | None:
    """The OpenMP libraries in this process, by name; None without threadpoolctl. Each has threads of its own."""
    try:
        threadpoolctl: Any = importlib.import_module("threadpoolctl")
    except ModuleNotFoundError:
        return None
    return sorted(Path(lib["filepath"]).name for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "openmp")
