"""``make report``: draws perf/REPORT.md, its plots and one self-contained HTML page; measures nothing."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import click

from perf import results
from perf.compare import comparison
from perf.document import Section, Table
from perf.errors import Command
from perf.ladder.table import ladder_table, write_readme
from perf.sections import sections

FOLDER = Path(__file__).parent
TITLE = "MST-GAN on Triton, measured"
INTRODUCTION = (
    "Drawn by `make report` from `perf/results/`; every part says where, when and with what it was measured. "
    "Frames are real ones of a moving street scene, x4, unless a part says otherwise. "
    "Sizes are those of the frame that is sent."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
td { white-space: nowrap } td.long { white-space: normal } th { vertical-align: bottom }
.figure { text-align: right }
svg { max-width: 100%; height: auto }
.table { overflow-x: auto } .source { color: #666; font-size: .75rem }
nav a { display: block }
"""

FIGURE = re.compile(r"[!~<>+ -]*[\d.]+( ?(%|x|M|MB|GB)| \([\d.-]+\)| \*estimated\*| at 270p)?")
LONG_CELL = 30  # characters; such a cell breaks its lines

log = logging.getLogger(__name__)


def markdown(parts: Sequence[Section], plots: str) -> str:
    """The report; plots lie in the folder ``plots`` beside it."""
    lines = [f"# {TITLE}", "", INTRODUCTION, ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for paragraph in part.text:
            lines += [paragraph, ""]
        if part.plot:
            lines += [f"![{part.title}]({plots}/{part.name}.svg)", ""]
        if part.table:
            lines += [*markdown_rows(part.table), ""]
        if part.source:
            lines += [f"<sub>{part.source}</sub>", ""]
    return "\n".join(lines)


def page(parts: Sequence[Section]) -> str:
    """The same as one HTML file without references to others."""
    body = [f"<h1>{TITLE}</h1>", f"<p>{_inline(INTRODUCTION)}</p>", "<nav>"]
    body += [f'<a href="#{part.name}">{html.escape(part.title)}</a>' for part in parts]
    body.append("</nav>")
    for part in parts:
        body.append(f'<h2 id="{part.name}">{html.escape(part.title)}</h2>')
        body += [f"<p>{_inline(paragraph)}</p>" for paragraph in part.text]
        body += [part.plot] if part.plot else []
        body += [_html_table(part.table)] if part.table else []
        body += [f'<p class="source">{html.escape(part.source)}</p>'] if part.source else []
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{TITLE}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n' + (
        "\n".join(body) + "\n</body></html>\n"
    )


def markdown_rows(table: Table) -> list[str]:
    """Lines of a Markdown table; columns of figures stand at the right."""
    rule = ["---:" if are_figures else "---" for are_figures in _figure_columns(table)]
    return [f"| {' | '.join(cells)} |" for cells in (table.headings, rule, *table.rows)]


def _html_table(table: Table) -> str:
    columns = _figure_columns(table)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="{"figure" if are_figures else ("long" if len(text) > LONG_CELL else "text")}">'
            f"{_inline(text)}</{tag}>"
            for text, are_figures in zip(cells, columns, strict=True)
        )

    rows = "".join(f"<tr>{line('td', row)}</tr>" for row in table.rows)
    head = f"<thead><tr>{line('th', table.headings)}</tr></thead>"
    return f'<div class="table"><table>{head}<tbody>{rows}</tbody></table></div>'


def _figure_columns(table: Table) -> list[bool]:
    """Which columns hold figures alone; the first names the row."""
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.headings)
    return [index > 0 and all(map(_is_figure, cells)) for index, cells in enumerate(columns)]


def _is_figure(text: str) -> bool:
    """Whether a cell holds a number, perhaps with marks, a unit or a spread, or stays empty."""
    return text in ("", "-") or bool(FIGURE.fullmatch(text))


def _inline(text: str) -> str:
    """The little Markdown that sections use: bold, emphasis, code."""
    escaped = html.escape(text)
    for mark, tag in ((r"\*\*", "strong"), (r"\*", "em"), ("`", "code")):
        escaped = re.sub(rf"{mark}(.+?){mark}", rf"<{tag}>\1</{tag}>", escaped)
    return escaped


@click.command(cls=Command)
@click.option("--results", "folder", type=click.Path(path_type=Path), default=results.FOLDER)
@click.option("--base", type=click.Path(path_type=Path), help="Folder with the results of an earlier run.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="Where the report goes.")
@click.option("--readme", type=click.Path(path_type=Path), help="Also put the ladder's table into this file.")
def main(folder: Path, base: Path | None, out: Path, readme: Path | None) -> None:
    """Draw the report."""
    now = results.load_folder(folder)
    parts = sections(now)
    if base:
        parts += comparison(results.load_folder(base), now)
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for stale in plots.glob("*.svg"):
        stale.unlink()
    for part in parts:
        if part.plot:
            (plots / f"{part.name}.svg").write_text(part.plot)
    (out / "REPORT.md").write_text(markdown(parts, plots.name))
    (out / "report.html").write_text(page(parts))
    if readme and "ladder" in now:
        write_readme(readme, now["ladder"], markdown_rows(ladder_table(now["ladder"])))
    log.info("%s\n%s", out / "REPORT.md", out / "report.html")


if __name__ == "__main__":
    main()
