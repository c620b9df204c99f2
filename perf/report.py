"""``make report``: draws perf/REPORT.md, and a page with plots in build/perf/; measures nothing."""

from __future__ import annotations

import io
import logging
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import jinja2
import matplotlib
from markdown_it import MarkdownIt
from matplotlib.figure import Figure as Canvas
from tabulate import tabulate

from perf import results
from perf.machine import QUIET_CORES, ROOT
from perf.results import (
    Command,
    Figure,
    PerfError,
    Result,
    Row,
    figure,
    least_samples,
    meaning,
    percentile_text,
    ratios,
)  # fmt: skip

FOLDER = Path(__file__).parent
PAGE = ROOT / "build" / "perf" / "report.html"
README_COLUMNS = ("row", "frames/s", "times the baseline", "peak MB", "loss dB")


COMPARED = ("weights", "target", "instances", "transport")  # settings whose first value is the base
CHOSEN = ("queue_delay_us", "instances")
FIXED = ("size", "batch", "concurrency", "transport")
SETTINGS = (*COMPARED, "queue_delay_us", "size", "batch", "concurrency", "rate_fps")
WORDS = {"queue_delay_us": "queue delay", "rate_fps": "frames/s sent", "concurrency": "in flight"}
TRANSPORTS = {"grpc": "gRPC", "system": "shared memory", "cuda": "CUDA shared memory"}
STREAM_FPS = 24
IN_TIME = 0.98  # answers per second over frames sent per second, below which a queue grows
LEAST_ROUNDS = 3  # of a headline
NOTHING = "-"

Cells = dict[str, str]
Part = dict[str, Any]
"""What the template shows of one result."""

log = logging.getLogger(__name__)


def bars(rows: Mapping[str, Row]) -> dict[str, Figure]:
    """Frames/s of the rows that have them."""
    return {name: fps for name, row in rows.items() if (fps := figure(row, "fps"))}


def size_name(size: Sequence[int]) -> str:
    """(height, width) as everybody writes it."""
    return f"{size[1]}x{size[0]}"


def machine_of(result: Result) -> str:
    """Processor with what tells it from its namesakes, memory, GPU."""
    machine = result["machine"]
    units = ", ".join(unit.replace("_", "-").upper() for unit in machine["vector_units"][-2:])
    processor = f"{machine['cpu']}, {machine['cores']} cores ({units}), {machine['memory_gb']:g} GB"
    return f"{processor}; {machine['gpu'] or 'no GPU'}"


def shown(row: Row, key: str, digits: int = 0) -> str:
    """A quantity of a row, or a dash; frames/s with the marks that the introduction explains."""
    found, others = figure(row, key), figure(row, "others_cores")
    if found is None or key != "fps":
        return found.text(digits) if found else NOTHING
    unstable = any(not one.get("stable", True) for one in row["rounds"])
    return "!" * bool(others and others.high > QUIET_CORES) + "~" * unstable + found.text(digits)


def number(row: Row, key: str, digits: int, unit: float = 1) -> str:
    """A figure that a row has once, or a dash."""
    return f"{row[key] / unit:.{digits}f}" if key in row else NOTHING


def setting(key: str, value: Any) -> str:
    """A setting as a reader says it."""
    if value is None:
        return "default"
    if key == "size":
        return size_name(value)
    if key == "queue_delay_us":
        return f"{value / 1000:g} ms"
    return TRANSPORTS.get(value, f"{value:g}" if isinstance(value, float) else str(value))


def words(row: Row, keys: Iterable[str]) -> str:
    """Settings of a row in one line."""
    return ", ".join(f"{WORDS.get(key, key)} {setting(key, row[key])}" for key in keys)


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings in which rows differ; the size where they do not."""
    return [key for key in SETTINGS if len({str(row.get(key)) for row in rows}) > 1] or ["size"]


def groups(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, list[Row]]:
    """Rows by these settings in words, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(words(row, keys) or words(row, ["size"]), []).append(row)
    return found


def gains(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What every value of a setting gives over the first, all else equal, round by round."""
    said: dict[str, list[str]] = {}
    for key in (key for key in COMPARED if key in varying(rows) and figure(rows[0], "fps")):
        for place, (base, *others) in groups(rows, [one for one in varying(rows) if one != key]).items():
            for other in others:
                ratio = ratios(*([one["fps"] for one in row["rounds"]] for row in (other, base)))
                title = f"Frames/s of {words(other, [key])} over {words(base, [key])}"
                said.setdefault(title, []).append(f"{ratio.text(2)}x, {meaning(ratio)} ({place})")
    return said


def choices(rows: Sequence[Row]) -> dict[str, str]:
    """Setting -> the value to choose, of those that have one."""
    found = {key: smallest_as_good(rows, key) for key in CHOSEN if key in varying(rows)}
    return {key: setting(key, value) for key, value in found.items() if value is not None}


def smallest_as_good(rows: Sequence[Row], key: str) -> int | None:
    """The least value of a setting that none beats beyond the spread, at any place of the others.

    Under the heaviest load; None where a point has one round, and so no spread.
    """
    rows = [row for row in rows if row["concurrency"] == max(one["concurrency"] for one in rows)]
    if any(len(row["rounds"]) < 2 for row in rows):
        return None
    choices = []
    for members in groups(rows, [one for one in varying(rows) if one != key]).values():
        fps = {row[key]: Figure(tuple(one["fps"] for one in row["rounds"])) for row in members}
        best = max(fps.values(), key=lambda one: one.median)
        choices.append(min(value for value, one in fps.items() if one.high >= best.low))
    return max(choices)


def streams(rows: Sequence[Row], budget_ms: float) -> dict[str, int]:
    """Streams of 24 frames/s that are in time, by the other settings.

    In time: the median round's p95 is within the budget, from enough requests, and no queue grows.
    """
    found = {}
    for place, members in groups(rows, [one for one in varying(rows) if one != "rate_fps"]).items():
        in_time = [0.0]
        for row in members:
            fps, p95 = figure(row, "fps"), figure(row, "p95_ms")
            enough = min((one["requests"] for one in row["rounds"]), default=0) >= least_samples(95)
            if fps and p95 and enough and fps.median >= IN_TIME * row["rate_fps"] and p95.median <= budget_ms:
                in_time.append(row["rate_fps"])
        found[place] = int(max(in_time) // STREAM_FPS)
    return found


def sweep_part(result: Result) -> Part:
    """A sweep's table and choices, and where the time of a request goes."""
    rows = [row for row in result["rows"] if row["rounds"]]
    keys, table = varying(rows), []
    for row in rows:
        counted = [stage for one in row["rounds"] for stage in one["stages"].items()]
        batches = tuple(one["batch"] for name, one in counted if name == "generator")
        table.append({
            **{WORDS.get(key, key): setting(key, row[key]) for key in keys}, "frames/s": shown(row, "fps", 2),
            **{f"p{n} ms": percentile_text(row, n) for n in (50, 95, 99)},
            "batch achieved": Figure(batches).text(2) if batches else NOTHING,
            "peak MB": shown(row, "memory_mb"), "GPU MB": shown(row, "gpu_memory_mb"),
        })  # fmt: skip
    is_complete = bool(rows) and not result["stopped"]
    return {
        "result": result, "rows": table, "bars": bars({words(row, keys): row for row in rows}),
        "fixed": words(rows[0], [key for key in FIXED if key not in keys]) if rows else NOTHING,
        "gains": gains(rows), "choices": choices(rows) if is_complete else {},
        "served": {key: setting(key, result["committed"][key]) for key in CHOSEN},
        "streams": streams(rows, result["budget_ms"]) if result["budget_ms"] else {},
        "headlines": {
            words(row, keys): shown(row, "fps", 1) for row in rows if len(row["rounds"]) >= LEAST_ROUNDS
        },
        "stages": rows if set(keys) <= {"batch", "concurrency"} else [],
    }  # fmt: skip


def end_to_end_part(result: Result) -> Part:
    """What serving costs, file to file."""
    rows = {row["name"]: row for row in result["rows"]}
    sides = ([one["fps"] for one in rows[name]["rounds"]] for name in ("file to file", "perf_analyzer"))
    stages = rows["file to file"]["rounds"][-1]["client_stages_s"]
    return {
        "result": result, "share": ratios(*sides).text(2), "bars": bars(rows),
        "busy": ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items()),
        "rows": [{"what": name, "frames/s": shown(row, "fps", 1)} for name, row in rows.items()],
    }  # fmt: skip


def ladder_cells(row: Row, result: Result) -> Cells:
    """Figures of a row of the ladder; the ratio is of rounds next to each other."""
    pairs = [(one["fps"], one["baseline_fps"]) for one in row["rounds"] if "baseline_fps" in one]
    network = result["networks"].get(row["weights"], {})
    return {
        "row": row["name"], "frames/s": shown(row, "fps", 1),
        "times the baseline": ratios(*zip(*pairs, strict=True)).text() if pairs else NOTHING,
        "peak MB": shown(row, "memory_mb"),
        "PSNR-Y dB": number(row, "psnr_db", 2), "loss dB": number(row, "loss_db", 2),
        "SSIM-Y": number(row, "ssim", 4), "tOF px": number(row, "tof_px", 3),
        "test clips": "; ".join(result["clips"]) if "psnr_db" in row else NOTHING,
        "parameters M": number(network, "parameters", 2, 1e6), "GFLOPs": number(network, "flops", 1, 1e9),
    }  # fmt: skip


def first_fps(found: Sequence[Result], *, gpu: bool = False, **wanted: str) -> str:
    """Frames/s of the first row that has them, and its size."""
    for result in (one for one in found if gpu == bool(one["machine"]["gpu"])):
        for row in result["rows"]:
            fps = figure(row, "fps")
            if fps and all(row[key] == value for key, value in wanted.items()):
                return f"{fps.text(2)} at {size_name(row['size'] if 'size' in row else result['size'])}"
    return NOTHING


def as_table(rows: list[Cells]) -> str:
    """A Markdown table, without columns that say nothing."""
    shown = [key for key in rows[0] if any(row[key] != NOTHING for row in rows)]
    cells = [[row[key] for key in shown] for row in rows]
    return tabulate(cells, shown, tablefmt="pipe", disable_numparse=True)


def as_svg(bars: Mapping[str, Figure]) -> str:
    """One bar each with its spread, on one line."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mst-gan", "font.size": 9})
    canvas = Canvas(figsize=(8, 0.7 + 0.3 * len(bars)), layout="constrained")
    panel, figures = canvas.subplots(), list(bars.values())
    errors = [[one.median - one.low for one in figures], [one.high - one.median for one in figures]]
    drawn = panel.barh(list(bars), [one.median for one in figures], xerr=errors, color="#1b6ca8", height=0.62)
    panel.bar_label(drawn, [f" {one.text()}" for one in figures], padding=4)
    panel.set(xlabel="frames/s", xlim=(0, 1.4 * max(one.high for one in figures)))
    panel.invert_yaxis()
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return "<div>" + " ".join(text[text.index("<svg") :].split("\n")) + "</div>"


def render(found: Mapping[str, Result]) -> tuple[str, str]:
    """REPORT.md, and the same as one page with plots that refers to no other file."""
    by_kind = {kind: [one for one in found.values() if one["kind"] == kind] for kind in results.KINDS}
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"), trim_blocks=True, lstrip_blocks=True
    )
    filters = {"as_table": as_table, "as_svg": as_svg, "machine": machine_of, "size": size_name}
    filters |= {"shown": shown, "number": number, "figure": figure, "ladder_cells": ladder_cells}
    templates.filters |= filters
    facts = {
        "results": list(found.values()), "measured": {*found, *(one["kind"] for one in found.values())},
        "sweeps": [sweep_part(one) for one in by_kind["sweep"]],
        "end_to_end": [end_to_end_part(one) for one in by_kind["end_to_end"]],
        "ladders": [{"result": one, "bars": bars(_named(one))} for one in by_kind["ladder"]],
        "peers": [{"result": one, "bars": bars(_named(one))} for one in by_kind["peers"]],
        "published": tomllib.loads((FOLDER / "peers" / "published.toml").read_text())["line"],
        "networks": {name: one for peers in by_kind["peers"] for name, one in peers["networks"].items()},
        "by_kind": by_kind, "first_fps": first_fps,
    }  # fmt: skip
    template = templates.get_template("report.md.j2")
    text, drawn = (_single_blank(template.render(facts, svg=svg)) for svg in (False, True))
    body = MarkdownIt().enable("table").render(drawn)
    return text, templates.get_template("page.html.j2").render(body=body)


def _named(result: Result) -> dict[str, Row]:
    return {", ".join(row[key] for key in ("name", "runtime") if key in row): row for row in result["rows"]}


def _single_blank(text: str) -> str:
    lines = text.strip().splitlines()
    kept = [line for line, last in zip(lines, ["", *lines], strict=False) if line.strip() or last.strip()]
    return "\n".join(kept) + "\n"


def readme_table(found: Mapping[str, Result]) -> str:
    """The ladder's figures that README shows. PerfError: there is no ladder."""
    if "ladder" not in found:
        raise PerfError("expected ladder.json among the results, found none: run `make ladder` first")
    cells = [ladder_cells(row, found["ladder"]) for row in found["ladder"]["rows"] if row["rounds"]]
    return as_table([{key: one[key] for key in README_COLUMNS} for one in cells])


@click.command(cls=Command)
@click.option("--results", "folder", type=click.Path(path_type=Path), default=results.FOLDER)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for both; default: perf and build/perf.")
@click.option("--readme", is_flag=True, help="Print the figures that README shows, and write nothing.")
@click.option("--quick", is_flag=True, help="Of the results of `--quick`, in build/perf/quick.")
def main(folder: Path, out: Path | None, readme: bool, quick: bool) -> None:
    """Draw the report."""
    if quick:
        folder = out = results.QUICK
    found = results.load_folder(folder)
    if readme:
        click.echo(readme_table(found))
        return
    paths = (out / "REPORT.md", out / PAGE.name) if out else (FOLDER / "REPORT.md", PAGE)
    for path, content in zip(paths, render(found), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        log.info("%s", path)


if __name__ == "__main__":
    main()
