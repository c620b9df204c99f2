"""``make ladder``: the precision ladder, from the baseline in eager PyTorch to the fastest that is served.

The baseline is measured again before every round of every row, so that a ratio is one of neighbors in time.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.progress import track

from export.checkpoint import load_checkpoint
from export.data.evaluation_clips import EvaluationClip, Source, find_sources, load_evaluation_clip
from export.errors import ExportError
from export.metrics.psnr_ssim import psnr_y, ssim_y
from export.metrics.tof import flows, tof
from export.network import MstGan
from export.spec import MULTIPLE_OF, SCALE, WINDOW
from mst_gan_client import UpscaleError, Upscaler
from perf import clips, results
from perf.analyzer import find_analyzer
from perf.clips import Frames, Size, default_clip
from perf.machine import Watch, gpu, machine
from perf.network import Network, in_process
from perf.results import Command, PerfError, Row, known
from perf.serving import GPU_TARGETS, MODELS, WORK, Serving, checkpoint, repository_of, serve

STEPS = {
    key: {"key": key, **step}
    for key, step in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()
}
QUICK = {"key": "quick", "name": "as exported", "weights": None, "target": None}
BASELINE = "baseline-eager"
TOF_FRAMES = 6  # the flow of five pairs takes as long as all other scores

log = logging.getLogger(__name__)


def read_clips(folder: Path | None, frames: int) -> list[EvaluationClip]:
    """The middle of a folder's clips, as `python -m export evaluate` reads them, or of the default clip."""
    try:
        sources = find_sources(folder) if folder else [Source("bikes.mp4", default_clip(), None)]
        clips = [load_evaluation_clip(one, WORK / "clips", frames=frames, min_side=64) for one in sources]
    except ExportError as err:
        raise PerfError(str(err)) from err
    if short := [one.name for one in clips if len(one.lr) < frames]:
        raise PerfError(f"expected {frames} frames in {short[0]}, found fewer: take it out, or ask for fewer")
    cropped = []
    for one in clips:
        h, w = (side // MULTIPLE_OF * MULTIPLE_OF for side in one.lr.shape[1:3])
        truth = np.array(one.truth[:, : SCALE * h, : SCALE * w])
        cropped.append(EvaluationClip(one.name, truth, np.array(one.lr[:, :h, :w])))
    return cropped


def scores_of(answers: Frames, clip: EvaluationClip) -> dict[str, float]:
    """Mean PSNR-Y in dB and SSIM-Y, and tOF in hr pixels over the first frames, of (T, 4H, 4W, 3) uint8."""
    pairs = list(zip(answers, clip.truth, strict=True))
    return {
        "psnr_db": float(np.mean([psnr_y(*pair) for pair in pairs])),
        "ssim": float(np.mean([ssim_y(*pair) for pair in pairs])),
        "tof_px": tof(answers[:TOF_FRAMES], flows(clip.truth[:TOF_FRAMES])),
    }


@torch.inference_mode()
def eager(weights: Path, windows: Frames, least_s: float) -> tuple[Frames, Row]:
    """A checkpoint in eager PyTorch, FP32: (T, 3, H, W, 3) uint8 -> (T, 4H, 4W, 3) uint8, then a round."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # FP32 means FP32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_checkpoint(weights).to(device)

    def upscale(window: Frames) -> Frames:
        answer: Frames = network(torch.from_numpy(window)[None].to(device))[0].cpu().numpy()
        return answer

    answers, count, started_s = [upscale(window) for window in windows], 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < least_s:
        upscale(windows[count % len(windows)])
        count += 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return np.stack(answers), {"fps": round(count / elapsed_s, 4), "memory_mb": round(peak_mb, 1)}


@dataclass(frozen=True)
class Ladder:
    """What all rows share."""

    baseline: Path  # weights of the first row
    repository: Path  # of rows without weights of their own
    clips: list[EvaluationClip]
    size: Size  # of the lr frames that speed is measured with
    rounds: int
    least_s: float  # of a round of the baseline
    frames: int  # of one of perf_analyzer's windows, at least

    def scores(self, upscale: Callable[[Frames], Frames]) -> Row:
        """Means over the test clips."""
        found = [scores_of(upscale(one.lr), one) for one in self.clips]
        return {key: round(float(np.mean([one[key] for one in found])), 5) for key in found[0]}

    def first_row(self) -> Row:
        """The baseline with its quality; its rounds are measured beside the other rows."""
        scores = self.scores(lambda lr: in_process(eager, self.baseline, clips.windows(lr, WINDOW), 0.0)[0])
        name = "baseline, PyTorch eager, FP32"
        return {"key": BASELINE, "name": name, "weights": "baseline", "rounds": [], **scores}

    def row(self, step: dict[str, Any], first: Row) -> Row:
        """One row, each round after one of the first row, which grows; without figures it says why."""
        step = {"instances": 1, "batch": 1, **step}
        row: Row = {"key": step["key"], "name": step["name"], "weights": step["weights"], "rounds": []}
        if step["target"] in GPU_TARGETS and not gpu():
            return {**row, "why": "no GPU"}
        instances, batch = step["instances"], step["batch"]
        serving = Serving(step["weights"], step["target"], None, instances, batching=batch > 1)
        windows = clips.windows(clips.read_frames(2, self.size), WINDOW)
        try:
            source, analyzer = repository_of(serving, self.repository), find_analyzer()
            with serve(source, serving) as (server, watch):
                load = source.load(server.grpc_url, self.size)
                # A batch at work and one waiting, for each instance.
                load = replace(
                    load, concurrency=2 * instances * batch, transport="system", frames=self.frames
                )
                analyzer.warm_up(load)
                for _ in range(self.rounds):
                    with Watch() as others:
                        _, base = in_process(eager, self.baseline, windows, self.least_s)
                        first["rounds"].append({**base, "others_cores": others.lap()["others_cores"]})
                    watch.lap()
                    row["rounds"].append(
                        {**analyzer.measure(load), **watch.lap(), "baseline_fps": base["fps"]}
                    )
                    log.info("  %.2f frames/s, baseline %.2f", row["rounds"][-1]["fps"], base["fps"])
                with Upscaler(server.grpc_url, scene_threshold=math.inf) as upscaler:
                    scores = self.scores(lambda lr: np.stack([*upscaler.upscale(lr)]))
            return {**row, **scores, "loss_db": first["psnr_db"] - scores["psnr_db"]}
        except (PerfError, UpscaleError) as err:
            return {**row, "rounds": [], "why": f"failed: {err}"}


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--rows", help="Keys of perf/ladder.toml, comma-separated; by default all.")
@click.option("--size", nargs=2, type=int, default=(180, 320), help="Lr height and width, for speed.")
@click.option("--clips", "folder", type=click.Path(path_type=Path), help="Folder of test clips, for quality.")
@click.option("--frames", default=16, type=click.IntRange(TOF_FRAMES), help="Of each test clip.")
@click.option("--rounds", default=5, type=click.IntRange(1), help="Of every row, each beside the baseline.")
@click.option("--seconds", default=8.0, help="A round of the baseline goes on for so long.")
@click.option("--repository", type=click.Path(path_type=Path), default=MODELS, help="Of `--quick`.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results; default: perf/results.")
@click.option("--quick", is_flag=True, help="Two rows at a toy size; results go to build/perf/quick.")
def main(
    rows: str | None, size: Size, folder: Path | None, frames: int, rounds: int, seconds: float,
    repository: Path, out: Path | None, quick: bool,
) -> None:  # fmt: skip
    """Measure the precision ladder: speed, memory, and what each step costs in quality.

    Name a folder of --clips that the networks were not trained on; the default, a street scene, is none.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    find_analyzer()
    keys = rows.split(",") if rows else list(STEPS)
    known(keys, STEPS, "rows")
    baseline, steps, per_window = checkpoint("baseline"), [STEPS[key] for key in keys], 36
    if quick:
        baseline, steps, per_window = checkpoint("student"), [QUICK], 4
        size, frames, rounds, seconds = (32, 48), TOF_FRAMES, 1, 0.1
    test_clips, out = read_clips(folder, frames), out or (results.QUICK if quick else results.FOLDER)
    result: dict[str, Any] = {
        "kind": "ladder", "name": "ladder_gpu" if gpu() else "ladder", "machine": machine(),
        "size": list(size), "clips": [f"{one.name}, {frames} frames" for one in test_clips], "networks": {},
    }  # fmt: skip
    ladder = Ladder(baseline, repository, test_clips, size, rounds, seconds, per_window)
    measured = [ladder.first_row()]
    for step in track(steps, "ladder", console=results.console):
        log.info("%s", step["name"])
        measured.append(ladder.row(step, measured[0]))
        if step["weights"]:
            widths = load_checkpoint(checkpoint(step["weights"])).widths
            network = Network(partial(MstGan, widths), WINDOW, takes_bytes=True)
            counted = {"parameters": network.parameters(), "flops": network.flops(size)}
            result["networks"][step["weights"]] = counted
        path = results.write(out, {**result, "rows": measured})
    log.info("%s", path)
    if failed := [
        f"{row['name']} {row['why']}" for row in measured if row.get("why", "").startswith("failed")
    ]:
        raise PerfError(f"{len(failed)} of {len(measured)} rows: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
