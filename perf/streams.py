"""Streams of a frame rate that the machine serves in time, from the sweep of random arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

from perf.document import Section, Table, source_of
from perf.points import Measured, grouped, varying
from perf.results import Result

RATES_FPS = (24, 30)
LOOK_AHEAD_FRAMES = 1  # the window's last frame must have come before its centre frame can be sent


def allowed_ms(fps: int) -> float:
    """A frame time plus the look-ahead."""
    return 1000 * (1 + LOOK_AHEAD_FRAMES) / fps


def most_in_time(offered: Sequence[Measured], fps: int) -> float:
    """The most frames/s offered at which 95 % of the frames are in time for a stream of this rate."""
    return max((one.offered_fps for one in offered if _p95(one) <= allowed_ms(fps)), default=0.0)


def streams_section(result: Result, points: list[Measured]) -> Section:
    """Streams for every size, and the shortest wait."""
    offered = [point for point in points if point.rate]
    others = [key for key in varying(offered) if key != "load"] or ["size"]
    groups = grouped(offered, others)
    rows = []
    for label, members in groups.items():
        for fps in RATES_FPS:
            rate = most_in_time(members, fps)
            rows.append((label, str(fps), f"{allowed_ms(fps):.0f}", f"{rate:.1f}", str(floor(rate / fps))))
    lowest = "; ".join(f"{label}: {min(map(_p95, members)):.0f} ms" for label, members in groups.items())
    return Section(
        f"{result['name']}_streams",
        "How many streams in real time?",
        (
            "A stream is in time where 95 % of its frames come back within one frame time plus the "
            f"look-ahead of its window, one frame more. The shortest p95 measured: {lowest}. Arrivals are "
            "random, which is harder on a server than the even beat of a single stream.",
        ),
        Table(("input", "stream, frames/s", "p95 allowed, ms", "most frames/s in time", "streams"), rows),
        source=source_of(result),
    )


def _p95(point: Measured) -> float:
    return point.latency_ms["p95"].median
