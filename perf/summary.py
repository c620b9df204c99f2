"""The report on half a page: what an operator asks first, and which results answer it."""

from __future__ import annotations

from math import floor

from perf import findings
from perf.document import Section, Table
from perf.points import QUIET_CORES, Figure, Measured, grouped, mark, measured, size_name
from perf.results import Result
from perf.streams import RATES_FPS, most_in_time

Answer = tuple[str, str]


def summary(results: dict[str, Result]) -> Section:
    """One line for each answer that there are results for."""
    rows = []
    for name, answer in (
        ("concurrency", _speed),
        ("queue_delay", _delay),
        ("instances", _instances),
        ("load", _streams),
        ("fused", _split),
        ("overhead", _file_to_file),
    ):
        if name in results:
            rows += [(what, figure, name) for what, figure in answer(results[name])]
    return Section(
        "summary",
        "In short",
        (
            "Each line is of one file of results; the next table says of which machine and day that is. "
            f"`!`: other programs used more than {QUIET_CORES:g} cores meanwhile.",
            *([] if "gpu" in results else ["No GPU has been measured yet; `make gpu` on one adds its part."]),
        ),
        Table(("what", "answer", "results"), rows),
    )


def _speed(result: Result) -> list[Answer]:
    points = measured(result)
    if not points:
        return []
    best = max(points, key=lambda point: point.fps.median)
    alone = min(points, key=lambda point: (point.settings["batch"], point.settings["concurrency"]))
    p50, p95 = (alone.latency_ms[name].text(0) for name in ("p50", "p95"))
    return [
        (f"most frames/s, {_size(best)}", f"{mark(best.others_cores)}{best.fps.text()} ({_place(best)})"),
        (
            f"a frame's latency alone, {_size(alone)}",
            f"{mark(alone.others_cores)}p50 {p50} ms, p95 {p95} ms",
        ),
    ]


def _delay(result: Result) -> list[Answer]:
    if result["stopped"]:
        return []
    choice, _ = findings.shortest_delay(measured(result))
    return [] if choice is None else [("queue delay to choose", f"{choice / 1000:g} ms")]


def _instances(result: Result) -> list[Answer]:
    if result["stopped"]:
        return []
    choice, _ = findings.fewest_instances(measured(result))
    return [] if choice is None else [("instance groups to choose", str(choice))]


def _streams(result: Result) -> list[Answer]:
    offered = [point for point in measured(result) if point.rate]
    answers = []
    for size, members in grouped(offered, ["size"]).items():
        counts = (f"{floor(most_in_time(members, fps) / fps)} of {fps} fps" for fps in RATES_FPS)
        answers.append((f"streams in real time, {size}", ", ".join(counts)))
    return answers


def _split(result: Result) -> list[Answer]:
    answers = []
    points = measured(result)
    forms = {form: [one for one in points if one.settings["form"] == form] for form in ("ensemble", "fused")}
    for split, fused in zip(forms["ensemble"], forms["fused"], strict=False):
        words = f"{findings.change(fused.fps, split.fps)} frames/s ({findings.verdict(fused.fps, split.fps)})"
        answers.append((f"three stages against one fused model, {_place(split)}", words))
    return answers


def _file_to_file(result: Result) -> list[Answer]:
    fps = Figure(tuple(next(values for name, values in result["fps"].items() if "file to file" in name)))
    slowest = max(result["client_stages_s"], key=lambda stage: float(result["client_stages_s"][stage]))
    return [
        (f"file to file, {size_name(result['size'])}, H.264", f"{fps.text()} frames/s; bottleneck: {slowest}")
    ]


def _size(point: Measured) -> str:
    return point.label(["size"])


def _place(point: Measured) -> str:
    return point.label(["batch", "concurrency"])
