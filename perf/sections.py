"""The report's sections: results in; text, tables and plots out."""

from __future__ import annotations

from math import floor
from typing import Any

from perf import plots
from perf.document import Section, Table, source_of
from perf.ladder.table import ladder_sections
from perf.peers.table import peers_sections
from perf.plan import sweep_names
from perf.points import QUIET_CORES, Figure, Measured, described, measured, varying
from perf.results import Result

RATES_FPS = (24, 30)
LOOK_AHEAD_FRAMES = 1  # the window's last frame must have come before its centre frame can be sent
STAGES = ("flow_align", "generator", "pixel_shuffle")
AXES = {"queue_delay_us": "queue delay, us", "concurrency": "requests in flight"}


def sections(results: dict[str, Result]) -> list[Section]:
    """Everything that these results allow to say."""
    found = []
    order = [*sweep_names(), *results]  # the sweeps as their file has them, then the rest
    for result in sorted(results.values(), key=lambda result: order.index(result["name"])):
        match result["kind"]:
            case "sweep":
                found += _sweep(result)
            case "overhead":
                found.append(_overhead(result))
            case "peers":
                found += peers_sections(result)
            case "ladder":
                found += ladder_sections(result)
    return found


def _sweep(result: Result) -> list[Section]:
    points = measured(result)
    if not points:
        return []
    keys = varying(points) or ["size"]
    fixed = points[0].label([key for key in ("size", "batch", "concurrency", "transport") if key not in keys])
    text = [f"{fixed[:1].upper()}{fixed[1:]}."] if fixed else []
    if any(len(point.fps.values) > 1 for point in points):
        text.append("Medians; in brackets the least and the most of the rounds.")
    if not all(point.is_stable for point in points):
        text.append(
            "`~`: perf_analyzer saw its last three windows differ by more than its threshold "
            f"in {sum(not point.is_stable for point in points)} of {len(points)} points."
        )
    if disturbed := [point for point in points if point.others_cores > QUIET_CORES]:
        text.append(
            f"`!`: other programs used more than {QUIET_CORES:g} cores meanwhile, "
            f"at {len(disturbed)} of {len(points)} points."
        )
    if "queue_delay_us" in keys:
        text.append(_shortest_delay(points))
    if result["stopped"]:
        text.append(f"**Not complete**: {result['stopped']}.")
    found = [
        Section(
            result["name"], result["question"], tuple(text), _sweep_table(points, keys), _plot(points, keys),
            source_of(result),
        )
    ]  # fmt: skip
    if "load" in keys:
        found.append(_streams(result, points))
    if keys == ["batch", "concurrency"] or keys == ["concurrency"]:
        found.append(_stages(result, points))
    return found


def _shortest_delay(points: list[Measured]) -> str:
    """What the sweep of queue delays says: the shortest that costs no throughput under the heaviest load."""
    most = max(point.settings["concurrency"] for point in points)
    loaded = [point for point in points if point.settings["concurrency"] == most]
    if min(len(point.fps.values) for point in loaded) == 1:
        return "One round of some points: without a spread, no choice."
    best = max(loaded, key=lambda point: point.fps.median)
    as_good = [point for point in loaded if point.fps.span[1] >= best.fps.span[0]]
    shortest = min(as_good, key=lambda point: int(point.settings["queue_delay_us"]))
    most_frames, least_wait = (
        f"{described('queue_delay_us', point.settings['queue_delay_us'])} ({point.fps.text(2)} frames/s)"
        for point in (best, shortest)
    )
    return (
        f"With {most} in flight the most comes out at {most_frames}. The shortest within its spread, and so "
        f"the choice: **{least_wait}**."
    )


def _marks(point: Measured) -> str:
    return "!" * (point.others_cores > QUIET_CORES) + "~" * (not point.is_stable)


def _sweep_table(points: list[Measured], keys: list[str]) -> Table:
    headings = [*(key.removesuffix("_us").replace("_", " ") for key in keys), "frames/s"]
    headings += ["p50 ms", "p95 ms", "p99 ms", "batch achieved", "server MB"]
    rows = []
    for point in points:
        rows.append(
            (
                *(described(key, point.settings[key]) for key in keys),
                _marks(point) + point.fps.text(2),
                *(point.latency_ms[name].text(0) for name in ("p50", "p95", "p99")),
                point.batch.text(2) if point.batch else "",
                f"{point.memory_mb.span[1]:.0f}",
            )
        )
    return Table(tuple(headings), rows)


def _plot(points: list[Measured], keys: list[str]) -> str:
    if "load" in keys:
        return plots.percentiles_over_rate(points)
    for key, axis in AXES.items():
        if key in keys and len({point.settings[key] for point in points}) > 2:
            return plots.lines_over(points, key, axis)
    return plots.bars({point.label(keys): point.fps for point in points}, "frames/s")


def _streams(result: Result, points: list[Measured]) -> Section:
    """Streams of a frame rate that the machine serves in time, from the sweep of random arrivals."""
    offered = [point for point in points if point.rate]
    rows = []
    for fps in RATES_FPS:
        limit_ms = 1000 * (1 + LOOK_AHEAD_FRAMES) / fps
        met = [
            point.rate * point.settings["batch"]
            for point in offered
            if point.rate and _p95(point) <= limit_ms
        ]
        rate = max(met, default=0.0)
        rows.append((str(fps), f"{limit_ms:.0f} ms", f"{rate:.1f}", str(floor(rate / fps))))
    lowest = min(map(_p95, offered))
    return Section(
        f"{result['name']}_streams",
        "How many streams in real time?",
        (
            "A stream is in time where 95 % of its frames come back within one frame time plus the "
            f"look-ahead of its window, one frame more. The shortest p95 measured is {lowest:.0f} ms.",
        ),
        Table(("stream, frames/s", "p95 allowed", "most frames/s in time", "streams"), rows),
        source=source_of(result),
    )


def _p95(point: Measured) -> float:
    return point.latency_ms["p95"].median


def _stages(result: Result, points: list[Measured]) -> Section:
    """Where the time goes, at every concurrency of the smallest batch."""
    least = min(point.settings["batch"] for point in points)
    shown = {
        point.label(["concurrency"]): point
        for point in points
        if point.settings["batch"] == least and set(STAGES) <= set(point.stages)
    }
    rows = [
        (label, stage, *(f"{point.stages[stage][phase]:.1f}" for phase in plots.PHASES))
        for label, point in shown.items()
        for stage in STAGES
    ]
    return Section(
        f"{result['name']}_stages",
        "Where does a request's time go?",
        (
            "The server's own counters, mean milliseconds of a request in each phase of each stage. *Input* "
            "and *output* are copies into and out of the backend; *queue* is waiting, for an instance or for "
            "a batch.",
        ),
        Table(("requests", "stage", *(f"{word} ms" for word in plots.PHASES.values())), rows),
        plots.stage_bars(shown, STAGES) if shown else None,
        source_of(result),
    )


def _overhead(result: Result) -> Section:
    height, width = result["size"]
    figures = {name: Figure(tuple(values)) for name, values in result["fps"].items()}
    stages: dict[str, Any] = result["client_stages_s"]
    slowest = max(stages, key=lambda stage: stages[stage])
    busy = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())
    share = result.get("served_over_analyzed")  # older runs have none
    analyzed = f"**{share:.0%}** of what perf_analyzer gets, " if share else ""
    return Section(
        result["name"],
        "From file to file: what does serving cost?",
        (
            f"{result['frames']} frames of {width}x{height}, x4, {result['encoder']}. perf_analyzer keeps as "
            "many requests under way at the same server. The bare loops run the same ONNX files in one "
            "process, frames in memory. Neither decodes or encodes; all have the same cores.",
            f"Decoded, served and encoded: {analyzed}**{result['served_over_best_bare']:.0%}** of the best "
            f"bare loop ({result['best_bare']}). The client's slowest stage is {slowest} ({busy}).",
        ),
        Table(("side", "frames/s"), [(name, figure.text(2)) for name, figure in figures.items()]),
        plots.bars(figures, "frames/s"),
        source_of(result),
    )
