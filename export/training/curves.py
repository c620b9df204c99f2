"""Loss and metric curves of training runs, as one picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.errors import ExportError

NOT_CURVES = {"step", "step_s"}
PANEL_INCHES = (9.0, 2.2)


def draw_curves(logs: Sequence[Path], path: Path) -> None:
    """Draw every column of the runs' ``log.csv`` over the steps, one panel each, runs side by side in it.

    Args:
        logs: CSV files with a ``step`` column; empty cells are values not measured at that step.
        path: PNG to write.

    Raises:
        ExportError: a file is missing or has no curve in it, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise ExportError(
            "expected matplotlib to draw curves, found none; pip install -e .[evaluate]"
        ) from err
    runs = {log.parent.name or log.stem: _read(log) for log in logs}
    columns = list(dict.fromkeys(name for run in runs.values() for name in run))
    figure = Figure(figsize=(PANEL_INCHES[0], PANEL_INCHES[1] * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(columns, panels, strict=True):
        for run, curves in runs.items():
            if name in curves:
                steps, values = curves[name]
                panel.plot(steps, values, label=run, marker="." if len(steps) < 50 else None)
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def _read(log: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values per column."""
    if not log.is_file():
        raise ExportError(f"expected a training log at {log}, found no file; pass a run's log.csv")
    curves: dict[str, tuple[list[int], list[float]]] = {}
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if name in NOT_CURVES or not cell or not row.get("step"):
                    continue
                try:
                    step, value = int(row["step"]), float(cell)
                except (TypeError, ValueError):
                    continue  # a column of words, or a line cut short when the run was killed
                if np.isfinite(value):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    if not curves:
        raise ExportError(
            f"expected columns of numbers over steps in {log}, found none; is it a run's log.csv?"
        )
    return curves
