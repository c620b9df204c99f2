"""Two runs side by side, with the spread that says whether a difference means anything."""

from __future__ import annotations

from perf.document import Section, Table, machine_of, source_of
from perf.findings import verdict
from perf.points import SETTINGS, Figure, measured, size_name, varying
from perf.results import Result

OTHER_MACHINE = "**Another machine**: the change is that of the machine as well."


def comparison(base: dict[str, Result], now: dict[str, Result]) -> list[Section]:
    """One section for each result that both runs have figures of."""
    return [
        _compare(base[name], now[name])
        for name in now
        if name in base and set(_figures(base[name])) & set(_figures(now[name]))
    ]


def _figures(result: Result) -> dict[str, Figure]:
    """What is compared of a result: frames/s by the words that name them."""
    match result["kind"]:
        case "sweep":
            return {point.label(list(SETTINGS)): point.fps for point in measured(result)}
        case "overhead":
            return {name: Figure(tuple(values)) for name, values in result["fps"].items()}
        case "peers":
            return {
                f"{row['network']}, {row['runtime']}, {size_name(row['size'])}": Figure(
                    tuple(1000 / ms for ms in row["ms_per_frame"])
                )
                for row in result["rows"]
            }
    return {row["name"]: Figure(tuple(row["fps_rounds"])) for row in result["rows"] if "fps_rounds" in row}


def _short(result: Result) -> dict[str, str]:
    """Name of a figure -> the same without what all points of a sweep share."""
    if result["kind"] != "sweep":
        return {}
    points = measured(result)
    keys = varying(points) or ["size"]
    return {point.label(list(SETTINGS)): point.label(keys) for point in points}


def _compare(base: Result, now: Result) -> Section:
    earlier, short = _figures(base), _short(now)
    rows = []
    for name, after in _figures(now).items():
        if before := earlier.get(name):
            change = f"{after.median / before.median - 1:+.1%}"
            meaning = verdict(before, after)
            rows.append((short.get(name, name), before.text(2), after.text(2), change, meaning))
    return Section(
        f"{now['name']}_compared",
        f"Against the earlier run: {now.get('question', now['name'])}",
        (f"Before: {source_of(base)}.", *([OTHER_MACHINE] if machine_of(base) != machine_of(now) else [])),
        Table(("point", "frames/s before", "frames/s now", "change", "means"), rows),
        source=source_of(now),
    )
