"""perf_analyzer: getting one that runs here, its arguments, and its figures beside the server's own counters.

PyPI's perf-analyzer needs glibc 2.38. The binary of Triton's client 2.51.0 runs from glibc 2.35 on, as the
embedded server does, and the two libraries that it lacks on most machines are in that server's wheel.
"""

from __future__ import annotations

import csv
import logging
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import mean

import click
from prometheus_client.parser import text_string_to_metric_families

from perf.results import Command, PerfError, Row

FOLDER = Path(sys.prefix) / "perf_analyzer"
REQUIREMENT = "tritonclient==2.51.0"  # the Triton of nvidia-pytriton 0.7.0
PLATFORM = "manylinux1_x86_64"  # the wheel for any platform has no binary
BINARY = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
LIBRARIES = ("libb64.so.0d", "libcudart.so.12")
WINDOWS = 3  # its percentiles are over the last three windows, and it ends with these
ANY_SPREAD_PERCENT = 1000  # it would throw away what is not stable; we keep and mark it
STABLE_PERCENT = 10
PERCENTILES = (50, 90, 95, 99)
PHASES = {"queue": "queue", "input": "compute_input", "infer": "compute_infer", "output": "compute_output"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """What perf_analyzer sends, where, and for how long."""

    url: str  # host:port of the server's gRPC
    model: str
    input_data: Path
    output_bytes: int  # of one frame; perf_analyzer multiplies it by the batch, and its default holds 100 KB
    batch: int = 1  # windows per request
    concurrency: int = 1  # requests in flight, where no rate is given
    rate_fps: float | None = None  # windows per second to send, whether answers come or not
    arrivals: str = "constant"  # of a rate: constant or poisson
    transport: str = "grpc"  # or shared memory: system, cuda
    frames: int = 36  # in each of the three windows, at least
    timeout_s: int = 240

    def arguments(self) -> list[str]:
        """perf_analyzer's; no ``--profile-export-file``, which would write every frame as JSON numbers."""
        if self.rate_fps is None:
            load = [f"--concurrency-range={self.concurrency}"]
        else:
            rate = self.rate_fps / self.batch
            load = [f"--request-rate-range={rate:.4g}", f"--request-distribution={self.arrivals}"]
        if self.transport != "grpc":
            load += [f"--shared-memory={self.transport}", f"--output-shared-memory-size={self.output_bytes}"]
        requests = max(ceil(self.frames / self.batch), self.concurrency)
        load += ["--measurement-mode=count_windows", f"--measurement-request-count={requests}"]
        load += [f"--stability-percentage={ANY_SPREAD_PERCENT}", f"--max-trials={2 * WINDOWS}"]
        return [*self.target(), *load, "--percentile=95", "-v"]

    def target(self) -> list[str]:
        """The arguments that say where to send what."""
        place = ["-m", self.model, "-i", "grpc", "-u", self.url, "-b", str(self.batch)]
        return [*place, f"--input-data={self.input_data}"]


@dataclass(frozen=True)
class Analyzer:
    """A perf_analyzer that answered."""

    path: Path
    libraries: Path
    version: str = ""

    def run(self, arguments: list[str], timeout_s: int = 60) -> subprocess.CompletedProcess[str]:
        """Run it. PerfError: It took too long."""
        command = ["env", f"LD_LIBRARY_PATH={self.libraries}", str(self.path), *arguments]
        log.debug("%s", shlex.join(command))
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as err:
            advice = "measure fewer or smaller frames"
            raise PerfError(f"perf_analyzer did not end in {timeout_s} s: {advice}") from err

    def warm_up(self, load: Load) -> None:
        """Send a few requests of this size: the server warmed itself up with small frames only."""
        self.run([*load.target(), "--concurrency-range=2", "--request-count=4"], load.timeout_s)

    def measure(self, load: Load) -> Row:
        """One measurement of three windows, however much they differ.

        Returns, unless it fails or takes too long, which is a PerfError:
            ``fps`` over the windows after the first, in which requests in flight build up, ``windows_fps``,
            ``stable``, and of all windows ``requests`` and their latency percentiles ``p50_ms``, ``p90_ms``..

        """
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "latency.csv"
            run = self.run([*load.arguments(), "-f", str(table)], load.timeout_s)
            text = table.read_text() if table.is_file() else ""
        passes = re.findall(r"Pass \[\d+\] throughput: (\S+) infer/sec", run.stdout)
        windows = [float(one) for one in passes][-WINDOWS:]
        if run.returncode or not text or len(windows) < WINDOWS:
            words = re.compile("error|fail|unable", re.IGNORECASE)
            reason = next(filter(words.search, (run.stderr + run.stdout).splitlines()), "it gave no reason")
            raise PerfError(f"perf_analyzer ended with status {run.returncode}: {reason.strip()}")
        fps, row = mean(windows[1:]), next(csv.DictReader(text.splitlines()))
        requests = re.search(r"Request count: (\d+)", run.stdout)
        return {
            "fps": round(fps, 3),
            "windows_fps": windows,
            "stable": all(abs(one - fps) <= STABLE_PERCENT / 100 * fps for one in windows[1:]),
            "requests": int(requests[1]) if requests else 0,
            **{f"p{n}_ms": round(float(row[f"p{n} latency"]) / 1000, 2) for n in PERCENTILES},
        }


def stages(before: str, after: str, models: Iterable[str]) -> dict[str, dict[str, float]]:
    """From the server's metrics at two times: mean batch, and mean milliseconds of a request in each phase.

    ``nv_inference_exec_count`` counts runs of a model, so windows over runs is the batch that was achieved.
    """
    found, delta = {}, _counters(after)
    delta.subtract(_counters(before))
    for model in models:
        requests, runs = delta[model, "request_success"], delta[model, "exec_count"]
        if requests and runs:
            times = {name: delta[model, f"{phase}_duration_us"] for name, phase in PHASES.items()}
            means = {f"{name}_ms": round(time / requests / 1000, 3) for name, time in times.items()}
            found[model] = {**means, "batch": round(delta[model, "count"] / runs, 3)}
    return found


def _counters(metrics: str) -> Counter[tuple[str, str]]:
    """(model, counter) -> value; versions of a model are added up."""
    found: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name.startswith("nv_inference_") and "model" in sample.labels:
                name = sample.name.removeprefix("nv_inference_").removesuffix("_total")  # the parser's suffix
                found[sample.labels["model"], name] += sample.value  # type: ignore[assignment]  # counts are floats here
    return found


def find_analyzer(folder: Path = FOLDER) -> Analyzer:
    """The installed perf_analyzer. PerfError: There is none, or it does not run."""
    analyzer = Analyzer(folder / "bin/perf_analyzer", folder / "lib")
    if not analyzer.path.is_file():
        raise PerfError(f"expected perf_analyzer at {analyzer.path}, found none: run `make perf-tools`")
    run = analyzer.run(["--version"])
    if run.returncode:
        reason = run.stderr.strip().partition("\n")[0] or f"exit status {run.returncode}"
        raise PerfError(
            f"expected {analyzer.path} to run, found: {reason}; run `make perf-tools` again, or install the "
            "library that it misses (on Debian and Ubuntu libssl3 and zlib1g)"
        )
    version = re.search(r"Version (\S+)", run.stdout + run.stderr)
    return Analyzer(analyzer.path, analyzer.libraries, version[1] if version else "unknown")


def install(folder: Path = FOLDER) -> None:
    """Put perf_analyzer and links to the server's libraries into the folder. PerfError: one cannot be had."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "lib").mkdir(exist_ok=True)
    for name in LIBRARIES:  # auditwheel put a hash into their names
        pattern = "nvidia_pytriton.libs/{}-*.so.{}*".format(*name.split(".so."))
        bundled = [path for place in sys.path for path in Path(place).glob(pattern)]
        if not bundled:
            raise PerfError(f"expected {name} in the package nvidia-pytriton, found none: run `make setup`")
        (folder / "lib" / name).unlink(missing_ok=True)
        (folder / "lib" / name).symlink_to(bundled[0])
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--platform={PLATFORM}", f"--dest={temporary}", REQUIREMENT]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise PerfError(f"pip cannot get {REQUIREMENT} ({reason}): check the package index")
        (folder / "bin/perf_analyzer").write_bytes(zipfile.ZipFile(wheels[0]).read(BINARY))
        (folder / "bin/perf_analyzer").chmod(0o755)


@click.command(cls=Command)
def main() -> None:
    """Install perf_analyzer into this environment, unless it is there."""
    try:
        analyzer = find_analyzer()
    except PerfError:
        install()
        analyzer = find_analyzer()
    log.info("perf_analyzer %s: %s", analyzer.version, analyzer.path)


if __name__ == "__main__":
    main()
