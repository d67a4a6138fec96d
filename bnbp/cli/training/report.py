"""What is made of the rows: ratios, cells of tables, and a file of everything."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from ..benchmark.measure import Seconds
from .cases import CHANNELS_LAST, COMPILE, CONVERTED, EAGER, Result, Row, Settings

__all__ = ["PYTORCH", "load", "losses_apart", "memory_ratio", "milliseconds", "save", "speedup"]

PYTORCH = EAGER, COMPILE


def speedup(row: Row) -> tuple[float, float] | None:
    """The time of PyTorch's best over that of the converted network: of the minima and of the medians."""
    other, own = row.best(*PYTORCH), row.best(CONVERTED)
    if not (other and own and other.seconds and own.seconds):
        return None
    return other.seconds.over(own.seconds)


def milliseconds(result: Result | None) -> str:
    """A cell with the minimum; a star marks the format channels last."""
    if result is None or result.seconds is None:
        return ""
    time = result.seconds.minimum * 1e3
    return f"{time:.{0 if time >= 1000 else 1}f}" + " *" * (result.format == CHANNELS_LAST)


def memory_ratio(row: Row) -> float | None:
    """The peak memory of a step of the converted network over PyTorch's eager one, in the format where it is larger."""
    peaks = {(result.candidate, result.format): result.memory for result in row.results}
    ratios = [
        peak / other
        for (candidate, layout), peak in peaks.items()
        if candidate == CONVERTED and peak and (other := peaks.get((EAGER, layout)))
    ]
    return max(ratios, default=None)


def losses_apart(row: Row, name: str) -> float | None:
    """The largest relative difference of losses, step by step, from those of PyTorch; None if there are none."""
    if name not in row.losses:
        return None
    pairs = zip(row.losses[name], row.losses[EAGER], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def save(file: BinaryIO, settings: Settings, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write everything as JSON.

    Parameters
    ----------
    file : binary file
        Where to write.
    settings : Settings
        What was asked for.
    environment : dict
        What :meth:`measure.Benchmark.environment` returned.
    rows : sequence of Row
        What :meth:`measure.Benchmark.measure` returned.
    """
    content = {"settings": asdict(settings), "environment": environment, "rows": [asdict(row) for row in rows]}
    file.write(json.dumps(content, indent=1).encode())


def load(content: dict[str, Any]) -> list[Row]:
    """The rows of what :func:`save` has written, as JSON has it."""
    rows = []
    for row in content["rows"]:
        results = [
            Result(**{**result, "seconds": result["seconds"] and Seconds(**result["seconds"])})
            for result in row["results"]
        ]
        rows.append(Row(**{**row, "shape": tuple(row["shape"]), "results": results}))
    return rows
