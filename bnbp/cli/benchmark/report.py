"""What is made of the rows: tables, totals, remarks, and a file of everything."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from .candidates import BNBP, OWN
from .measure import Row, Seconds, Settings
from .peers import PEERS
from .points import label


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


def remarks(rows: Sequence[Row]) -> Iterator[str]:
    """What a table's numbers do not say: the totals of a network as ratios, and why a time is missing."""
    sums = total(rows).seconds
    if rows[0].point.set == "network" and BNBP in sums:
        least, middle = sums[BNBP].over(total_bound(rows))
        yield f"total / floors that apply: {least:.2f} {middle:.2f}"
        for name in (name for name in PEERS if name in sums):
            times, fresh = (sums[name].over(sums[own])[1] for own in OWN)
            yield f"total of {name} / bnbp: {times:.2f}, with fresh results {fresh:.2f}"
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
        totals.append({"set": name, "operator": operator, "layout": layout, "threads": threads, "seconds": seconds})
    content = {
        "settings": asdict(settings),
        "environment": environment,
        "rows": [asdict(row) for row in rows],
        "totals": totals,
    }
    file.write(json.dumps(content, indent=1).encode())
