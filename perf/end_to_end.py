"""``make bench``: file to file through server and client, beside perf_analyzer and bare ONNX Runtime.

perf_analyzer sends the same server as many requests at once as the client does, over the same transport. The
bare loop runs the same models in its own process. Neither decodes nor encodes. All are measured in turns.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import click
import numpy as np
import onnxruntime
from rich.progress import track

from deploy.embedded.launcher import MALLOC
from perf import clips, results
from perf.analyzer import find_analyzer
from perf.clips import Frames, Size
from perf.machine import ROOT, Watch, gpu, machine
from perf.results import Command, PerfError, Row
from perf.serving import MODELS, Repository, Serving, serve

BARE = ((1, 1), (1, 2), (4, 2))  # batch, streams side by side
ANALYZED, SERVED = "perf_analyzer", "file to file"
FRAMES = 120  # of the clip; file to file they run there and back
IN_FLIGHT_PER_INSTANCE = 2  # full batches that the client keeps under way
MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # what mallopt(3) calls the variables

log = logging.getLogger(__name__)


def chain(source: Repository, threads: int) -> Callable[[Frames], Frames]:
    """The ensemble's steps as plain ONNX Runtime sessions in this process: windows in, frames out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # As the server does: of three sessions in a row, two would spin on the cores that one works on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = [*(["CUDAExecutionProvider"] if gpu() else []), "CPUExecutionProvider"]
    sessions = [
        onnxruntime.InferenceSession(str(path), options, providers) for path in source.files().values()
    ]

    def run(windows: Frames) -> Frames:
        values: dict[str, Any] = {source.input_name: windows}  # tensors are named as in the ensemble
        for step, session in zip(source.steps, sessions, strict=True):
            outputs = list(step.output_map)
            inputs = {name: values[tensor] for name, tensor in step.input_map.items()}
            for name, value in zip(outputs, session.run(outputs, inputs), strict=True):
                values[step.output_map[name]] = value
        frames: Frames = values[source.output_name]
        return frames

    return run


def bare_fps(source: Repository, windows: Frames, batch: int, streams: int) -> float:
    """Frames per second of ``streams`` chains side by side, which share the cores and keep their buffers."""
    for variable, size in MALLOC.items():  # as the server has it
        ctypes.CDLL(None).mallopt(MALLOPT[variable], size)
    chains = [chain(source, max(1, len(os.sched_getaffinity(0)) // streams)) for _ in range(streams)]
    work = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    for run in chains:
        run(work[0])
    started = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        # Each stream takes every n-th batch.
        list(pool.map(lambda n: [chains[n](one) for one in work[n::streams]], range(streams)))
    return len(windows) / (time.perf_counter() - started)


def file_to_file(url: str, source: Path, folder: Path) -> Row:
    """What the client says when it is done: frames per second, and seconds at work by stage."""
    command = [sys.executable, str(ROOT / "client/upscale.py"), str(source), str(folder / "upscaled.mp4")]
    command += ["--url", url, "--overwrite", "--json"]
    log.debug("%s", shlex.join(command))
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    events = [json.loads(line) for line in run.stdout.splitlines()]
    finished = next((event for event in events if event["event"] == "finished"), None)
    if run.returncode or finished is None:
        raise PerfError(f"client/upscale.py ended with status {run.returncode}: its own words are above")
    return {"fps": finished["fps"], "client_stages_s": finished["stages_s"]}


def write_clip(path: Path, frames: Frames) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as H.264 of a good quality."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def one_round(source: Repository, lr: Frames, clip: Path) -> Iterator[tuple[str, Row]]:
    """Every side once: its name and its figures; ``clip`` has (T, H, W, 3) uint8 ``lr`` there and back."""
    analyzer, windows = find_analyzer(), clips.windows(lr, source.window)
    for batch, streams in BARE:
        with Watch() as watch:
            fps = bare_fps(source, windows, batch, streams)
            name = f"bare, batch {batch}, {streams} stream{'s' * (streams > 1)}"
            yield name, {"fps": fps, "others_cores": watch.lap()["others_cores"]}
    in_flight = IN_FLIGHT_PER_INSTANCE * source.committed["max_batch_size"] * source.committed["instances"]
    with serve(source, Serving()) as (server, watch):
        load = source.load(server.grpc_url, (lr.shape[1], lr.shape[2]))
        load = replace(load, concurrency=in_flight, transport="system", frames=len(lr) // 2)
        analyzer.warm_up(load)
        watch.lap()
        yield ANALYZED, {**analyzer.measure(load), **watch.lap()}
        yield SERVED, {**file_to_file(server.grpc_url, clip, clip.parent), **watch.lap()}


@click.command(cls=Command)
@click.option("--size", nargs=2, type=int, default=(180, 320), help="Lr height and width.")
@click.option("--rounds", default=3, help="Each side is measured so often, in turns.")
@click.option("--repository", type=click.Path(path_type=Path), default=MODELS)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results; default: perf/results.")
@click.option("--quick", is_flag=True, help="Toy sizes, to see that it runs; results go to build/perf/quick.")
def main(size: Size, rounds: int, repository: Path, out: Path | None, quick: bool) -> None:
    """Measure what serving costs, on a clip of real frames."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    find_analyzer()
    size, frames, rounds = ((32, 48), 8, 1) if quick else (size, FRAMES, rounds)
    source, rows = Repository(repository), dict[str, Row]()
    lr = clips.read_frames(frames, size)
    result: dict[str, Any] = {
        "kind": "end_to_end", "name": "end_to_end_gpu" if gpu() else "end_to_end", "machine": machine(),
        "models": {"default": source.fingerprints()}, "size": list(size), "frames": 2 * frames,
        "encoder": "H.264, the client's default",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "lr.mp4"
        write_clip(clip, np.concatenate((lr, lr[::-1])))
        for _ in track(range(rounds), "file to file", console=results.console):
            for name, found in one_round(source, lr, clip):
                rows.setdefault(name, {"name": name, "rounds": []})["rounds"].append(found)
                log.info("%s: %.2f frames/s", name, found["fps"])
    out = out or (results.QUICK if quick else results.FOLDER)
    log.info("%s", results.write(out, {**result, "rows": list(rows.values())}))


if __name__ == "__main__":
    main()
