"""The report's table of networks, measured on one bench."""

from __future__ import annotations

from perf import plots
from perf.document import Section, Table, source_of
from perf.points import Figure, disturbed_note, mark, size_name
from perf.results import Result


def peers_section(result: Result) -> Section:
    """All rows, measured."""
    asked = result["size"]
    rows, bars = [], {}
    for row in result["rows"]:
        network = result["networks"][row["network"]]
        ms = Figure(tuple(row["ms_per_frame"]))
        fps = Figure(tuple(1000 / value for value in row["ms_per_frame"]))
        is_smaller = row["size"] != asked
        scale = asked[0] * asked[1] / (row["size"][0] * row["size"][1])
        label = f"{row['network']}, {row['runtime']}{', estimated' * is_smaller}"
        bars[label] = Figure(tuple(scale * value for value in row["ms_per_frame"]))
        rows.append(
            (
                row["network"],
                row["runtime"],
                f"{network['parameters'] / 1e6:.2f}",
                f"{network['flops'] / 1e9:.0f}",
                size_name(row["size"]) + (" (smaller)" if is_smaller else ""),
                mark(row.get("others_cores", 0.0)) + ms.text(0),
                fps.text(2),
                f"{row['peak_memory_mb']:.0f}",
            )
        )
    headings = ("network", "runtime", "parameters, M", "GFLOPs a frame", "measured at")
    return Section(
        result["name"],
        "The papers' rivals on the same bench",
        (
            f"FP32, {result['threads']} threads, real frames, untrained weights: speed does not depend on "
            "them. GFLOPs are 2 x MAC of convolutions and matrix products per frame that comes out, counted "
            f"at {size_name(asked)} for every row. BasicVSR and RSDN work on clips of three frames, EDVR on "
            "windows of five, MST-GAN on windows of three. Peak memory is the process's, libraries included.",
            "*Smaller*: at the size asked for, one run would have taken longer than the bench allows. Such a "
            "row was measured on a smaller frame; its time must not be compared with the others. The picture "
            "scales it by the area, and says *estimated*.",
            *disturbed_note([row.get("others_cores", 0.0) for row in result["rows"]], "rows"),
        ),
        Table((*headings, "ms a frame", "frames/s", "peak MB"), rows),
        plots.bars(bars, "ms a frame, shorter is better; logarithmic", is_logarithmic=True) if bars else None,
        source_of(result),
    )
