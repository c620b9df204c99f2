"""Runs one rung: exports it, serves it, loads it; or runs it in PyTorch alone."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median

import numpy as np

from deploy.embedded.server import ServerError, TritonServer
from perf.clip import Frames, Size, read_frames, windows
from perf.errors import PerfError, one_line
from perf.ladder.load import Tensors, run_load
from perf.ladder.memory import Peak, watched
from perf.ladder.pace import steady_fps
from perf.ladder.rungs import Rung
from perf.machine import ROOT
from perf.overhead import bare_fps
from perf.variant import ENSEMBLE, Serving, read_configs, write_variant

log = logging.getLogger(__name__)

LOAD_FRAMES = 4  # where only memory counts, which the first answers take


@dataclass(frozen=True)
class Found:
    """What running a rung gave."""

    fps: list[float]
    """Of each round."""
    answers: Frames
    peak: Peak
    bare_fps: list[float] = field(default_factory=list)
    """The same ONNX files called in one process, between the served rounds; empty: not measured."""


@dataclass
class Bench:
    """One clip, one machine, one way to measure."""

    lr: Frames
    """(T, H, W, 3) uint8 RGB."""
    work: Path
    rounds: int
    least_s: float
    """Of each round."""
    exported: dict[tuple[str, str], Path] = field(default_factory=dict)

    @property
    def cores(self) -> int:
        """All that this process may use, on either side."""
        return len(os.sched_getaffinity(0))

    def run(self, rung: Rung, weights: Path) -> Found:
        """Run a rung.

        Raises:
            PerfError: It could not be exported, served or measured.
        """
        if rung.target is None:
            return self.eager(weights)
        return self.served(rung, self.export(rung.widths, rung.target, weights))

    def eager(self, weights: Path) -> Found:
        """PyTorch in a process of its own, with as many threads as cores; one round."""
        frames, answers = self.work / "lr.npy", self.work / "answers.npy"
        np.save(frames, self.lr)
        command = [sys.executable, "-m", "perf.ladder.eager", "--checkpoint", str(weights)]
        command += ["--frames", str(frames), "--answers", str(answers)]
        command += ["--threads", str(self.cores), "--seconds", str(self.least_s)]
        log.info("%s", shlex.join(command))
        # A session of its own: its memory is told from ours by it.
        with subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                with watched(process.pid) as peak:
                    output, errors = process.communicate()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise PerfError(f"PyTorch ended with status {process.returncode}: {_last_line(errors)}")
        return Found([steady_fps(json.loads(output), 1)], np.load(answers), peak)

    def export(self, widths: str, target: str, weights: Path) -> Path:
        """The repository of these weights for a target, exported once a run."""
        if (widths, target) in self.exported:
            return self.exported[widths, target]
        folder = self.work / f"{widths}-{target}"
        folder.mkdir(parents=True, exist_ok=True)
        # The speed gate stays out: how fast a rung is, is the question here.
        command = [sys.executable, "-m", "export", "build", "--checkpoint", str(weights)]
        command += ["--repository", str(folder / "models"), "--build", str(folder / "onnx")]
        command += ["--target", target, "--no-speed-gate"]
        log.info("%s > %s", shlex.join(command), folder / "export.log")
        with (folder / "export.log").open("w") as output:
            run = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        if run.returncode:
            words = _last_line((folder / "export.log").read_text())
            raise PerfError(f"the export ended with status {run.returncode}: {words}")
        self.exported[widths, target] = folder / "models"
        return folder / "models"

    def served(self, rung: Rung, repository: Path) -> Found:
        """Rounds through the server, and where all is on the CPU, rounds without it in between."""
        lr_windows = windows(self.lr, tensors_window(repository))
        fps: list[float] = []
        bare: list[float] = []
        answers: Frames | None = None
        with self._server(rung, repository) as (models, server, peak):
            for _ in range(self.rounds):
                load = run_load(server.grpc_url, tensors_of(models), lr_windows, rung.in_flight, self.least_s)
                fps.append(steady_fps(load.done_s, rung.in_flight))
                answers = load.answers if answers is None else answers
                if peak.gpu is None:
                    # As long as a served round, or a fast rung's would be over at once.
                    repeats = ceil(max(1.0, fps[-1] * self.least_s / len(lr_windows)))
                    again = np.concatenate([lr_windows] * repeats)
                    bare.append(bare_fps(models, again, rung.batch, rung.instances, self.cores))
                log.info("  served %.2f fps%s", fps[-1], f", bare {bare[-1]:.2f}" if bare else "")
        assert answers is not None
        return Found(fps, answers, peak, bare)

    def peak_mb(self, rung: Rung, weights: Path, size: Size) -> float:
        """Peak memory of a served rung under load at another size, MiB.

        Raises:
            PerfError: It could not be exported, served or measured.
        """
        assert rung.target is not None
        repository = self.export(rung.widths, rung.target, weights)
        lr_windows = windows(read_frames(LOAD_FRAMES, size), tensors_window(repository))
        with self._server(rung, repository) as (models, server, peak):
            run_load(server.grpc_url, tensors_of(models), lr_windows, rung.in_flight, least_s=0)
        return peak.processes

    @contextmanager
    def _server(self, rung: Rung, repository: Path) -> Iterator[tuple[Path, TritonServer, Peak]]:
        """The rung's own repository, a server that has it loaded, and its memory since its start."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            models = Path(folder) / "models"
            models.mkdir()
            serving = Serving(rung.target, instances=rung.instances, batching=rung.batch > 1)
            write_variant(repository, models, serving)
            server = TritonServer(models, self.work / f"{rung.key}.log")
            server.start()
            try:
                with watched(server.process.pid) as peak, server:
                    yield models, server, peak
            except ServerError as err:
                raise PerfError(one_line(err)) from err


def tensors_of(repository: Path) -> Tensors:
    """What the served ensemble takes and gives, from its configuration."""
    config = read_configs(repository, None)[ENSEMBLE]
    scale = int(config.parameters["scale"].string_value)
    return Tensors(ENSEMBLE, config.input[0].name, config.output[0].name, scale)


def tensors_window(repository: Path) -> int:
    """Frames of one request."""
    return int(read_configs(repository, None)[ENSEMBLE].parameters["window"].string_value)


def spread_percent(values: list[float]) -> float:
    """From the least to the most, in percent of the median."""
    return round(100 * (max(values) - min(values)) / median(values), 1)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("Error: ") if lines else "no reason given"
