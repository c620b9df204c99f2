"""Plots of the report, as SVG text; they draw what the sections give them and measure nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from perf.points import Figure, Measured, grouped, varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files that can be searched
        "svg.hashsalt": "mst-gan",  # the same data gives the same file
        "font.size": 9,
        "font.sans-serif": ["DejaVu Sans", "Verdana"],  # named in every label of an SVG
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
)
COLOURS = ("#1b6ca8", "#d1603d", "#3d8361", "#8d5a97", "#b38a00", "#5c6b73")
WIDTH_IN, HEIGHT_IN = 9.0, 2.9
BAR_IN = 0.32
UNITS = {"queue_delay_us": 1000}  # drawn in ms
PHASES = {"queue_ms": "queue", "input_ms": "input", "infer_ms": "infer", "output_ms": "output"}
PERCENTILES = ("p50", "p95", "p99")


def lines_over(points: Sequence[Measured], key: str, axis: str) -> str:
    """Throughput, latency, batch and memory over one setting; a line for each combination of the others."""
    others = [name for name in varying(list(points)) if name != key]
    canvas = Canvas(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    panels = canvas.subplots(1, 4)
    unit = UNITS.get(key, 1)
    # Evenly apart, whatever the steps between them: the shortest would not be told apart.
    places = {value: place for place, value in enumerate(sorted({point.settings[key] for point in points}))}
    groups = grouped(points, others)
    quantities = (
        ("frames/s", lambda point: point.fps),
        ("p95 latency, ms", lambda point: point.latency_ms["p95"]),
        ("batch achieved", lambda point: point.batch),
        ("server memory, MB", lambda point: point.memory_mb),
    )
    for panel, (title, figure_of) in zip(panels, quantities, strict=True):
        for colour, (label, members) in zip(COLOURS, groups.items(), strict=False):
            shown = [
                (places[point.settings[key]], figure) for point in members if (figure := figure_of(point))
            ]
            _line(panel, [x for x, _ in shown], [figure for _, figure in shown], label, colour)
        panel.set(title=title, ylim=(0, None))
        panel.set_xticks(list(places.values()), [f"{value / unit:g}" for value in places])
    canvas.supxlabel(axis, fontsize="medium")
    if others:
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    return _svg(canvas)


def percentiles_over_rate(points: Sequence[Measured], in_time_ms: Mapping[int, float]) -> str:
    """Latency percentiles over the offered load; a panel for each combination of the other settings.

    ``in_time_ms``: frames/s of a stream -> the latency at which its frames are still in time.
    """
    offered = [point for point in points if point.rate]
    others = [name for name in varying(offered) if name != "load"] or ["size"]
    groups = grouped(offered, others)
    canvas = Canvas(figsize=(WIDTH_IN * min(1.0, 0.5 * len(groups)), HEIGHT_IN), layout="constrained")
    panels = canvas.subplots(1, max(1, len(groups)), squeeze=False)[0]
    for panel, (label, members) in zip(panels, groups.items(), strict=False):
        for colour, name in zip(COLOURS, PERCENTILES, strict=False):
            figures = [point.latency_ms[name] for point in members]
            _line(panel, [point.offered_fps for point in members], figures, name, colour)
        panel.set(title=label, xlabel="frames/s offered, Poisson", ylim=(0, None), xlim=(0, None))
        for (fps, allowed_ms), side in zip(in_time_ms.items(), ("bottom", "top"), strict=True):
            if allowed_ms < panel.get_ylim()[1]:
                panel.axhline(allowed_ms, color=COLOURS[-1], lw=0.8, ls=":")
                panel.text(0, allowed_ms, f" in time at {fps} fps", va=side, fontsize=7, color=COLOURS[-1])
    panels[0].set_ylabel("latency, ms")
    panels[0].legend()
    return _svg(canvas)


def bars(figures: Mapping[str, Figure], axis: str, *, is_logarithmic: bool = False) -> str:
    """One bar each, with the span over the rounds."""
    canvas = Canvas(figsize=(WIDTH_IN * 0.75, 0.7 + BAR_IN * len(figures)), layout="constrained")
    panel = canvas.subplots()
    medians = [figure.median for figure in figures.values()]
    spans = [[m - f.span[0] for m, f in zip(medians, figures.values(), strict=True)],
             [f.span[1] - m for m, f in zip(medians, figures.values(), strict=True)]]  # fmt: skip
    drawn = panel.barh(list(figures), medians, xerr=spans, color=COLOURS[0], height=0.62, error_kw={"lw": 1})
    panel.bar_label(drawn, [f" {figure.text()}" for figure in figures.values()], padding=4)
    most = max(figure.span[1] for figure in figures.values())
    if is_logarithmic:
        panel.set(xscale="log", xlim=(0.5 * min(medians), 8 * most))
    else:
        panel.set(xlim=(0, 1.35 * most))
    panel.set_xlabel(axis)
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    return _svg(canvas)


def rungs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed, memory and loss of the ladder's rows, side by side."""
    canvas = Canvas(figsize=(WIDTH_IN, 0.9 + BAR_IN * len(rows)), layout="constrained")
    panels = canvas.subplots(1, 3, sharey=True, width_ratios=(1.4, 1, 1))
    names = [row["name"] for row in rows]
    quantities = (
        (
            "frames/s",
            "fps",
            lambda row: f" {row['fps']:.2f}" + (f" ({row['ratio']:.1f}x)" if row["ratio"] else ""),
        ),
        ("peak memory, MB", "peak_memory_mb", lambda row: f" {row['peak_memory_mb']:.0f}"),
        ("PSNR-Y lost, dB", "psnr_loss_db", lambda row: f" {row['psnr_loss_db'] or 0:+.3f}"),
    )
    for panel, colour, (title, key, label) in zip(panels, COLOURS, quantities, strict=False):
        values = [row[key] or 0.0 for row in rows]
        drawn = panel.barh(names, values, color=colour, height=0.62)
        panel.bar_label(drawn, [label(row) for row in rows], padding=2)
        low, high = min(0.0, *values), max(0.0, *values)
        room = 0.6 * ((high - low) or 1.0)  # for the words beside the bars
        panel.set(xlabel=title, xlim=(low - (room if low < 0 else 0), high + room))
        panel.grid(False, axis="y")
    panels[0].invert_yaxis()
    return _svg(canvas)


def stage_bars(points: Mapping[str, Measured], stages: Sequence[str]) -> str:
    """Where a request's time goes: phases of every stage, stacked; a bar for each point."""
    canvas = Canvas(figsize=(WIDTH_IN, 1.6 + BAR_IN * len(points)), layout="constrained")
    panel = canvas.subplots()
    left = [0.0] * len(points)
    for colour, stage in zip(COLOURS, stages, strict=False):
        for alpha, (phase, word) in zip((0.3, 0.5, 1.0, 0.7), PHASES.items(), strict=True):
            widths = [point.stages[stage][phase] for point in points.values()]
            panel.barh(
                list(points),
                widths,
                left=left,
                color=colour,
                alpha=alpha,
                height=0.62,
                label=f"{stage}: {word}",
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
    panel.set(xlabel="ms of a request")
    panel.invert_yaxis()
    panel.grid(False, axis="y")
    canvas.legend(ncols=len(stages), loc="outside lower center")
    return _svg(canvas)


def _line(panel: Axes, x: Sequence[float], figures: Sequence[Figure], label: str, colour: str) -> None:
    low, high = ([figure.span[end] for figure in figures] for end in (0, 1))
    panel.plot(x, [figure.median for figure in figures], "o-", label=label, color=colour, ms=3.5, lw=1.4)
    panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def _svg(canvas: Canvas) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # One decimal of a point is finer than any screen.
    text = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), text)
    text = re.sub(r"\n(?=[LCQz\"])", " ", text)  # a path on one line
    return text[text.index("<svg") :]
