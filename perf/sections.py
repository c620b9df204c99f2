"""The report's sections: results in; text, tables and plots out."""

from __future__ import annotations

from typing import Any

from perf import plots
from perf.document import Section, Table, machine_of, source_of
from perf.findings import findings
from perf.gpu.table import gpu_sections
from perf.ladder.table import ladder_sections
from perf.peers.papers import papers_sections
from perf.peers.table import peers_section
from perf.plan import sweep_names
from perf.points import Figure, Measured, described, disturbed_note, mark, measured, size_name, varying
from perf.results import Result
from perf.streams import RATES_FPS, allowed_ms, streams_section
from perf.summary import summary

STAGES = ("flow_align", "generator", "pixel_shuffle")
AXES = {"queue_delay_us": "queue delay, ms", "concurrency": "requests in flight"}
SUFFIXES = ("_gpu", "_cuda", "_tensorrt", "_fp32", "_cpu")  # of a sweep's name, on other machines or targets


def sections(results: dict[str, Result]) -> list[Section]:
    """Everything that these results allow to say."""
    found = [summary(results), _sources(results)]
    for result in sorted(results.values(), key=_order):
        match result["kind"]:
            case "sweep":
                found += _sweep(result)
            case "overhead":
                found.append(_overhead(result))
            case "gpu":
                found += gpu_sections(result)
            case "peers":
                found.append(peers_section(result))
            case "ladder":
                found += ladder_sections(result)
    return found + papers_sections(results)


def _order(result: Result) -> tuple[int, str]:
    """The sweeps as their file has them, each beside its kin, then the rest."""
    name = result["name"]
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    order = sweep_names()
    return (order.index(name) if name in order else len(order)), result["name"]


def _sources(results: dict[str, Result]) -> Section:
    """What was measured where; results of different machines stand side by side, and must not be mixed."""
    rows = [
        (
            result["name"],
            machine_of(result),
            result["machine"]["date"],
            result["machine"]["commit"],
            _generator(result),
        )
        for result in sorted(results.values(), key=_order)
    ]
    text = ["One line for each file of results; every part below repeats its own."]
    if len({row[1] for row in rows}) > 1:
        text.append(
            "**These are different machines.** Figures compare within a part; between parts only where this "
            "table gives them the same machine and the same generator."
        )
    return Section(
        "sources",
        "What was measured where",
        tuple(text),
        Table(("results", "machine", "date", "commit", "generator"), rows),
    )


def _generator(result: Result) -> str:
    """Digests of the generators that were served."""
    files = [files["generator"] for files in result.get("models", {}).values()]
    return ", ".join(dict.fromkeys(text.rpartition(" ")[2] for text in files)) or "-"


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
            "`~`: the windows of a round lie further from their mean than the sweep allows, "
            f"at {sum(not point.is_stable for point in points)} of {len(points)} points."
        )
    text += disturbed_note([point.others_cores for point in points], "points")
    text += findings(points, keys, result.get("committed", {}))
    if result["stopped"]:
        text.append(f"**Not complete**: {result['stopped']}.")
    found = [
        Section(
            result["name"], result["question"], tuple(text), _sweep_table(points, keys), _plot(points, keys),
            source_of(result),
        )
    ]  # fmt: skip
    if "load" in keys:
        found.append(streams_section(result, points))
    if keys == ["batch", "concurrency"] or keys == ["concurrency"]:
        found.append(_stages(result, points))
    return found


def _marks(point: Measured) -> str:
    return mark(point.others_cores) + "~" * (not point.is_stable)


def _sweep_table(points: list[Measured], keys: list[str]) -> Table:
    headings = [*(key.removesuffix("_us").replace("_", " ") for key in keys), "frames/s"]
    headings += ["p50 ms", "p95 ms", "p99 ms", "batch achieved", "server MB"]
    has_gpu = any(point.gpu_memory_mb for point in points)
    rows = []
    for point in points:
        memory = [point.memory_mb, *([point.gpu_memory_mb] if has_gpu else [])]
        rows.append(
            (
                *(described(key, point.settings[key]) for key in keys),
                _marks(point) + point.fps.text(2),
                *(point.latency_ms[name].text(0) for name in ("p50", "p95", "p99")),
                point.batch.text(2) if point.batch else "",
                *(f"{figure.span[1]:.0f}" if figure else "" for figure in memory),
            )
        )
    return Table((*headings, *(["GPU MB"] if has_gpu else [])), rows)


def _plot(points: list[Measured], keys: list[str]) -> str:
    if "load" in keys:
        return plots.percentiles_over_rate(points, {fps: allowed_ms(fps) for fps in RATES_FPS})
    for key, axis in AXES.items():
        if key in keys and len({point.settings[key] for point in points}) > 2:
            return plots.lines_over(points, key, axis)
    return plots.bars({point.label(keys): point.fps for point in points}, "frames/s")


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
    figures = {name: Figure(tuple(values)) for name, values in result["fps"].items()}
    stages: dict[str, Any] = result["client_stages_s"]
    slowest = max(stages, key=lambda stage: stages[stage])
    busy = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items())
    # Older runs have neither.
    others: dict[str, float] = result.get("others_cores", {})
    share, apart = (result.get(f"served_over_analyzed{place}") for place in ("", "_apart"))
    analyzed = f"**{share:.0%}** of what perf_analyzer gets, " if share else ""
    if apart:
        analyzed += f"**{apart:.0%}** with half of the cores for the server and half for the client, "
    return Section(
        result["name"],
        "From file to file: what does serving cost?",
        (
            f"{result['frames']} frames of {size_name(result['size'])}, x4, {result['encoder']}. "
            "perf_analyzer keeps as many requests under way at the same server. The bare "
            "loops run the same ONNX files in one process, frames in memory. Neither decodes or "
            "encodes; all have the same cores.",
            f"Decoded, served and encoded: {analyzed}**{result['served_over_best_bare']:.0%}** of the best "
            f"bare loop ({result['best_bare']}). The bottleneck is **{slowest}**: the client's stages were "
            f"at work for {busy}.",
            *disturbed_note([others.get(name, 0.0) for name in figures], "sides"),
        ),
        Table(
            ("side", "frames/s"),
            [(name, mark(others.get(name, 0.0)) + figure.text(2)) for name, figure in figures.items()],
        ),
        plots.bars(figures, "frames/s"),
        source_of(result),
    )
