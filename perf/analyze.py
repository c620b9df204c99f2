"""One run of perf_analyzer: a point in, its figures out."""

from __future__ import annotations

import csv
import logging
import re
import shlex
import subprocess
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from perf.errors import PerfError
from perf.plan import TRANSPORTS, Point, Sweep
from perf.tools import Analyzer

UNSTABLE = "Failed to obtain stable measurement"
ANY_SPREAD_PERCENT = 1000  # the second try takes the windows as they come
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
    latency_ms: dict[str, float]
    requests: int

    def as_dict(self) -> dict[str, Any]:
        """For results files."""
        return {
            "stable": self.is_stable,
            "fps": self.fps,
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
        f"--stability-percentage={sweep.stability_percent}", f"--max-trials={sweep.max_trials}",
        f"--percentile={sweep.percentile}",
    ]  # fmt: skip


def warm_up(analyzer: Analyzer, target: Target, point: Point, timeout_s: int) -> None:
    """A few requests of this size: the server warmed itself up with small frames only."""
    command = ["-m", target.model, "-i", "grpc", "-u", target.grpc_url, "-b", str(point.batch)]
    command += [f"--input-data={target.input_data}", "--concurrency-range=2", "--request-count=4"]
    _run(analyzer.command(command), timeout_s)


def measure(
    analyzer: Analyzer, sweep: Sweep, point: Point, target: Target, rate: float | None, csv_path: Path
) -> Measurement:
    """Run perf_analyzer; where it finds no stable figure, run it again for one that is marked as unstable.

    Raises:
        PerfError: It failed for another reason.
    """
    run = _analyze(analyzer, sweep, point, target, rate, csv_path)
    is_stable = run.returncode == 0
    if not is_stable and UNSTABLE in run.stderr:
        log.info("not stable within %d %%: once more, as it comes", sweep.stability_percent)
        accepting = replace(sweep, stability_percent=ANY_SPREAD_PERCENT, max_trials=3)
        run = _analyze(analyzer, accepting, point, target, rate, csv_path)
    if run.returncode or not csv_path.is_file():
        lines = [line.strip() for line in (run.stderr + run.stdout).splitlines() if line.strip()]
        reason = next(
            (line for line in lines if re.search("error|fail|unable", line, re.IGNORECASE)), "no reason"
        )
        raise PerfError(f"perf_analyzer ended with status {run.returncode}: {reason}")
    return _read(csv_path, run.stdout, is_stable)


def _analyze(
    analyzer: Analyzer, sweep: Sweep, point: Point, target: Target, rate: float | None, csv_path: Path
) -> subprocess.CompletedProcess[str]:
    command = analyzer.command([*arguments(sweep, point, target, rate), "-f", str(csv_path)])
    log.info("%s", shlex.join(command))
    return _run(command, sweep.timeout_s)


def _run(command: list[str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as err:
        raise PerfError(
            f"perf_analyzer did not end in {timeout_s} s: measure fewer or smaller frames"
        ) from err


def _read(path: Path, output: str, is_stable: bool) -> Measurement:
    with path.open(newline="") as lines:
        row = next(csv.DictReader(lines))
    path.unlink()
    requests = re.search(r"Request count: (\d+)", output)
    return Measurement(
        is_stable=is_stable,
        fps=float(row["Inferences/Second"]),
        latency_ms={name: round(float(row[f"{name} latency"]) / 1000, 2) for name in PERCENTILES},
        requests=int(requests[1]) if requests else 0,
    )
