"""One run of perf_analyzer: a point in, its figures out."""

from __future__ import annotations

import csv
import logging
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

from perf.errors import PerfError
from perf.plan import TRANSPORTS, Point, Sweep
from perf.tools import Analyzer

WINDOWS = 3  # perf_analyzer's percentiles are over the last three; we let it end with these
MAX_WINDOWS = 2 * WINDOWS  # more than three only where one stayed empty, as a slow open loop's may
ANY_SPREAD_PERCENT = 1000  # it would throw away what is not stable; we keep it, and mark it
WINDOW = re.compile(r"Pass \[\d+\] throughput: (\S+) infer/sec")
PERCENTILES = ("p50", "p90", "p95", "p99")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where requests go, and what is in them."""

    grpc_url: str
    model: str
    input_data: Path
    output_bytes: int
    """Of one answer; perf_analyzer's default for shared memory holds 100 KB."""


@dataclass(frozen=True)
class Measurement:
    """What perf_analyzer found at one point."""

    is_stable: bool
    fps: float
    """Over the windows after the first, in which the requests in flight build up."""
    windows_fps: tuple[float, ...]
    latency_ms: dict[str, float]
    requests: int

    def as_dict(self) -> dict[str, Any]:
        """For results files."""
        return {
            "stable": self.is_stable,
            "fps": self.fps,
            "windows_fps": list(self.windows_fps),
            "latency_ms": self.latency_ms,
            "requests": self.requests,
        }


def arguments(sweep: Sweep, point: Point, target: Target, rate: float | None) -> list[str]:
    """perf_analyzer's arguments for a point; ``rate`` in requests per second where the loop is open.

    No ``--profile-export-file``: it would write every frame sent as JSON numbers.
    """
    requests = max(ceil(sweep.frames / point.batch), point.concurrency)
    load = (
        [f"--concurrency-range={point.concurrency}"]
        if rate is None
        else [f"--request-rate-range={rate:.4g}", "--request-distribution=poisson"]
    )
    shared = []
    if point.transport != "grpc":
        shared = [
            f"--shared-memory={TRANSPORTS[point.transport]}",
            f"--output-shared-memory-size={target.output_bytes}",
        ]
    return [
        "-m", target.model, "-i", "grpc", "-u", target.grpc_url, "-b", str(point.batch),
        f"--input-data={target.input_data}", *load, *shared,
        "--measurement-mode=count_windows", f"--measurement-request-count={requests}",
        f"--stability-percentage={ANY_SPREAD_PERCENT}", f"--max-trials={MAX_WINDOWS}",
        f"--percentile={sweep.percentile}", "-v",
    ]  # fmt: skip


def warm_up(analyzer: Analyzer, target: Target, point: Point, timeout_s: int) -> None:
    """A few requests of this size: the server warmed itself up with small frames only."""
    command = ["-m", target.model, "-i", "grpc", "-u", target.grpc_url, "-b", str(point.batch)]
    command += [f"--input-data={target.input_data}", "--concurrency-range=2", "--request-count=4"]
    _run(analyzer.command(command), timeout_s)


def measure(
    analyzer: Analyzer, sweep: Sweep, point: Point, target: Target, rate: float | None
) -> Measurement:
    """Run perf_analyzer over three windows, however much they differ.

    Raises:
        PerfError: It failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        csv_path = Path(folder) / "latency.csv"
        command = analyzer.command([*arguments(sweep, point, target, rate), "-f", str(csv_path)])
        log.info("%s", shlex.join(command))
        run = _run(command, sweep.timeout_s)
        table = csv_path.read_text() if csv_path.is_file() else ""
    windows = tuple(map(float, WINDOW.findall(run.stdout)[-WINDOWS:]))
    if run.returncode or not table or len(windows) < WINDOWS:
        lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip()]
        reason = next(
            (line for line in lines if re.search("error|fail|unable", line, re.IGNORECASE)), "no reason"
        )
        raise PerfError(f"perf_analyzer ended with status {run.returncode}: {reason}")
    return _read(table, run.stdout, windows, sweep.stability_percent)


def _run(command: list[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as err:
        raise PerfError(
            f"perf_analyzer did not end in {timeout_s} s: measure fewer or smaller frames"
        ) from err


def _read(table: str, output: str, windows: tuple[float, ...], stability_percent: int) -> Measurement:
    row = next(csv.DictReader(table.splitlines()))
    requests = re.search(r"Request count: (\d+)", output)
    fps = mean(windows[1:])
    return Measurement(
        is_stable=all(abs(one - fps) <= stability_percent / 100 * fps for one in windows[1:]),
        fps=round(fps, 3),
        windows_fps=windows,
        latency_ms={name: round(float(row[f"{name} latency"]) / 1000, 2) for name in PERCENTILES},
        requests=int(requests[1]) if requests else 0,
    )
