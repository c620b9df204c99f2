"""How near a network's frames come to the truth, on clips that no committed network was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.data.evaluation_clips import EvaluationClip, Source, find_sources, load_evaluation_clip
from export.errors import ExportError
from export.metrics.psnr_ssim import psnr_y, ssim_y
from export.metrics.tof import flows, tof
from export.spec import MULTIPLE_OF, SCALE
from perf.clips import Frames, default_clip
from perf.results import PerfError
from perf.serving import WORK

TOF_FRAMES = 6  # the flow of five pairs takes as long as all other scores


def read_clips(folder: Path | None, frames: int) -> list[EvaluationClip]:
    """The clips of a folder, as `python -m export evaluate` reads them, or the default clip; their middle.

    Raises:
        PerfError: There are none, or one has fewer frames or is too small.
    """
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


def scores(answers: Frames, clip: EvaluationClip) -> dict[str, float]:
    """Mean PSNR-Y in dB and SSIM-Y, and tOF in hr pixels over the first frames, of (T, 4H, 4W, 3) uint8."""
    pairs = list(zip(answers, clip.truth, strict=True))
    return {
        "psnr_db": float(np.mean([psnr_y(*pair) for pair in pairs])),
        "ssim": float(np.mean([ssim_y(*pair) for pair in pairs])),
        "tof_px": tof(answers[:TOF_FRAMES], flows(clip.truth[:TOF_FRAMES])),
    }
