"""``make sweep``: serves the models, lets perf_analyzer measure every point, and writes what it found."""

from __future__ import annotations

import logging
import shlex
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from deploy.embedded.server import ServerError, TritonServer
from perf import clip, counters, results
from perf.analyze import Measurement, Target, arguments, measure, warm_up
from perf.errors import Command, PerfError, one_line
from perf.machine import machine
from perf.plan import Point, Sweep, load_sweep, needs_gpu, points, sweep_names
from perf.tools import Analyzer, find_analyzer
from perf.variant import ENSEMBLE, Serving, fingerprints, read_configs, stage_names, write_variant

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "model_repository"
WORK = ROOT / "build" / "perf"  # kept, so that a command pasted later finds its frames
WINDOWS = 8  # different requests of one input file, sent in turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contract:
    """What the ensemble publishes, and its tensor's name."""

    input_name: str
    window: int
    scale: int
    multiple_of: int

    @classmethod
    def of(cls, repository: Path) -> Contract:
        """Read it from the repository's configuration."""
        config = read_configs(repository, None)[ENSEMBLE]
        numbers = {key: config.parameters[key].string_value for key in ("window", "scale", "multiple_of")}
        return cls(config.input[0].name, **{key: int(text) for key, text in numbers.items()})


class Sweeper:
    """Runs one sweep and keeps what it has measured on disk, whatever happens."""

    def __init__(self, sweep: Sweep, analyzer: Analyzer, repository: Path, out: Path, work: Path) -> None:
        self.sweep, self.analyzer, self.repository, self.out, self.work = (
            sweep,
            analyzer,
            repository,
            out,
            work,
        )
        self.contract = Contract.of(repository)
        self.stages = stage_names(read_configs(repository, None))
        self.rows: dict[Point, dict[str, Any]] = {}
        self.saturation: dict[Point, float] = {}
        self.facts = {
            "kind": "sweep",
            "name": sweep.name,
            "question": sweep.question,
            "machine": {**machine(), "perf_analyzer": analyzer.version},
            "models": {
                target or "default": fingerprints(repository, target) for target in sweep.targets or (None,)
            },
            "percentile": sweep.percentile,
            "window_frames": sweep.frames,
        }

    def run(self) -> Path:
        """Measure every point in every round; returns the results file.

        Raises:
            PerfError: perf_analyzer failed or the server ended; the file has all points until then.
        """
        stopped = "interrupted"
        try:
            for _ in range(self.sweep.rounds):
                for serving, members in groupby(points(self.sweep), key=lambda point: point.serving):
                    with self.serve(serving) as server:
                        self.measure_all(server, list(members))
            stopped = ""
        except (PerfError, ServerError) as err:
            stopped = one_line(err)
            kept = f"{self.out / self.sweep.name}.json has the {len(self.rows)} points until then"
            raise PerfError(f"sweep {self.sweep.name} stopped: {stopped}; {kept}") from err
        finally:
            path = self.save(stopped)
        return path

    def save(self, stopped: str) -> Path:
        """Write everything measured so far."""
        return results.write(self.out, {**self.facts, "stopped": stopped, "points": list(self.rows.values())})

    @contextmanager
    def serve(self, serving: Serving) -> Iterator[TritonServer]:
        """The embedded server with these settings, on a copy of the configurations."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            models = Path(folder) / "models"
            models.mkdir()
            write_variant(self.repository, models, serving)
            with TritonServer(models, Path(folder) / "triton.log") as server:
                yield server

    def measure_all(self, server: TritonServer, members: list[Point]) -> None:
        """Measure the points of one server."""
        warm = set()
        for point in members:
            target = request_target(server, point, self.contract, self.work)
            try:
                if (point.size, point.batch) not in warm:
                    warm_up(self.analyzer, target, point, self.sweep.timeout_s)
                    warm.add((point.size, point.batch))
                self.measure(server, point, target)
            except PerfError as err:
                if server.ready():
                    raise
                status = server.process.poll()
                raise ServerError(
                    f"tritonserver no longer answers (exit status {status}): {server.log_tail()}"
                ) from err

    def measure(self, server: TritonServer, point: Point, target: Target) -> None:
        """Measure one point, and ask the server for its own view of it."""
        rate = None if point.load is None else point.load * self.saturation[replace(point, load=None)]
        before = counters.parse(server.metrics())
        noise_s, started_s = counters.others_cpu_s(server.process.pid), time.monotonic()
        found = measure(self.analyzer, self.sweep, point, target, rate, self.work / "latency.csv")
        after = counters.parse(server.metrics())
        noise_s = counters.others_cpu_s(server.process.pid) - noise_s
        others_cores = max(0.0, round(noise_s / (time.monotonic() - started_s), 2))
        if rate is None:
            # The first round's counts for all: a point must be the same in every round.
            self.saturation.setdefault(point, found.fps / point.batch)
        stages = counters.stages(before, after, [*self.stages, point.serving.model])
        memory = counters.session_memory_mb(server.process.pid)
        report(point, found, others_cores)
        # For others to paste: their server, `make serve`, listens at Triton's own port.
        pasted = replace(target, grpc_url="localhost:8001", input_data=target.input_data.relative_to(ROOT))
        command = shlex.join(["perf_analyzer", *arguments(self.sweep, point, pasted, rate)])
        row = self.rows.setdefault(point, {**point.as_dict(), "rate": rate, "command": command, "rounds": []})
        row["rounds"].append(
            {**found.as_dict(), "stages": stages, "server_memory_mb": memory, "others_cores": others_cores}
        )
        self.save("running")


def request_target(server: TritonServer, point: Point, contract: Contract, work: Path) -> Target:
    """Where a point's requests go, and the file of real frames that they carry, written once."""
    height, width = clip.padded(point.size, contract.multiple_of)
    path = work / f"windows_{height}x{width}.json"
    if not path.exists():
        frames = clip.read_frames(WINDOWS, (height, width))
        clip.write_input_data(path, contract.input_name, clip.windows(frames, contract.window))
    answer = height * width * contract.scale**2 * 3  # RGB bytes
    return Target(server.grpc_url, point.serving.model, path, answer)


def report(point: Point, found: Measurement, others_cores: float) -> None:
    """One line for whoever watches."""
    settings = ", ".join(f"{key} {value}" for key, value in point.as_dict().items() if value is not None)
    mark = "" if found.is_stable else "  UNSTABLE"
    p95 = found.latency_ms["p95"]
    log.info("%s: %.2f fps, p95 %.0f ms, others %.2f cores%s", settings, found.fps, p95, others_cores, mark)


@click.command(cls=Command)
@click.argument("names", nargs=-1)
@click.option("--target", help="Configurations to serve, <model>/configs/TARGET.pbtxt.")
@click.option("--repository", type=click.Path(path_type=Path), default=MODELS)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder of the results.")
def main(names: tuple[str, ...], target: str | None, repository: Path, out: Path) -> None:
    """Run the sweeps NAMES of perf/sweeps.toml; without names, all that need no GPU."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    sweeps = [load_sweep(name) for name in names or sweep_names()]
    if not names:
        sweeps = [sweep for sweep in sweeps if not needs_gpu(sweep)]
    if target:
        # A name of its own: the report shows both, and neither overwrites the other.
        sweeps = [replace(one, name=f"{one.name}_{target}", targets=(target,)) for one in sweeps]
    analyzer = find_analyzer()
    WORK.mkdir(parents=True, exist_ok=True)
    for sweep in sweeps:
        log.info("%s", Sweeper(sweep, analyzer, repository, out, WORK).run())


if __name__ == "__main__":
    main()
