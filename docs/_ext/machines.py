"""Files of measurements, and what they say of the machine and of what was compared."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "measured"
EARLY = FOLDER / "early_builds.txt"
LIBRARIES = {"torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX", "numpy": "NumPy"}
TITLES = {  # of candidates
    "floor": "floor",
    "bnbp": "bnbp",
    "bnbp fresh": "bnbp fresh",
    "bnbp plain": "without the activation",
    "torch": "PyTorch",
    "torch.compile": "torch.compile",
    "tensorflow": "TensorFlow",
    "jax": "JAX",
    "numpy": "NumPy",
}


def load(name: str) -> dict[str, Any]:
    """The content of a file, and as ``early`` whether an early build of its release was measured."""
    content: dict[str, Any] = json.loads((FOLDER / name).read_text("utf-8"))
    lines = EARLY.read_text("utf-8").splitlines()
    content["early"] = name in lines
    return content


def cpu_of(content: dict[str, Any]) -> str:
    """The processor, without what its maker adds to the name."""
    cpu: str = content["environment"]["cpu"]
    return cpu.replace("(R)", "").removesuffix(" Processor")


def build_of(content: dict[str, Any]) -> str:
    """The release of bnbp."""
    release = f"bnbp {content['environment']['bnbp']['version']}"
    return f"an early build of {release}" if content["early"] else release


def threads_of(threads: int) -> str:
    """A number of threads in words."""
    return f"{threads} thread{'s' * (threads > 1)}"


def machine_of(content: dict[str, Any]) -> str:
    """The machine, what bnbp used of it, and the releases of all that was measured."""
    environment, settings = content["environment"], content["settings"]
    l2 = f"{environment['bnbp']['caches']['l2'] / 2**20:g} MiB of L2 each"
    level = environment["bnbp"]["isa"]["used"]
    peers = settings.get("peers") or (["torch"] if "networks" in settings else [])
    versions = environment["versions"]
    others = [f"{LIBRARIES[name]} {versions[name].partition('+')[0]}" for name in peers if name in versions]
    return ", ".join([f"{environment['cpus']} CPUs of {cpu_of(content)} ({l2}), {level}", build_of(content), *others])


def number(ratio: float) -> str:
    """A ratio with two or three digits that mean something."""
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f}"


def ratio(content: dict[str, Any], name: str, other: str, **where: Any) -> float | None:
    """The time of one candidate over that of another: of the network's totals, or the geometric mean over the shapes.

    The total is of medians, the mean of the ratios of minima. ``bound`` is the floor that applies. None if there is no
    such time.
    """
    totals = [total for total in content["totals"] if all(total[key] == value for key, value in where.items())]
    if len(totals) != 1:
        raise ValueError(f"{len(totals)} totals fit {where}")
    seconds = totals[0]["seconds"]
    if content["settings"]["sets"] == ["network"]:
        return seconds[name]["median"] / seconds[other]["median"] if {name, other} <= seconds.keys() else None
    means = {"bnbp": 1.0, **{key: mean["minimum"] for key, mean in totals[0]["geometric_means"].items()}}
    means["bound"] = means["floor"]  # in the caches nothing is read twice
    return means[other] / means[name] if {name, other} <= means.keys() else None


def slower(content: dict[str, Any], peer: str, **where: Any) -> tuple[int, int]:
    """On how many shapes bnbp takes longer than a peer, of how many; by the minima."""
    rows = [row for row in content["rows"] if all(row["point"][key] == value for key, value in where.items())]
    pairs = [
        (row["seconds"]["bnbp"]["minimum"], row["seconds"][peer]["minimum"]) for row in rows if peer in row["seconds"]
    ]
    if not pairs:
        raise ValueError(f"no row with {peer} fits {where}")
    return sum(own > other for own, other in pairs), len(pairs)
