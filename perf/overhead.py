"""``make bench``: file to file through the server, against perf_analyzer and against bare ONNX Runtime.

perf_analyzer sends the same server as many requests at once as the client does, over the same transport,
and throws the answers away. The bare loop runs the same models in its own process, with its frames in
memory. Neither decodes nor encodes. All have the same cores.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import av
import click
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from deploy.embedded.launcher import MALLOC
from deploy.embedded.server import ServerError, TritonServer
from perf import clip, results
from perf.analyze import measure, warm_up
from perf.counters import NO_SESSION, NoiseWatch
from perf.errors import Command, PerfError, one_line
from perf.machine import gpu, machine
from perf.plan import Point, Sweep
from perf.sweep import MODELS, ROOT, WORK, Contract, request_target
from perf.tools import Analyzer, find_analyzer
from perf.variant import ENSEMBLE, Serving, fingerprints, model_file, read_configs

SERVED = "served, file to file"
ANALYZED = "served, as perf_analyzer finds"
APART = ", cores apart"
IN_FLIGHT_PER_INSTANCE = 2  # full batches that the client keeps under way
MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # what mallopt(3) calls the variables
log = logging.getLogger(__name__)


class Chain:
    """The ensemble's steps as plain ONNX Runtime sessions in this process."""

    def __init__(self, repository: Path, threads: int) -> None:
        """Load every composing model with so many threads each."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # As the server does: of three sessions in a row, two would spin on the cores that one works on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        configs = read_configs(repository, None)
        self.steps = configs[ENSEMBLE].ensemble_scheduling.step
        self.sessions = [
            onnxruntime.InferenceSession(
                str(model_file(repository, configs[step.model_name])),
                options,
                providers=[*(["CUDAExecutionProvider"] if gpu() else []), "CPUExecutionProvider"],
            )
            for step in self.steps
        ]

    def __call__(self, tensors: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run one batch through all steps; tensors are named as in the ensemble."""
        values = dict(tensors)
        for step, session in zip(self.steps, self.sessions, strict=True):
            outputs = list(step.output_map)
            inputs = {name: values[source] for name, source in step.input_map.items()}
            for name, value in zip(outputs, session.run(outputs, inputs), strict=True):
                values[step.output_map[name]] = value
        return values


def bare_fps(repository: Path, windows: clip.Frames, batch: int, streams: int, cores: int) -> float:
    """Frames per second of ``streams`` chains side by side, the cores shared between them.

    This process keeps its buffers from one run to the next, as the server does: otherwise serving would look
    the cheaper for it.
    """
    for variable, size in MALLOC.items():
        ctypes.CDLL(None).mallopt(MALLOPT[variable], size)
    name = Contract.of(repository).input_name
    chains = [Chain(repository, max(1, cores // streams)) for _ in range(streams)]
    work = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    for chain in chains:
        chain({name: work[0]})
    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        # Each stream takes every n-th batch.
        list(pool.map(lambda n: [chains[n]({name: b}) for b in work[n::streams]], range(streams)))
    return len(windows) / (time.perf_counter() - started)


def served(server: TritonServer, source: Path, folder: Path) -> dict[str, Any]:
    """What the client says when it is done: frames per second, and seconds at work by stage."""
    command = [sys.executable, str(ROOT / "client/upscale.py"), str(source), str(folder / "upscaled.mp4")]
    command += ["--url", server.grpc_url, "--overwrite", "--json"]
    log.info("%s", shlex.join(command))
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    events = [json.loads(line) for line in run.stdout.splitlines()]
    finished = next((event for event in events if event["event"] == "finished"), None)
    if run.returncode or finished is None:
        raise PerfError(f"client/upscale.py ended with status {run.returncode}: its own words are above")
    return dict(finished)


def in_flight(repository: Path) -> int:
    """Requests that the client keeps under way, as it reads them from the configuration."""
    configs = read_configs(repository, None)
    stage = configs[configs[ENSEMBLE].ensemble_scheduling.step[0].model_name]
    instances = sum(group.count for group in stage.instance_group)
    return IN_FLIGHT_PER_INSTANCE * stage.max_batch_size * instances


def analyzed_fps(
    analyzer: Analyzer, server: TritonServer, repository: Path, size: clip.Size, frames: int
) -> float:
    """Frames per second that perf_analyzer gets from the server."""
    WORK.mkdir(parents=True, exist_ok=True)
    sweep = Sweep("overhead", "", frames=frames)
    point = Point(Serving(), size, 1, in_flight(repository), "system")
    target = request_target(server, point, Contract.of(repository), WORK)
    warm_up(analyzer, target, point, sweep.timeout_s)
    return measure(analyzer, sweep, point, target, None).fps


def write_clip(path: Path, frames: clip.Frames) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as H.264 of a good quality."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep this process, and what it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@click.command(cls=Command)
@click.option("--size", nargs=2, default=(180, 320), help="Lr height and width.")
@click.option(
    "--frames", default=120, help="Frames of the clip, at most 130; file to file it runs there and back."
)
@click.option("--rounds", default=3, help="Each side is measured so often, in turns; the median counts.")
@click.option("--repository", type=click.Path(path_type=Path), default=MODELS)
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder of the results.")
def main(size: tuple[int, int], frames: int, rounds: int, repository: Path, out: Path) -> None:
    """Measure what serving costs, on a clip of real frames."""
    analyzer = find_analyzer()
    facts = {"machine": machine(), "models": {"default": fingerprints(repository, None)}}
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    places = {"": (cores, cores)} | ({APART: (cores[:half], cores[half:])} if half and not gpu() else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lr = clip.read_frames(frames, size)
        write_clip(folder / "lr.mp4", np.concatenate((lr, lr[::-1])))
        windows = clip.windows(lr, Contract.of(repository).window)
        fps: dict[str, list[float]] = {}
        client: dict[str, Any] = {}
        others_cores: dict[str, float] = {}

        def note(name: str, watch: NoiseWatch, value: float) -> None:
            """A round; of what others did, the most of all rounds."""
            others_cores[name] = max(others_cores.get(name, 0.0), watch.others_cores() or 0.0)
            fps.setdefault(name, []).append(value)
            log.info("%-45s %.2f fps", name, value)

        for _ in range(rounds):
            for batch, streams in ((1, 1), (1, 2), (4, 2)):
                watch = NoiseWatch(NO_SESSION)
                bare = bare_fps(repository, windows, batch, streams, len(cores))
                note(f"bare, batch {batch}, {streams} stream{'s' * (streams > 1)}", watch, bare)
            for place, (servers, clients) in places.items():
                try:
                    with (
                        on_cores(servers),
                        TritonServer(repository, folder / "triton.log") as server,
                        on_cores(clients),
                    ):
                        watch = NoiseWatch(server.process.pid)
                        analyzed = analyzed_fps(analyzer, server, repository, size, frames // 2)
                        note(ANALYZED + place, watch, analyzed)
                        watch = NoiseWatch(server.process.pid)
                        finished = served(server, folder / "lr.mp4", folder)
                        note(SERVED + place, watch, finished["fps"])
                except ServerError as err:
                    raise PerfError(one_line(err)) from err
                client[place] = finished["stages_s"]
    bare_loops = {name: median(values) for name, values in fps.items() if name.startswith("bare")}
    best = max(bare_loops, key=lambda name: bare_loops[name])
    over_analyzed = {place: median(fps[SERVED + place]) / median(fps[ANALYZED + place]) for place in places}
    result = {
        "kind": "overhead",
        "name": "overhead_gpu" if gpu() else "overhead",
        **facts,
        "size": list(size),
        "frames": 2 * len(lr),
        "encoder": "H.264, the client's default",
        "fps": fps,
        "others_cores": others_cores,
        "best_bare": best,
        "served_over_best_bare": median(fps[SERVED]) / bare_loops[best],
        "served_over_analyzed": over_analyzed[""],
        "served_over_analyzed_apart": over_analyzed.get(APART),
        "client_stages_s": client[""],
    }
    path = results.write(out, result)
    shares = ", ".join(f"{100 * share:.0f} %{place}" for place, share in over_analyzed.items())
    log.info("%s: file to file %s of what perf_analyzer gets", path, shares)


if __name__ == "__main__":
    main()
