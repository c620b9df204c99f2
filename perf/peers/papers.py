"""The papers' table, line by line: what its units mean, and what we measured of it, all at one input size."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from perf.document import Section, Table, machine_of, source_of
from perf.points import Figure, size_name
from perf.results import Result

PUBLISHED = Path(__file__).with_name("published.toml")
NOTHING = "-"
MIXED = "Lines of different machines do not compare: the last column says which is which."
EAGER = "PyTorch"  # the runtime of the peers that stands beside the papers' times


def papers_sections(results: dict[str, Result]) -> list[Section]:
    """Both tables; nothing without a run of the peers."""
    peers = [result for name, result in results.items() if result["kind"] == "peers"]
    if not peers:
        return []
    lines = tomllib.loads(PUBLISHED.read_text())["line"]
    return [_units(peers[0], lines), _measured(results, peers, lines)]


def _units(result: Result, lines: list[dict[str, Any]]) -> Section:
    rows = []
    for line in lines:
        network = result["networks"].get(line["counted"])
        if network:
            flops = network["flops_at_papers_size"] / 1e9
            counted = (f"{network['parameters'] / 1e6:.2f} M", str(line["gflops"]), f"{flops / 2:.0f}")
            rows.append((line["name"], line["parameters"], *counted, f"{flops:.0f}", line["reading"]))
    size = size_name(result["papers_size"])
    return Section(
        f"{result['name']}_papers",
        "The papers' table, with its units",
        (
            "The papers print one column of FLOPs and one of times, but their lines mean different "
            f"things. MST-GAN's FLOPs are 2 x MAC at {size} *input*. BasicVSR's and RSDN's are MAC at {size} "
            "input, half of what stands beside MST-GAN's, while their times are the published ones at "
            f"320x180 input, whose *output* is {size}: a sixteenth of the work. At equal input MST-GAN does "
            "about a tenth of BasicVSR's work, and the papers' times do not say which is faster; the next "
            f"table does. What we counted, at {size} input, stands beside their figures.",
        ),
        Table(
            ("line of the papers", "parameters", "counted", "FLOPs, G", "counted MAC, G",
             "counted 2 x MAC, G", "what the papers' FLOPs are"),
            rows,
        ),
        source=source_of(result),
    )  # fmt: skip


def _measured(results: dict[str, Result], peers: list[Result], lines: list[dict[str, Any]]) -> Section:
    size = peers[0]["size"]
    gpu = [result for name, result in results.items() if result["kind"] == "gpu"]
    there = [_on_gpu(line, gpu[0], peers, size) for line in lines] if gpu else []
    if all(cell == NOTHING for cells in there for cell in cells):
        gpu, there = [], [[] for _ in lines]  # none, or measured at other sizes
    rows = [
        (line["name"], line["ms"], line["fps"], line["memory"], *_here(line, results, peers, size), *cells)
        for line, cells in zip(lines, there, strict=True)
    ]
    # A GPU's column names its machine itself.
    kinds = ("peers", "ladder")
    here = [one for one in results.values() if one["kind"] in kinds and not one["machine"]["gpu"]]
    machines = {machine_of(one) for one in here}
    headings = ["line of the papers", "papers: ms", "papers: frames/s", "papers: memory"]
    headings += ["here: ms a frame", "here: frames/s", "here: peak MB", "measured as", "on"]
    headings += ["GPU: ms a frame", "GPU: peak MB"] if gpu else []
    return Section(
        f"{peers[0]['name']}_measured",
        "The papers' table, measured here",
        (
            f"Every line at {size_name(size)} input, x4. The papers' figures are from one V100 and, line by "
            "line, of different inputs (above): they are not to be held against ours. Milliseconds are those "
            "that a frame takes at full load, not its latency. *Estimated*: measured on a smaller frame and "
            "scaled by the area.",
            *([f"**{MIXED}**"] if len(machines) > 1 else []),
            *([f"GPU: {machine_of(gpu[0])}, {gpu[0]['machine']['date']}."] if gpu else []),
        ),
        Table(tuple(headings), rows),
        source="; ".join(
            f"{result['name']}: {machine_of(result)}, {result['machine']['date']}, "
            f"commit {result['machine']['commit']}"
            for result in results.values()
            if result["kind"] in kinds or result in gpu
        ),
    )


def _here(
    line: dict[str, Any], results: dict[str, Result], peers: list[Result], size: list[int]
) -> list[str]:
    """Of the ladder, where the line is one of its rungs; else of the peers."""
    ladder = next((one for one in results.values() if one["kind"] == "ladder"), None)
    if "rung" in line and ladder and ladder["input_size"] == size:
        rung = next((row for row in ladder["rows"] if row["key"] == line["rung"]), None)
        if rung and rung["fps"]:
            cells = [f"{rung['ms_per_frame']:.0f}", f"{rung['fps']:.2f}", f"{rung['peak_memory_mb']:.0f}"]
            return [*cells, rung["name"], _place(ladder)]
        return [NOTHING] * 3 + [rung.get("why", NOTHING) if rung else NOTHING, NOTHING]
    for result in peers:
        for row in result["rows"]:
            if (row["network"], row["runtime"]) == (line["counted"], EAGER) and "rung" not in line:
                return [*_peer(row, size), f"{EAGER} FP32", _place(result)]
    return [NOTHING] * 5


def _peer(row: dict[str, Any], size: list[int]) -> list[str]:
    ms = Figure(tuple(row["ms_per_frame"])).median
    if row["size"] == size:
        return [f"{ms:.0f}", f"{1000 / ms:.2f}", f"{row['peak_memory_mb']:.0f}"]
    ms *= size[0] * size[1] / (row["size"][0] * row["size"][1])
    return [f"{ms:.0f} *estimated*", f"{1000 / ms:.2f} *estimated*", NOTHING]


def _on_gpu(line: dict[str, Any], gpu: Result, peers: list[Result], size: list[int]) -> list[str]:
    """Of the GPU's own rows for ours, of the peers measured there for the others."""
    for row in gpu["rows"]:
        if row["key"] == line.get("gpu") and row["size"] == size and row["fps_rounds"]:
            memory = row["peak_gpu_memory_mb"]
            fps = Figure(tuple(row["fps_rounds"])).median
            return [f"{1000 / fps:.2f}", NOTHING if memory is None else f"{memory:.0f}"]
    for result in peers:
        for row in result["rows"]:
            if row["network"] == line["counted"] and row["runtime"] == line.get("gpu_runtime"):
                ms, _, memory = _peer(row, size)
                return [ms, memory]
    return [NOTHING] * 2


def _place(result: Result) -> str:
    machine = result["machine"]
    units = "".join(f", {unit.replace('_', '-').upper()}" for unit in machine["vector_units"][-1:])
    return f"{machine['cores']} cores{units}, {machine['date'][:10]}"
