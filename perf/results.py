"""Results files, the arithmetic of their figures, and how perf's commands report errors.

A results file is one JSON object: ``schema``, ``kind``, ``name``, ``machine`` and ``rows``. A row has its
settings and ``rounds``, one object of figures for each time it was measured; without rounds it has ``why``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console

SCHEMA = "mst-gan-perf/2"
KINDS = ("sweep", "end_to_end", "ladder", "peers")
FOLDER = Path(__file__).parent / "results"
QUICK = Path(__file__).parent.parent / "build" / "perf" / "quick"  # of `--quick`, never committed
BEYOND = 5  # samples that must lie above a percentile for it to be shown

Result = dict[str, Any]
Row = dict[str, Any]

console = Console(stderr=True)


class PerfError(Exception):
    """The text says what was expected, what was found and what to do next."""


class _Echo(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)  # above a progress bar, where there is one


class Command(click.Command):
    """Prints an expected error as one line and exits with 1; VSR_DEBUG=1 shows the traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Echo()])
        try:
            return super().invoke(ctx)
        except PerfError as err:
            if os.environ.get("VSR_DEBUG"):
                raise
            click.echo(f"Error: {err}", err=True)
            sys.exit(1)


def one_line(err: Exception) -> str:
    """First and last line of an error's text."""
    lines = str(err).splitlines() or [type(err).__name__]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


def known(names: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Refuse names that are not among the allowed ones. PerfError: One is not."""
    choices = list(allowed)
    if unknown := [name for name in names if name not in choices]:
        raise PerfError(f"expected {what} among {', '.join(choices)}; found {unknown[0]!r}")


@dataclass(frozen=True)
class Figure:
    """One quantity over the rounds in which it was measured."""

    values: tuple[float, ...]

    median = property(lambda self: median(self.values))
    low = property(lambda self: min(self.values))
    high = property(lambda self: max(self.values))

    def text(self, digits: int = 1) -> str:
        """Median, then the least and the most where they differ."""
        shown, low, high = (f"{value:.{digits}f}" for value in (self.median, self.low, self.high))
        return shown if low == high else f"{shown} ({low}-{high})"


def figure(row: Mapping[str, Any], key: str) -> Figure | None:
    """A quantity of a row over the rounds that have it; None where none has."""
    values = tuple(one[key] for one in row["rounds"] if one.get(key) is not None)
    return Figure(values) if values else None


def ratios(rounds: Sequence[float], base: Sequence[float]) -> Figure:
    """Round by round, how many times the base; of rounds that both have, as an interrupted run lacks some."""
    return Figure(tuple(one / other for one, other in zip(rounds, base, strict=False)))


def meaning(ratio: Figure) -> str:
    """Whether a ratio of interleaved rounds is a difference."""
    if len(ratio.values) < 2:
        return "one round, spread unknown"
    return "within the spread" if ratio.low <= 1 <= ratio.high else "faster" if ratio.low > 1 else "slower"


def least_samples(percent: float) -> int:
    """Samples from which a percentile is shown: `BEYOND` of them lie above it."""
    return round(BEYOND / (1 - percent / 100))


def percentile_text(row: Mapping[str, Any], percent: int) -> str:
    """A latency percentile in ms with its spread, or the number of samples where these are too few."""
    needed, counts = least_samples(percent), [one["requests"] for one in row["rounds"]]
    if min(counts) < needed:
        return f"too few ({min(counts)} of {needed})"
    return Figure(tuple(one[f"p{percent}_ms"] for one in row["rounds"])).text(0)


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write ``<folder>/<name>.json``, whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps({"schema": SCHEMA, **result}, indent=1) + "\n")
    part.replace(path)
    return path


def load_folder(folder: Path) -> dict[str, Result]:
    """Name -> result of every file in a folder. PerfError: there is none, or one is of another schema."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            schema = result["schema"], result["kind"]
            found[result["name"]] = result
        except (OSError, ValueError, TypeError, KeyError) as err:
            raise PerfError(
                f"expected {path} to hold results, found {err!r}: measure again or remove it"
            ) from err
        if schema[0] != SCHEMA or schema[1] not in KINDS or not {"machine", "rows"} <= set(result):
            raise PerfError(f"expected schema {SCHEMA} in {path}, found {schema}: measure again or remove it")
    if not found:
        raise PerfError(f"expected results in {folder}, found none: run `make measure` first")
    return found
