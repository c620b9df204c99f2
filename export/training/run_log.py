"""Rows of a training run's ``log.csv``, and its progress bar."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

FIELDS = (
    "step", "pixel", "teacher", "features", "temporal", "perceptual", "adversarial", "discriminator",
    "lr", "step_s", "gain_db", "lpips", "tof_px",
)  # fmt: skip


class RunLog:
    """Means of what the steps report, a row every few steps; an existing file keeps its columns."""

    def __init__(self, path: Path, progress: float) -> None:
        """Open ``path`` for a run of which ``progress``, 0..1, is done."""
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        )
        self.task = self.bar.add_task("training", total=1.0)
        self.bar.update(self.task, completed=progress)
        fields = list(FIELDS)
        is_new = not path.exists()
        if not is_new:
            with path.open(newline="") as file:
                fields = next(csv.reader(file), fields)
        self.file = path.open("a", newline="")
        self.rows = csv.DictWriter(self.file, fields, extrasaction="ignore")
        if is_new:
            self.rows.writeheader()
        self.sums: dict[str, float] = defaultdict(float)
        self.count = 0

    def __enter__(self) -> RunLog:
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close bar and file."""
        self.bar.stop()
        self.file.close()

    def add(self, parts: Mapping[str, float], progress: float) -> None:
        """Add what one step reports."""
        for name, value in parts.items():
            self.sums[name] += value
        self.count += 1
        self.bar.update(self.task, completed=progress)

    def write(self, values: Mapping[str, float | None]) -> None:
        """Write a row: ``values`` beside the means since the row before; None leaves a cell empty."""
        means = {name: total / self.count for name, total in self.sums.items()}
        described = "  ".join(f"{name} {value:.5f}" for name, value in means.items())
        self.bar.update(self.task, description=described)
        self.rows.writerow({**means, **values})
        self.file.flush()
        self.sums.clear()
        self.count = 0
