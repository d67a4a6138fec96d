"""What is made of the rows: totals, means, remarks, and a file of everything."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from .candidates import BNBP, FRESH, PLAIN
from .measure import Row, Seconds, Settings
from .peers import PEERS
from .points import Point, label


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], list[Row]]:
    """Rows of one table: by set, operator, layout and threads."""
    result: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        point = row.point
        result.setdefault((point.set, point.operator, point.layout, point.threads), []).append(row)
    return result


def total(rows: Sequence[Row]) -> Row:
    """The sum over a group, each row as often as it counts, of those candidates that all rows have."""
    names = [name for name in rows[0].seconds if all(name in row.seconds for row in rows)]
    result = Row(rows[0].point, any(row.second_read for row in rows))
    for name in names:
        result.seconds[name] = _sum(row.seconds[name] * row.point.times for row in rows)
    return result


def total_bound(rows: Sequence[Row]) -> Seconds:
    """The sum of the floors that apply."""
    return _sum(row.bound * row.point.times for row in rows)


def _sum(terms: Iterable[Seconds]) -> Seconds:
    result = Seconds(0, 0)
    for term in terms:
        result = result + term
    return result


def geometric_mean(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """The mean ratio of bnbp's time to that of another candidate.

    Parameters
    ----------
    rows : sequence of Row
        Of one table; those count that have both times.
    name : str
        The other candidate.

    Returns
    -------
    tuple of float, or None
        Of the minima, and of the medians; None if no row has both.
    """
    ratios = [row.seconds[BNBP].over(row.seconds[name]) for row in rows if {BNBP, name} <= row.seconds.keys()]
    if not ratios:
        return None
    minima, medians = zip(*ratios, strict=True)
    return statistics.geometric_mean(minima), statistics.geometric_mean(medians)


def rival(rows: Sequence[Row]) -> str | None:
    """The peer to compare bnbp with: PyTorch where it has been measured, else the fastest; None without any."""
    means = {name: mean[1] for name in PEERS if (mean := geometric_mean(rows, name))}
    return "torch" if "torch" in means else max(means, key=lambda name: means[name], default=None)


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What a table's numbers do not say: the totals of a network as ratios, and why a time is missing."""
    sums = total(rows).seconds
    if rows[0].point.set == "network" and BNBP in sums:
        least, middle = sums[BNBP].over(total_bound(rows))
        yield f"total / floors that apply: {least:.2f} {middle:.2f}"
        for name in (name for name in PEERS if name in sums):
            times, fresh = (sums[name].over(sums[own])[1] for own in (BNBP, FRESH))
            yield f"total of {name} / bnbp: {times:.2f}, with fresh results {fresh:.2f}"
        if PLAIN in sums:
            yield "total / without the activation: {:.2f} {:.2f}".format(*sums[BNBP].over(sums[PLAIN]))
    where: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for missing in row.notes.items():
            where.setdefault(missing, []).append(label(row.point.shape))
    for (name, note), shapes in where.items():
        yield f"{name}: {note}" + (f" ({', '.join(shapes)})" if len(shapes) < len(rows) else "")


def save(file: BinaryIO, settings: Settings, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write everything as JSON.

    Parameters
    ----------
    file : binary file
        Where to write.
    settings : Settings
        What was asked for.
    environment : dict
        What :meth:`Benchmark.environment` returned.
    rows : sequence of Row
        What :meth:`Benchmark.measure` returned.
    """
    totals = []
    for (name, operator, layout, threads), members in groups(rows).items():
        sums = {**total(members).seconds, "bound": total_bound(members)}
        seconds = {candidate: asdict(value) for candidate, value in sums.items()}
        others = dict.fromkeys(other for row in members for other in row.seconds if other != BNBP)
        means = {other: geometric_mean(members, other) for other in others}
        totals.append(
            {
                "set": name,
                "operator": operator,
                "layout": layout,
                "threads": threads,
                "seconds": seconds,
                "geometric_means": {
                    other: {"minimum": mean[0], "median": mean[1]} for other, mean in means.items() if mean
                },
            }
        )
    content = {
        "settings": asdict(settings),
        "environment": environment,
        "rows": [asdict(row) for row in rows],
        "totals": totals,
    }
    file.write(json.dumps(content, indent=1).encode())


def load(content: dict[str, Any]) -> list[Row]:
    """The rows of what :func:`save` has written, as JSON has it."""
    rows = []
    for row in content["rows"]:
        point = Point(**{**row["point"], "shape": tuple(row["point"]["shape"])})
        seconds = {name: Seconds(**values) for name, values in row["seconds"].items()}
        rows.append(Row(point, row["second_read"], seconds, row["deviations"], row["notes"]))
    return rows
