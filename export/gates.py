"""A generator and the one it replaces in, what the step costs on real frames out: and a verdict."""

from __future__ import annotations

import json
import logging
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export import spec
from export.data.sample import Frames, reduced_windows, sample_windows
from export.errors import ExportError
from export.metrics.psnr_ssim import psnr_y
from export.metrics.tof import Flow, flows, tof
from export.parity import REPORT, TOLERANCES

log = logging.getLogger(__name__)

# Of the sample clip, after what calibration saw. A single spot flatters: INT8 sums that saturate cost 1.1 dB
# at the first and 0.2 dB at the fourth, but 0.004 dB at the third.
SPOTS, FRAMES = (67, 110, 130, 164, 200), 3
SPEED_SIZE: spec.Size = (180, 320)  # lr; a usual one, large enough that arithmetic decides and not overhead
SPEED_ROUNDS = 7  # of both generators in turn, so that a busy machine slows both

Feeds = dict[str, NDArray[np.uint8] | NDArray[np.float16] | NDArray[np.float32]]


@dataclass(frozen=True)
class Limits:
    """What a rung may cost, from the committed tolerances."""

    psnr_loss_db: float
    max_error: float
    """Grey levels of one value of one pixel."""
    tof_gain_px: float
    speedup: float
    """Least ratio of the parent's time to the rung's; 0 where this machine does not run the target."""


@dataclass(frozen=True)
class Verdict:
    """One rung of one stage against its parent, on runs of frames whose truth is known."""

    stage: str
    rung: str
    parent: str
    frames: int
    psnr_db: float
    """Luma, of the whole chain against the truth."""
    psnr_loss_db: float
    max_error: float
    """Against the parent's frames, in grey levels."""
    tof_px: float
    """Flicker: by how much the flow between consecutive answers differs from that of the truth, hr pixels."""
    tof_gain_px: float
    """Median over the spots. In their mean the one counts where somebody fills a dark corner of the picture:
    the flow there is anyone's guess, and changes by pixels with a quarter of a grey level."""
    ms: float | None
    """Median of the stage alone, one thread; None where speed was not judged."""
    speedup: float | None
    limits: Limits

    @property
    def failures(self) -> list[str]:
        """What makes the answers worse than allowed, for an error message."""
        checks = (
            ("loses {:.3f} dB (at most {:g})", self.psnr_loss_db, self.limits.psnr_loss_db),
            ("differs by up to {:g} grey levels (at most {:g})", self.max_error, self.limits.max_error),
            ("flickers {:.4f} px more (at most {:g})", self.tof_gain_px, self.limits.tof_gain_px),
        )
        return [text.format(found, limit) for text, found, limit in checks if not found <= limit]

    @property
    def fast_enough(self) -> bool:
        """Whether it earns its place; true where speed was not judged."""
        return self.speedup is None or self.speedup >= self.limits.speedup

    def __str__(self) -> str:
        """One line for a log."""
        pace = "" if self.ms is None else f", {self.ms:.0f} ms: {self.speedup:.2f}x"
        return (
            f"{self.stage} {self.rung} against {self.parent}: {self.psnr_db:.2f} dB, loses "
            f"{self.psnr_loss_db:+.4f} dB, max error {self.max_error:g}, tOF {self.tof_px:.4f} px "
            f"({self.tof_gain_px:+.4f}){pace}"
        )


def limits_of(rung: str) -> Limits:
    """The committed tolerances of a rung."""
    return Limits(**tomllib.loads(TOLERANCES.read_text())["rungs"][rung])


def judge_generator(
    rung: str, candidate: Path, parent_rung: str, stages: Mapping[str, Path], *, judge_speed: bool
) -> Verdict:
    """Compare a generator with its parent inside the chain.

    Args:
        rung: name of the candidate's, as in the tolerances.
        candidate: ONNX file.
        parent_rung: name of the parent's.
        stages: ONNX file of every stage; the generator's is the parent.
        judge_speed: whether to time both.
    """
    limits = limits_of(rung)
    spots = [reduced_windows(first, FRAMES) for first in SPOTS]
    lr_windows, truth = (np.concatenate(parts) for parts in zip(*spots, strict=True))
    sessions = {stage: _session(path) for stage, path in stages.items()}
    parent, child = sessions[spec.GENERATOR.name], _session(candidate)
    parent_frames = _upscale(lr_windows, sessions)
    frames = _upscale(lr_windows, {**sessions, spec.GENERATOR.name: child})
    parent_psnr, psnr = (_mean_psnr(images, truth) for images in (parent_frames, frames))
    true_flows = [flows(part) for _, part in spots]
    parent_tofs, tofs = (_tofs(images, true_flows) for images in (parent_frames, frames))
    parent_ms = ms = None
    if judge_speed and limits.speedup:
        feeds = _generator_feeds(sample_windows(1, SPEED_SIZE), sessions[spec.FLOW_ALIGN.name])
        parent_ms, ms = _medians_ms((parent, child), feeds)
    return Verdict(
        stage=spec.GENERATOR.name, rung=rung, parent=parent_rung, frames=len(frames),
        psnr_db=psnr, psnr_loss_db=parent_psnr - psnr,
        max_error=float(np.abs(frames.astype(int) - parent_frames).max()),
        tof_px=float(tofs.mean()), tof_gain_px=float(np.median(tofs - parent_tofs)),
        ms=ms, speedup=None if parent_ms is None or ms is None else parent_ms / ms, limits=limits,
    )  # fmt: skip


def check(verdicts: Sequence[Verdict], folder: Path) -> None:
    """Log the verdicts, add them to ``parity.json`` in ``folder``, and refuse one whose answers are worse.

    Raises:
        ExportError: a tolerance of quality does not hold. One of speed decides what is served: no error.
    """
    path = folder / REPORT
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["rungs"] = [
        {**asdict(v), "passed": not v.failures, "fast_enough": v.fast_enough} for v in verdicts
    ]
    path.write_text(json.dumps(report, indent=2) + "\n")
    for verdict in verdicts:
        log.info("%s %s", "FAIL" if verdict.failures else "ok  ", verdict)
        if not verdict.fast_enough:
            log.warning(
                "%s in %s is not promoted: here it is slower than in %s, which is served instead",
                verdict.stage, verdict.rung, verdict.parent,
            )  # fmt: skip
    failed = [f"{v.stage} in {v.rung} {' and '.join(v.failures)}" for v in verdicts if v.failures]
    if failed:
        raise ExportError(
            f"against its parent, {'; '.join(failed)}. Nothing was installed; see {path} and "
            f"{folder}/sensitivity.json, tolerances in {TOLERANCES}; --target fp32 serves the parent"
        )


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # what one instance of a small server has; more would be noise here
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, feeds: Feeds) -> Feeds:
    names = [output.name for output in session.get_outputs()]
    wanted = {tensor.name: feeds[tensor.name] for tensor in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


def _generator_feeds(lr_window: Frames, flow_align: ort.InferenceSession) -> Feeds:
    feeds: Feeds = {spec.LR_WINDOW.name: lr_window}
    return feeds | _run(flow_align, feeds)


def _upscale(lr_windows: Frames, sessions: Mapping[str, ort.InferenceSession]) -> Frames:
    frames = []
    for lr_window in lr_windows:
        tensors: Feeds = {spec.LR_WINDOW.name: lr_window[np.newaxis]}
        for stage in spec.STAGES:
            tensors |= _run(sessions[stage.name], tensors)
        frames.append(tensors[spec.HR_FRAME.name][0])
    return np.stack(frames).astype(np.uint8, copy=False)


def _mean_psnr(frames: Frames, truth: Frames) -> float:
    return float(np.mean([psnr_y(image, true) for image, true in zip(frames, truth, strict=True)]))


def _tofs(frames: Frames, true_flows: Sequence[Sequence[Flow]]) -> NDArray[np.float64]:
    """Flicker within each spot; between spots nothing moves, it cuts."""
    parts = np.split(frames, len(true_flows))
    return np.array([tof(part, true) for part, true in zip(parts, true_flows, strict=True)])


def _medians_ms(sessions: Sequence[ort.InferenceSession], feeds: Feeds) -> list[float]:
    """Median time of each, run in turn after one warm-up."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(SPEED_ROUNDS + 1):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            _run(session, feeds)
            taken.append(1000 * (time.perf_counter() - start))
    return [float(np.median(taken[1:])) for taken in times]
