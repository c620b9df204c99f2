"""``make report``: draws perf/REPORT.md, and a page with plots in build/perf/; measures nothing."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path

import click
import jinja2
import matplotlib
from markdown_it import MarkdownIt
from matplotlib.figure import Figure as Canvas
from tabulate import tabulate

from perf import results, tables
from perf.machine import ROOT
from perf.results import Command, Figure, PerfError, Result
from perf.tables import NOTHING, machine_of

FOLDER = Path(__file__).parent
PAGE = ROOT / "build" / "perf" / "report.html"
README_ROWS = ("pruned-int8-batched", "compact-int8", "student-int8")
README_COLUMNS = ("row", "frames/s", "times the baseline", "loss dB")
BEGIN, END = "<!-- python -m perf.report --readme -->", "<!-- end of perf.report -->"

log = logging.getLogger(__name__)


def as_table(rows: list[tables.Cells]) -> str:
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
    filters = {"as_table": as_table, "as_svg": as_svg, "machine": machine_of, "size": tables.size_name}
    templates.filters |= filters
    facts = {
        "results": list(found.values()), "measured": {*found, *(one["kind"] for one in found.values())},
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
    """The small table that README shows, between its markers. PerfError: There is no ladder."""
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
