"""``make sweep``: a server for each setting in sweeps.toml, and perf_analyzer at each point."""

from __future__ import annotations

import itertools
import logging
import shlex
import signal
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import click
from annotated_types import MinLen
from pydantic import BaseModel, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from rich.progress import Progress

from deploy.embedded.server import TritonServer
from perf import results
from perf.analyzer import Analyzer, find_analyzer, stages
from perf.clips import Size
from perf.machine import ROOT, Watch, gpu, machine
from perf.results import Command, PerfError, Result, Row, known
from perf.serving import GPU_TARGETS, MODELS, Repository, RunningServer, Serving, repository_of, serve

SWEEPS = Path(__file__).with_name("sweeps.toml")
QUICK = {"sizes": ((32, 48),), "frames": 4, "rounds": 1, "weights": (None,), "batches": (1,)}

Some = MinLen(1)

log = logging.getLogger(__name__)


class Sweep(BaseModel, frozen=True, extra="forbid"):
    """One table of ``sweeps.toml``, which says what the keys mean; a combination of its lists is a point."""

    name: str
    question: str
    sizes: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Some] = ((180, 320),)
    batches: Annotated[tuple[PositiveInt, ...], Some] = (1,)
    concurrencies: Annotated[tuple[PositiveInt, ...], Some] = (4,)
    rates_fps: tuple[PositiveFloat, ...] = ()
    arrivals: Literal["constant", "poisson"] = "constant"
    budget_ms: PositiveInt | None = None
    weights: Annotated[tuple[str | None, ...], Some] = (None,)
    targets: Annotated[tuple[str | None, ...], Some] = (None,)
    queue_delays_us: Annotated[tuple[NonNegativeInt | None, ...], Some] = (None,)
    instances: Annotated[tuple[PositiveInt | None, ...], Some] = (None,)
    transports: Annotated[tuple[Literal["grpc", "system", "cuda"], ...], Some] = ("grpc",)
    frames: PositiveInt = 36
    rounds: PositiveInt = 1
    timeout_s: PositiveInt = 240

    @property
    def needs_gpu(self) -> bool:
        """Whether a machine without a GPU has to leave this sweep out."""
        return bool(GPU_TARGETS & {*self.targets}) or "cuda" in self.transports

    @property
    def servings(self) -> list[Serving]:
        """One server each."""
        settings = (self.weights, self.targets, self.queue_delays_us, self.instances)
        return [Serving(*one) for one in itertools.product(*settings)]

    @property
    def points(self) -> list[Point]:
        """All points; those of one server in a row."""
        loads: list[tuple[int, float | None]] = [(1, rate) for rate in self.rates_fps]
        loads = loads or [(count, None) for count in self.concurrencies]
        places = itertools.product(self.servings, self.sizes, self.batches, self.transports, loads)
        return [
            Point(serving, size, batch, transport, *load) for serving, size, batch, transport, load in places
        ]


@dataclass(frozen=True)
class Point:
    """One place of a sweep."""

    serving: Serving
    size: Size
    batch: int
    transport: str
    concurrency: int
    rate_fps: float | None

    def settings(self) -> Row:
        """For results files."""
        found = {**asdict(self.serving), **asdict(self)}
        return {key: value for key, value in found.items() if key not in ("serving", "batching")}


def load_sweeps(path: Path = SWEEPS) -> dict[str, Sweep]:
    """Name -> sweep, in the order of the file. PerfError: The file is not readable, or a table is wrong."""
    try:
        tables = tomllib.loads(path.read_text())
        return {name: Sweep(name=name, **table) for name, table in tables.items()}
    except ValidationError as err:
        first = err.errors()[0]
        place, found = ".".join(map(str, first["loc"])), first["input"]
        raise PerfError(f"expected a right {place} in {path.name}, found {found!r}: {first['msg']}") from err
    except (OSError, tomllib.TOMLDecodeError) as err:
        raise PerfError(f"expected sweeps in {path}, found: {err}; correct it") from err


def chosen(names: tuple[str, ...], is_running: bool, quick: bool) -> list[Sweep]:
    """The sweeps of these names; without names all that this machine and server allow.

    A GPU gives results names of their own. PerfError: a name is unknown, or needs servers of our own.
    """
    sweeps, has_gpu = load_sweeps(), bool(gpu())
    known(names, sweeps, "sweeps")
    if quick:  # one point of two sweeps: that everything runs, and not how fast
        two = sweeps["concurrency"], sweeps["streams"]
        return [
            one.model_copy(update={**QUICK, "concurrencies": (2,), "rates_fps": one.rates_fps[:1]})
            for one in two
        ]
    fitting = [one for one in sweeps.values() if has_gpu or not one.needs_gpu]
    fitting = [one for one in fitting if not is_running or one.servings == [Serving()]]
    picked = [sweeps[name] for name in names] or fitting
    if is_running and (unfit := [one.name for one in picked if one.servings != [Serving()]]):
        raise PerfError(f"expected sweeps that leave a running server as it is, found {unfit[0]}: omit --url")
    return [one.model_copy(update={"name": one.name + "_gpu" * has_gpu}) for one in picked]


@dataclass
class Runner:
    """Measures one sweep after the other, and keeps on disk what it has, whatever happens."""

    analyzer: Analyzer
    models: Path  # model repository
    out: Path
    progress: Progress
    running: RunningServer | None = None  # measured instead of servers of our own

    def run(self, sweep: Sweep) -> Path:
        """Measure every point in every round; the results file has what was measured, also after an error."""
        rows = {point: {**point.settings(), "rounds": []} for point in sweep.points}
        result = {**self.facts(sweep), "stopped": "interrupted", "rows": list(rows.values())}
        task = self.progress.add_task(sweep.name, total=sweep.rounds * len(rows))
        try:
            for _ in range(sweep.rounds):
                for serving, points in itertools.groupby(rows, key=lambda point: point.serving):
                    source = repository_of(serving, self.models)
                    # Of a running server, its processes cannot be told from others'.
                    own = nullcontext((self.running, None)) if self.running else serve(source, serving)
                    with own as (server, watch):
                        for point in points:
                            self.measure(server, watch, source, sweep, point, rows[point])
                            self.progress.advance(task)
                            results.write(self.out, result)
            result["stopped"] = ""
        except PerfError as err:
            result["stopped"] = str(err)
            raise PerfError(f"sweep {sweep.name} stopped: {err}; {self.out} has what it measured") from err
        finally:
            path = results.write(self.out, result)
        return path

    def facts(self, sweep: Sweep) -> Result:
        """What all points of a sweep share."""
        models = {}
        for serving in sweep.servings if not self.running else ():
            name = " ".join(filter(None, (serving.weights, serving.target))) or "default"
            models[name] = repository_of(serving, self.models).fingerprints()
        return {
            "kind": "sweep", "name": sweep.name, "question": sweep.question,
            "machine": {**machine(), "perf_analyzer": self.analyzer.version},
            "server": self.running.grpc_url if self.running else "embedded", "models": models,
            "committed": Repository(self.models).committed, "arrivals": sweep.arrivals,
            "budget_ms": sweep.budget_ms,
        }  # fmt: skip

    def measure(
        self, server: TritonServer | RunningServer, watch: Watch | None, source: Repository, sweep: Sweep,
        point: Point, row: Row,
    ) -> None:  # fmt: skip
        """Add a round to the row of a point."""
        load = replace(
            source.load(server.grpc_url, point.size), batch=point.batch, concurrency=point.concurrency,
            rate_fps=point.rate_fps, arrivals=sweep.arrivals, transport=point.transport, frames=sweep.frames,
            timeout_s=sweep.timeout_s,
        )  # fmt: skip
        self.analyzer.warm_up(load)
        before = server.metrics()
        if watch:
            watch.lap()
        found = self.analyzer.measure(load)
        found |= watch.lap() if watch else {}
        names = [*(step.model_name for step in source.steps), load.model]
        row["rounds"].append({**found, "stages": stages(before, server.metrics(), names)})
        # For others to paste: their server, `make serve`, listens at Triton's own port.
        pasted = replace(load, url="localhost:8001", input_data=load.input_data.relative_to(ROOT))
        row["command"] = shlex.join(["perf_analyzer", *pasted.arguments()])
        settings = ", ".join(f"{key} {value}" for key, value in point.settings().items() if value is not None)
        log.info("%s: %.2f frames/s, p95 %.0f ms", settings, found["fps"], found["p95_ms"])


@click.command(cls=Command)
@click.argument("names", nargs=-1)
@click.option("--repository", type=click.Path(path_type=Path), default=MODELS)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results; default: perf/results.")
@click.option("--url", help="HOST:PORT of a running server's gRPC, to be measured in place of our own.")
@click.option("--metrics-url", help="HOST:PORT of its metrics; by default port 8002 of the same host.")
@click.option("--quick", is_flag=True, help="Toy sizes, to see that it runs; results go to build/perf/quick.")
def main(
    names: tuple[str, ...], repository: Path, out: Path | None, url: str | None, metrics_url: str | None,
    quick: bool,
) -> None:  # fmt: skip
    """Run the sweeps NAMES of perf/sweeps.toml; without names, all that this machine can run."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    sweeps, failed = chosen(names, url is not None, quick), []
    running = RunningServer(url, metrics_url or f"{url.rpartition(':')[0]}:8002") if url else None
    out = out or (results.QUICK if quick else results.FOLDER)
    with Progress(console=results.console) as progress:
        runner = Runner(find_analyzer(), repository, out, progress, running)
        for sweep in sweeps:
            try:
                log.info("%s", runner.run(sweep))
            except PerfError as err:
                failed.append(sweep.name)
                log.error("Error: %s", err)
    if failed:
        raise PerfError(f"{len(failed)} of {len(sweeps)} sweeps did not end: {', '.join(failed)}; see above")


if __name__ == "__main__":
    main()
