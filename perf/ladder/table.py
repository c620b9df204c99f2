"""The ladder as a section of the report, and as the README's table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perf import plots
from perf.document import Section, Table, source_of
from perf.errors import PerfError
from perf.points import QUIET_CORES, mark, size_name
from perf.results import Result

BEGIN, END = "<!-- ladder: drawn by `make report` -->", "<!-- end of ladder -->"
HEADINGS = (
    "row", "parameters, M", "GFLOPs", "ms/frame", "frames/s", "ratio", "peak MB", "PSNR-Y, dB", "loss, dB",
    "SSIM-Y", "tOF, px",
)  # fmt: skip
NOTHING = "-"
MEMORY_RUNGS = ("baseline-fp32", "pruned-int8")


def ladder_sections(result: Result) -> list[Section]:
    """The ladder, and what serving costs on it."""
    found = [_ladder(result)]
    if any("serving_cost" in row for row in result["rows"]):
        found.append(_serving(result))
    return found


def ladder_table(result: Result) -> Table:
    """All rows; a row without figures has dashes."""
    return Table(HEADINGS, [_cells(row) for row in result["rows"]])


def write_readme(path: Path, result: Result, table: list[str]) -> None:
    """Put the table between the markers of a README.

    Raises:
        PerfError: It has none.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise PerfError(
            f"expected {BEGIN} and {END} in {path}, found them not: put them where the table goes"
        )
    machine = result["machine"]
    head = (
        f"{size_name(result['input_size'])} -> x4, {machine['cpu']}, {result['cores']} cores, "
        f"{machine['gpu'] or 'no GPU'}, "
        f"{machine['date']}; details in [perf/REPORT.md](perf/REPORT.md):"
    )
    if any(mark(row.get("others_cores", 0.0)) for row in result["rows"]):
        head += " `!`: measured while other programs were at work, so not to be quoted."
    path.write_text("\n".join([before + BEGIN, head, "", *table, END]) + after)


def _ladder(result: Result) -> Section:
    rows, clip = result["rows"], result["clip"]
    text = [
        f"{size_name(result['input_size'])} input, {clip['frames']} frames of {clip['name']} reduced by 4, "
        f"so that their truth is known, on {result['cores']} cores, all of which every row may use. "
        "GFLOPs are 2 x MAC of convolutions at this input. Frames/s are those in the steady state, with two "
        "batches in flight for each instance; ms/frame are 1000 over them, not a latency. A row is served "
        "with one instance and batch 1 where it does not say otherwise. Answers pass through shared memory, "
        "uncoded.",
        "Ratio and loss are against the first row. Peak memory is that of all processes of the server (of "
        "PyTorch's, in the first row) under load, shared pages counted once. tOF, over the first "
        f"{clip['tof_frames']} frames, is the error of the motion between answers: less is steadier.",
    ]
    first = rows[0] if rows else {}
    if len(first.get("fps_rounds", ())) > 1:
        text.append(
            f"The first row was measured before and after all others; its frames/s differ by "
            f"**{first['spread_percent']:.1f} %**. Smaller differences between rows mean nothing."
        )
    if disturbed := [row["name"] for row in rows if mark(row.get("others_cores", 0.0))]:
        text.append(
            f"`!`: other programs used more than {QUIET_CORES:g} cores meanwhile, in {len(disturbed)} of "
            f"{len(rows)} rows. **Do not quote these figures.**"
        )
    if not result["complete"]:
        text.append("**Not complete**: the run was stopped, and rows or the repeat of the first are missing.")
    notes = [f"{row['name']}: {row['why']}." for row in rows if "why" in row]
    if memory := result.get("memory"):
        sizes = "; ".join(f"at {size_name(found['input_size'])} {memory_words(found)}" for found in memory)
        text.append(
            f"Served INT8, one instance, beside the served FP32 baseline takes {sizes}. What a server of "
            "three Python processes takes before its first frame is in both."
        )
    drawn = [row for row in rows if row["fps"] is not None]
    return Section(
        result["name"],
        "The precision ladder: what does each rung give, and cost?",
        (*text, *notes),
        ladder_table(result),
        plots.rungs(drawn) if drawn else None,
        source_of(result),
    )


def memory_words(found: Mapping[str, Any]) -> str:
    """The served INT8 chain beside the served FP32 baseline, at one size of frames."""
    base, ours = (found[key] for key in MEMORY_RUNGS)
    return f"{ours:.0f} of {base:.0f} MB, **{ours / base:.0%}**"


def _serving(result: Result) -> Section:
    rows = [
        (
            row["name"],
            f"{row['fps']:.2f}",
            " ".join(f"{value:.2f}" for value in row["fps_rounds"]),
            " ".join(f"{value:.2f}" for value in row["bare_fps_rounds"]),
            f"{row['serving_cost']:+.1%}",
        )
        for row in result["rows"]
        if "serving_cost" in row
    ]
    return Section(
        f"{result['name']}_serving",
        "What does serving a rung cost?",
        (
            "The ensemble, against its three ONNX files called directly in one process with the same batch, "
            "as many loops as instances and the same cores; rounds of both in turn. The cost is the time per "
            "frame added; below zero, the server's stages overlap where the loop's wait for each other.",
        ),
        Table(("row", "served, frames/s", "served rounds", "direct rounds", "cost"), rows),
        source=source_of(result),
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    formats = (
        ("params", "{:.2f}", 1e6), ("flops", "{:.1f}", 1e9), ("ms_per_frame", "{:.1f}", 1),
        ("fps", "{:.2f}", 1), ("ratio", "{:.2f}x", 1), ("peak_memory_mb", "{:.0f}", 1),
        ("psnr_db", "{:.2f}", 1), ("psnr_loss_db", "{:+.3f}", 1), ("ssim", "{:.4f}", 1), ("tof", "{:.4f}", 1),
    )  # fmt: skip
    disturbed = mark(row.get("others_cores", 0.0))
    return (
        f"{disturbed} {row['name']}".lstrip(),
        *(NOTHING if row[key] is None else text.format(row[key] / unit) for key, text, unit in formats),
    )
