"""``python -m deploy.monitoring.draw``: draw the dashboard's queries from a Prometheus, without Grafana."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

DASHBOARD = Path(__file__).with_name("dashboard.json")
COLUMNS = 4
TICKS = 4  # on the axis of time
UNITS = {"s": "s", "bytes": "bytes", "percentunit": "share"}


def panels(dashboard: Path = DASHBOARD) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield title, unit, and (query, legend) of every panel; variables have their default values."""
    content = json.loads(dashboard.read_text())
    variables = {
        f"${one['name']}": one["current"]["value"]
        for one in content["templating"]["list"]
        if one["type"] == "custom"
    }
    for panel in content["panels"]:
        queries = []
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in variables.items():
                query = query.replace(name, value)
            queries.append((query, target["legendFormat"]))
        yield panel["title"], panel["fieldConfig"]["defaults"]["unit"], queries


def ask(url: str, path: str, **parameters: object) -> list[dict[str, Any]]:
    """Ask Prometheus's HTTP API, at ``http://host:port``, and return the series."""
    with urllib.request.urlopen(
        f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30
    ) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def legend(template: str, labels: dict[str, str]) -> str:
    """Fill ``{{label}}`` in as Grafana does."""
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--url", default="http://localhost:9090", help="Prometheus.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, help="Up to now.")
def main(out: Path, url: str, minutes: float) -> None:
    """Draw the dashboard of the last minutes into OUT, a PNG file; panels without data say so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import dates
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = list(panels())
    end = time.time()
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.4 * rows), layout="constrained")
    for number, (title, unit, queries) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set_title(f"{title}, {UNITS[unit]}" if unit in UNITS else title, fontsize=9)
        for query, template in queries:
            try:
                step = max(1.0, minutes * 60 / 250)
                found = ask(url, "query_range", query=query, start=end - minutes * 60, end=end, step=step)
            except urllib.error.HTTPError as err:
                raise click.ClickException(f"Prometheus at {url} refused {query!r} ({err})") from err
            except OSError as err:
                raise click.ClickException(
                    f"expected Prometheus at {url}, found none ({err}): start it, or name it with --url"
                ) from err
            for series in found:
                times = [datetime.fromtimestamp(float(at), UTC) for at, _ in series["values"]]
                amounts = [float(value) for _, value in series["values"]]
                axes.plot(times, amounts, label=legend(template, series["metric"]))  # type: ignore[arg-type]
        axes.tick_params(labelsize=7)
        if not axes.lines:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center")
            axes.set_xticks([])
            axes.set_yticks([])
            continue
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(TICKS))
        axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S"))
        axes.legend(fontsize=7, loc="best")
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main()
