"""Two runs side by side, with the spread that says whether a difference means anything."""

from __future__ import annotations

from perf.document import Section, Table, source_of
from perf.points import Figure, measured, varying
from perf.results import Result


def comparison(base: dict[str, Result], now: dict[str, Result]) -> list[Section]:
    """One section for each sweep that both runs have."""
    return [
        _compare(base[name], now[name])
        for name in now
        if name in base and now[name]["kind"] == "sweep" and base[name]["kind"] == "sweep"
    ]


def verdict(before: Figure, after: Figure) -> str:
    """What a difference means: machines are noisy."""
    if min(len(before.values), len(after.values)) == 1:
        return "one round: spread unknown"
    (low, high), (least, most) = before.span, after.span
    if low <= most and least <= high:
        return "within the spread"
    return "faster" if least > high else "slower"


def _compare(base: Result, now: Result) -> Section:
    points = measured(now)
    keys = varying(points) or ["size"]
    earlier = {str(point.settings): point for point in measured(base)}
    rows = []
    for point in points:
        if before := earlier.get(str(point.settings)):
            change = point.fps.median / before.fps.median - 1
            figures = (
                before.fps.text(2),
                point.fps.text(2),
                f"{change:+.1%}",
                verdict(before.fps, point.fps),
            )
            rows.append((point.label(keys), *figures))
    return Section(
        f"{now['name']}_compared",
        f"Against the earlier run: {now['question']}",
        (f"Before: {source_of(base)}.",),
        Table(("point", "frames/s before", "frames/s now", "change", "means"), rows),
        source=source_of(now),
    )
