"""``make sweep``: serves the models, lets perf_analyzer measure every point, and writes what it found."""

from __future__ import annotations

import logging
import shlex
import signal
import tempfile
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
from perf.ladder.memory import gpu_memory_mb
from perf.machine import gpu, machine
from perf.plan import Point, Sweep, changes_server, load_sweep, needs_gpu, points, sweep_names
from perf.points import GENERATOR
from perf.progress import Progress, total_weight, weight
from perf.running import RunningServer
from perf.tools import Analyzer, find_analyzer
from perf.variant import ENSEMBLE, Serving, fingerprints, read_configs, stage_names, write_variant

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "model_repository"
WORK = ROOT / "build" / "perf"  # kept, so that a command pasted later finds its frames
EMBEDDED = "embedded"
WINDOWS = 8  # different requests of one input file, sent in turns

Server = TritonServer | RunningServer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What all sweeps of a run share."""

    analyzer: Analyzer
    repository: Path
    out: Path
    """Folder of the results."""
    work: Path
    running: RunningServer | None = None
    """Measured instead of servers of our own."""


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

    def __init__(self, sweep: Sweep, bench: Bench, progress: Progress) -> None:
        self.sweep, self.bench, self.progress = sweep, bench, progress
        repository = bench.repository
        self.contract = Contract.of(repository)
        self.stages = stage_names(read_configs(repository, None))
        self.rows: dict[Point, dict[str, Any]] = {}
        self.saturation: dict[Point, float] = {}
        self.facts = {
            "kind": "sweep",
            "name": sweep.name,
            "question": sweep.question,
            "machine": {**machine(), "perf_analyzer": bench.analyzer.version},
            "server": bench.running.grpc_url if bench.running else EMBEDDED,
            "models": {}
            if bench.running
            else {
                target or "default": fingerprints(repository, target) for target in sweep.targets or (None,)
            },
            "committed": committed(repository),
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
            kept = f"{self.bench.out / self.sweep.name}.json has the {len(self.rows)} points until then"
            raise PerfError(f"sweep {self.sweep.name} stopped: {stopped}; {kept}") from err
        finally:
            path = self.save(stopped)
        return path

    def save(self, stopped: str) -> Path:
        """Write everything measured so far."""
        return results.write(
            self.bench.out, {**self.facts, "stopped": stopped, "points": list(self.rows.values())}
        )

    @contextmanager
    def serve(self, serving: Serving) -> Iterator[Server]:
        """The embedded server with these settings, on a copy of the configurations; or the running one."""
        if self.bench.running:
            yield self.bench.running
            return
        with tempfile.TemporaryDirectory(dir=self.bench.work) as folder:
            models = Path(folder) / "models"
            models.mkdir()
            write_variant(self.bench.repository, models, serving)
            with TritonServer(models, Path(folder) / "triton.log") as server:
                yield server

    def measure_all(self, server: Server, members: list[Point]) -> None:
        """Measure the points of one server."""
        warm = set()
        for point in members:
            target = request_target(server, point, self.contract, self.bench.work)
            try:
                if (point.size, point.batch) not in warm:
                    warm_up(self.bench.analyzer, target, point, self.sweep.timeout_s)
                    warm.add((point.size, point.batch))
                self.measure(server, point, target)
            except PerfError as err:
                if server.ready() or isinstance(server, RunningServer):
                    raise
                status = server.process.poll()
                raise ServerError(
                    f"tritonserver no longer answers (exit status {status}): {server.log_tail()}"
                ) from err

    def measure(self, server: Server, point: Point, target: Target) -> None:
        """Measure one point, and ask the server for its own view of it."""
        rate = None if point.load is None else point.load * self.saturation[replace(point, load=None)]
        # Of a server that others started, neither memory nor work can be told from that of other programs.
        session = None if isinstance(server, RunningServer) else server.process.pid
        before = counters.parse(server.metrics())
        watch = counters.NoiseWatch(session)
        found = measure(self.bench.analyzer, self.sweep, point, target, rate)
        others_cores = watch.others_cores()
        after = counters.parse(server.metrics())
        if rate is None:
            # The first round's counts for all: a point must be the same in every round.
            self.saturation.setdefault(point, found.fps / point.batch)
        stages = counters.stages(before, after, [*self.stages, point.serving.model])
        memory = None if session is None else counters.session_memory_mb(session)
        report(point, found, others_cores)
        # For others to paste: their server, `make serve`, listens at Triton's own port.
        pasted = replace(target, grpc_url="localhost:8001", input_data=target.input_data.relative_to(ROOT))
        command = shlex.join(["perf_analyzer", *arguments(self.sweep, point, pasted, rate)])
        row = self.rows.setdefault(point, {**point.as_dict(), "rate": rate, "command": command, "rounds": []})
        row["rounds"].append(
            {
                **found.as_dict(),
                "stages": stages,
                "server_memory_mb": memory,
                "gpu_memory_mb": gpu_memory_mb(),
                "others_cores": others_cores,
            }
        )
        self.save("running")
        log.info("  %s", self.progress.step(weight(self.sweep, point)))


def request_target(server: Server, point: Point, contract: Contract, work: Path) -> Target:
    """Where a point's requests go, and the file of real frames that they carry, written once."""
    height, width = clip.padded(point.size, contract.multiple_of)
    path = work / f"windows_{height}x{width}.json"
    if not path.exists():
        frames = clip.read_frames(WINDOWS, (height, width))
        clip.write_input_data(path, contract.input_name, clip.windows(frames, contract.window))
    answer = height * width * contract.scale**2 * 3  # RGB bytes
    return Target(server.grpc_url, point.serving.model, path, answer)


def report(point: Point, found: Measurement, others_cores: float | None) -> None:
    """One line for whoever watches."""
    settings = ", ".join(f"{key} {value}" for key, value in point.as_dict().items() if value is not None)
    mark = "" if found.is_stable else "  UNSTABLE"
    others = "" if others_cores is None else f", others {others_cores:.2f} cores"
    log.info("%s: %.2f fps, p95 %.0f ms%s%s", settings, found.fps, found.latency_ms["p95"], others, mark)


def committed(repository: Path) -> dict[str, int]:
    """Queue delay and instance groups of the slowest stage, as its configuration has them."""
    config = read_configs(repository, None)[GENERATOR]
    return {
        "queue_delay_us": config.dynamic_batching.max_queue_delay_microseconds,
        "instances": sum(group.count for group in config.instance_group),
    }


def chosen_sweeps(names: tuple[str, ...], target: str | None, is_running: bool) -> list[Sweep]:
    """The sweeps of these names; without names all that this machine and server allow.

    Raises:
        PerfError: There is none of such a name, or it changes the settings of a server that is not ours.
    """
    has_gpu = bool(gpu())
    sweeps = [load_sweep(name) for name in names or sweep_names()]
    if not names:
        sweeps = [one for one in sweeps if has_gpu or not needs_gpu(one)]
        sweeps = [one for one in sweeps if not (is_running and changes_server(one))]
    for one in sweeps:
        if is_running and changes_server(one):
            raise PerfError(
                f"expected a sweep that leaves a running server as it is, found {one.name}: leave --url out"
            )
    if target:
        # Names of their own: the report shows both, and neither overwrites the other.
        return [replace(one, name=f"{one.name}_{target}", targets=(target,)) for one in sweeps]
    return [replace(one, name=one.name + "_gpu" * has_gpu) for one in sweeps]


@click.command(cls=Command)
@click.argument("names", nargs=-1)
@click.option("--target", help="Configurations to serve, <model>/configs/TARGET.pbtxt.")
@click.option("--repository", type=click.Path(path_type=Path), default=MODELS)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder of the results.")
@click.option("--url", help="HOST:PORT of a running server's gRPC, to be measured in place of our own.")
@click.option("--metrics-url", help="HOST:PORT of its metrics; by default port 8002 of the same host.")
def main(
    names: tuple[str, ...], target: str | None, repository: Path, out: Path, url: str | None,
    metrics_url: str | None,
) -> None:  # fmt: skip
    """Run the sweeps NAMES of perf/sweeps.toml; without names, all that this machine can run."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    sweeps = chosen_sweeps(names, target, url is not None)
    running = RunningServer(url, metrics_url or f"{url.rpartition(':')[0]}:8002") if url else None
    bench = Bench(find_analyzer(), repository, out, WORK, running)
    WORK.mkdir(parents=True, exist_ok=True)
    progress = Progress(total_weight(sweeps))
    failed = []
    for sweep in sweeps:
        done = progress.done
        try:
            log.info("%s", Sweeper(sweep, bench, progress).run())
        except PerfError as err:
            failed.append(sweep.name)
            click.echo(f"Error: {err}", err=True)
            progress.total -= total_weight([sweep]) - (progress.done - done)  # what it leaves out
    if failed:
        raise PerfError(f"{len(failed)} of {len(sweeps)} sweeps did not end: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
