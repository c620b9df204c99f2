"""How far a run of sweeps has come, and how long the rest is likely to take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from perf.analyze import WINDOWS
from perf.plan import Point, Sweep, points

AREA = 180 * 320  # pixels; the frame that weights are counted in
START_FRAMES = 20  # one start of perf_analyzer takes about as long as so many frames


def weight(sweep: Sweep, point: Point) -> float:
    """Work of one point, in frames of 320x180."""
    height, width = point.size
    frames = max(sweep.frames, point.batch * point.concurrency) / (point.load or 1)
    return START_FRAMES + WINDOWS * frames * height * width / AREA


def total_weight(sweeps: list[Sweep]) -> float:
    """Work of all points in all rounds."""
    return sum(one.rounds * sum(weight(one, point) for point in points(one)) for one in sweeps)


@dataclass
class Progress:
    """Work done against work in all; the machine's speed shows after the first point."""

    total: float
    done: float = 0.0
    started_s: float = field(default_factory=time.monotonic)

    def step(self, done: float) -> str:
        """Count this work as done, and say where that leaves us."""
        self.done += done
        gone_s = time.monotonic() - self.started_s
        left_s = gone_s * max(0.0, self.total / self.done - 1)
        return f"{self.done / self.total:.0%} done, {gone_s / 60:.1f} min gone, {left_s / 60:.1f} min left"
