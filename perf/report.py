"""``make report``: draws perf/REPORT.md, and a page with plots in build/perf/; measures nothing."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path

import click
import jinja2
import matplotlib
import pandas as pd
from markdown_it import MarkdownIt
from matplotlib.figure import Figure as Canvas

from perf import results, tables
from perf.machine import ROOT
from perf.results import Command, Figure, PerfError, Result
from perf.tables import NOTHING, machine_of, shown

FOLDER = Path(__file__).parent
PAGE = ROOT / "build" / "perf" / "report.html"
# A headline is of one place that is named here, and not of the best place of a sweep.
PLACE = {"size": "[180, 320]", "batch": "1", "transport": "grpc", "rate_fps": "None"}
LEAST_ROUNDS = 3  # of a headline
README_ROWS = ("pruned-int8-batched", "compact-int8", "student-int8")
README_COLUMNS = ("row", "frames/s", "times the baseline", "loss dB")
BEGIN, END = "<!-- python -m perf.report --readme -->", "<!-- end of perf.report -->"

log = logging.getLogger(__name__)


def headlines(found: Mapping[str, Result], concurrency: int) -> dict[str, Figure]:
    """Frames/s at one place with settings as served, by model, machine and day, of all sweeps that have it.

    Only where there are `LEAST_ROUNDS` rounds.
    """
    lines = []
    for result in (one for one in found.values() if one["kind"] == "sweep"):
        served = {key: (None, result["committed"][key]) for key in ("instances", "queue_delay_us")}
        for row in result["rows"]:
            here = {"concurrency": concurrency, "target": None}.items() <= row.items()
            here &= all(str(row[key]) == value for key, value in PLACE.items())
            if here and all(row[key] in values for key, values in served.items()):
                name = (
                    f"{row['weights'] or 'default'}, {result['machine']['date'][:10]}, {machine_of(result)}"
                )
                lines += [(name, one["fps"]) for one in row["rounds"] if "fps" in one]
    pooled = pd.DataFrame(lines, columns=["name", "fps"]).groupby("name")["fps"]
    return {str(name): Figure(tuple(rounds)) for name, rounds in pooled if len(rounds) >= LEAST_ROUNDS}


def summary(found: Mapping[str, Result]) -> list[tables.Cells]:
    """What an operator asks first."""
    rows = {}
    for count in (1, 8):
        for name, one in headlines(found, count).items():
            rows[f"320x180, {count} in flight: {name}"] = f"{one.text()} frames/s, {len(one.values)} rounds"
    for result in found.values():
        if result["kind"] == "sweep" and not result["stopped"]:
            rows |= {f"{key} to choose": choice for key, choice in tables.choices(result["rows"]).items()}
            counts = tables.streams(result["rows"], result["budget_ms"]) if result["budget_ms"] else {}
            rows |= {f"streams of 24 frames/s in time: {place}": str(n) for place, n in counts.items()}
        for row in result["rows"] if result["kind"] == "end_to_end" else ():
            if row["name"] == "file to file":
                rows[f"file to file, {tables.size_name(result['size'])}"] = f"{shown(row, 'fps', 1)} frames/s"
    return [{"what": what, "answer": answer} for what, answer in rows.items()]


def sources(found: Mapping[str, Result]) -> list[tables.Cells]:
    """What was measured where."""
    rows = []
    for result in found.values():
        models = {files["generator"].rpartition(" ")[2] for files in result.get("models", {}).values()}
        machine = {key: result["machine"][key] for key in ("date", "commit")}
        facts = {"results": result["name"], "machine": machine_of(result), **machine}
        rows.append({**facts, "generator": ", ".join(sorted(models)) or NOTHING})
    return rows


def as_table(rows: list[tables.Cells]) -> str:
    """A Markdown table, without columns that say nothing."""
    frame = pd.DataFrame(rows)
    return str(frame.loc[:, (frame != NOTHING).any()].to_markdown(index=False, disable_numparse=True))


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
    filters = {"as_table": as_table, "as_svg": as_svg, "source": tables.source_of, "size": tables.size_name}
    templates.filters |= filters
    facts = {
        "summary": summary(found), "sources": sources(found), 
        "measured": {*found, *(one["kind"] for one in found.values())},
        "sweeps": [tables.sweep_part(one) for one in by_kind["sweep"]],
        "end_to_end": [tables.end_to_end_part(one) for one in by_kind["end_to_end"]],
        "ladders": [tables.ladder_part(one) for one in by_kind["ladder"]],
        "peers": [tables.peers_part(one) for one in by_kind["peers"]],
        "papers": tables.papers(by_kind["peers"], by_kind["ladder"]),
    }  # fmt: skip
    template = templates.get_template("report.md.j2")
    text, drawn = (_single_blank(template.render(facts, svg=svg)) for svg in (False, True))
    body = MarkdownIt().enable("table").render(drawn)
    return text, templates.get_template("page.html.j2").render(body=body)


def _single_blank(text: str) -> str:
    lines = text.strip().splitlines()
    kept = [line for line, last in zip(lines, ["", *lines], strict=False) if line.strip() or last.strip()]
    return "\n".join(kept) + "\n"


def readme_table(found: Mapping[str, Result]) -> str:
    """The small table that README shows, between its markers.

    Raises:
        PerfError: There is no ladder.
    """
    if "ladder" not in found:
        raise PerfError("expected ladder.json among the results, found none: run `make ladder` first")
    ladder = found["ladder"]
    rows = [tables.ladder_cells(row) for row in ladder["rows"] if row["key"] in README_ROWS]
    head = (
        f"320x180 to 1280x720, {machine_of(ladder)}, {ladder['machine']['date'][:10]}; median (least-most):"
    )
    return "\n".join(
        [BEGIN, head, "", as_table([{key: row[key] for key in README_COLUMNS} for row in rows]), END]
    )


@click.command(cls=Command)
@click.option("--results", "folder", type=click.Path(path_type=Path), default=results.FOLDER)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for both; default: perf and build/perf.")
@click.option("--readme", is_flag=True, help="Print the small table that README shows, and write nothing.")
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
