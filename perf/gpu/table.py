"""The GPU's part of the report: rows at each size, and how far each is from what the GPU could do."""

from __future__ import annotations

from typing import Any

from perf import plots
from perf.document import Section, Table, source_of
from perf.points import Figure
from perf.results import Result

NOTHING = "-"


def gpu_sections(result: Result) -> list[Section]:
    """One section for each size."""
    sizes = list(dict.fromkeys(tuple(row["size"]) for row in result["rows"]))
    return [_section(result, [row for row in result["rows"] if tuple(row["size"]) == size]) for size in sizes]


def _section(result: Result, rows: list[dict[str, Any]]) -> Section:
    height, width = rows[0]["size"]
    figures = {row["name"]: Figure(tuple(row["fps_rounds"])) for row in rows if row["fps_rounds"]}
    ceilings = ", ".join(
        f"{name} {value / 1e12:.2f} {'TB/s' if name == 'copy' else 'TFLOP/s'}"
        for name, value in result["ceilings"].items()
    )
    return Section(
        f"{result['name']}_{width}x{height}",
        f"On a GPU at {width}x{height}: how far from the roofline?",
        (
            f"Ceilings measured on this device, by a large product and a large copy: {ceilings}. The "
            "roofline is the least time in which these allow the network's convolutions, one after the "
            "other, each reading and writing its tensors once, in the row's precision; all else counts as "
            "free (*MB a frame* are those bytes). Only what multiplies less, as Winograd's convolutions do, "
            "could pass it.",
            "PyTorch and plans run one window at a time, frames already on the GPU; served rows take batches "
            "through shared memory, with two requests in flight for each instance. Medians; in brackets the "
            "least and the most of the rounds. Peak memory is PyTorch's allocator's for PyTorch, else what "
            "the GPU has in use beyond what it had before.",
            *(f"{row['name']}: not measured, {row['why']}." for row in rows if "why" in row),
        ),
        Table(
            ("row", "held against", "GFLOPs a frame", "MB a frame", "ms a frame", "frames/s",
             "roofline, frames/s", "reached", "peak GPU MB"),
            [_cells(row) for row in rows],
        ),
        plots.bars(figures, "frames/s") if figures else None,
        source_of(result),
    )  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bound, memory_mb = row["bound_fps"], row["peak_gpu_memory_mb"]
    fps = Figure(tuple(row["fps_rounds"])) if row["fps_rounds"] else None
    return (
        row["name"],
        row["precision"],
        f"{row['flops_per_frame'] / 1e9:.1f}" if bound else NOTHING,
        f"{row['bytes_per_frame'] / 1e6:.0f}" if bound else NOTHING,
        f"{1000 / fps.median:.2f}" if fps else NOTHING,
        fps.text() if fps else NOTHING,
        f"{bound:.1f}" if bound else NOTHING,
        f"{fps.median / bound:.0%}" if fps and bound else NOTHING,
        NOTHING if memory_mb is None else f"{memory_mb:.0f}",
    )
