"""The report's tables of networks: measured here, and as the papers print them."""

from __future__ import annotations

import tomllib
from pathlib import Path

from perf import plots
from perf.document import Section, Table, source_of
from perf.points import Figure
from perf.results import Result

PUBLISHED = Path(__file__).with_name("published.toml")


def peers_sections(result: Result) -> list[Section]:
    """Both tables."""
    return [_measured(result), _papers(result)]


def _measured(result: Result) -> Section:
    asked = result["size"]
    rows, bars = [], {}
    for row in result["rows"]:
        network = result["networks"][row["network"]]
        ms = Figure(tuple(row["ms_per_frame"]))
        fps = Figure(tuple(1000 / value for value in row["ms_per_frame"]))
        is_smaller = row["size"] != asked
        if not is_smaller:
            bars[f"{row['network']}, {row['runtime']}"] = ms
        rows.append(
            (
                row["network"],
                row["runtime"],
                f"{network['parameters'] / 1e6:.2f}",
                f"{network['flops'] / 1e9:.0f}",
                _name(row["size"]) + (" (smaller)" if is_smaller else ""),
                ms.text(0),
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
            f"at {_name(asked)} for every row. BasicVSR and RSDN work on clips of three frames, EDVR on "
            "windows of five, MST-GAN on windows of three. Peak memory is the process's, libraries included.",
            "*Smaller*: at the size asked for, one run would have taken longer than the bench allows. Such a "
            "row was measured on a smaller frame; its time must not be compared with the others.",
        ),
        Table((*headings, "ms a frame", "frames/s", "peak MB"), rows),
        plots.bars(bars, "ms a frame, shorter is better") if bars else None,
        source_of(result),
    )


def _papers(result: Result) -> Section:
    rows = []
    for line in tomllib.loads(PUBLISHED.read_text())["line"]:
        network = result["networks"].get(line["counted"])
        if network:
            flops = network["flops_at_papers_size"] / 1e9
            rows.append(
                (
                    line["name"],
                    line["parameters"],
                    f"{network['parameters'] / 1e6:.2f} M",
                    f"{line['gflops']}",
                    f"{flops / 2:.0f}",
                    f"{flops:.0f}",
                    line["reading"],
                    line["ms"],
                    line["fps"],
                    line["memory"],
                )
            )
    size = _name(result["papers_size"])
    printed = ("line of the papers", "parameters", "counted", "FLOPs, G")
    counted = ("counted MAC, G", "counted 2 x MAC, G")
    headings = (*printed, *counted, "what the papers' FLOPs are", "ms", "frames/s", "memory")
    return Section(
        f"{result['name']}_papers",
        "The papers' table, with its units",
        (
            "The papers print one column of FLOPs and one of times, but their lines mean different "
            f"things. MST-GAN's FLOPs are 2 x MAC at {size} *input*. BasicVSR's and RSDN's are MAC at {size} "
            "input, half of what stands beside MST-GAN's, while their times are the published ones at "
            f"320x180 input, whose *output* is {size}: a sixteenth of the work. At equal input MST-GAN does "
            "about a tenth of BasicVSR's work, and the papers' times do not say which is faster; the table "
            "above does.",
            "Times, frames/s and memory in this table are the papers' own, from one V100, not measured by "
            f"us. What we counted, at {size} input, stands beside their figures.",
        ),
        Table(headings, rows),
        source=source_of(result),
    )


def _name(size: list[int]) -> str:
    return f"{size[1]}x{size[0]}"
