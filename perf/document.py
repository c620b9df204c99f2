"""What the report is made of: a heading, text, a table, a plot, and where all of it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perf.results import Result


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """One question and its answer."""

    name: str
    """File name of its plot, and anchor."""
    title: str
    text: tuple[str, ...]
    table: Table | None = None
    plot: str | None = None
    """SVG."""
    source: str = ""
    """Where and with what it was measured."""


def machine_of(result: Result) -> str:
    """Processor with what tells it from its namesakes, memory, GPU."""
    machine = result["machine"]
    units = ", ".join(unit.replace("_", "-").upper() for unit in machine["vector_units"][-2:])
    processor = f"{machine['cpu']}, {machine['cores']} cores ({units}), {machine['memory_gb']:g} GB"
    return f"{processor}; {machine['gpu'] or 'no GPU'}"


def source_of(result: Result) -> str:
    """Machine, versions, date, commit and models in one line."""
    machine = result["machine"]
    server = result.get("server", "embedded")
    parts = [
        machine_of(result),
        "" if server == "embedded" else f"server already running at {server}",
        machine["system"],
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"perf_analyzer {machine['perf_analyzer']}" if "perf_analyzer" in machine else "",
        f"load {machine['load_1m_at_start']:g} at the start",
        machine["date"],
        f"commit {machine['commit']}",
        *(f"generator {target}: {files['generator']}" for target, files in result.get("models", {}).items()),
    ]
    return "; ".join(part for part in parts if part)
