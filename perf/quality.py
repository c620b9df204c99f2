"""How near a network's frames come to the truth, on clips that no committed network was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from export.data.clips import SCALER
from export.data.degradations import bi
from export.metrics.psnr_ssim import psnr_y, ssim_y
from export.metrics.tof import flows, tof
from export.spec import MULTIPLE_OF, SCALE
from perf.clips import FIRST, Frames, default_clip
from perf.results import PerfError

LARGEST = (720, 1280)  # of a truth frame; the middle of larger ones is used
TOF_FRAMES = 6  # the flow of five pairs takes as long as all other scores


@dataclass(frozen=True)
class Truth:
    """Consecutive frames and their reduction by 4, the one that networks are trained on."""

    name: str
    """File and frames."""
    lr: Frames
    """(T, H, W, 3) uint8 RGB."""
    hr: Frames
    """(T, 4H, 4W, 3) uint8 RGB."""


def truths(folder: Path | None, count: int) -> list[Truth]:
    """Test clips: the videos of a folder, each from its middle, or the default clip.

    Raises:
        PerfError: There is no video, or one is too short or too small.
    """
    if folder is None:
        return [_truth(default_clip(), FIRST, count)]
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise PerfError(f"expected videos in {folder}, found none: name a folder of test clips")
    return [_truth(path, None, count) for path in paths]


def scores(answers: Frames, truth: Truth) -> dict[str, float]:
    """Mean PSNR-Y in dB and SSIM-Y, and tOF in hr pixels over the first frames, of (T, 4H, 4W, 3) uint8."""
    pairs = list(zip(answers, truth.hr, strict=True))
    return {
        "psnr_db": float(np.mean([psnr_y(*pair) for pair in pairs])),
        "ssim": float(np.mean([ssim_y(*pair) for pair in pairs])),
        "tof_px": tof(answers[:TOF_FRAMES], flows(truth.hr[:TOF_FRAMES])),
    }


def _truth(path: Path, first: int | None, count: int) -> Truth:
    try:
        with av.open(str(path)) as container:
            if first is None:
                first = max(0, (container.streams.video[0].frames - count) // 2)
            decoded = islice(container.decode(video=0), first, first + count)
            frames = [frame.to_ndarray(format="rgb24", interpolation=SCALER) for frame in decoded]
    except (av.FFmpegError, IndexError) as err:  # IndexError: no video stream
        raise PerfError(f"expected {path} to be a video, found something else ({err}): take it out") from err
    height, width = frames[0].shape[:2] if frames else (0, 0)
    step = SCALE * MULTIPLE_OF
    h, w = (min(side, most) // step * step for side, most in zip((height, width), LARGEST, strict=True))
    if len(frames) < count or min(h, w) < 4 * step:
        raise PerfError(
            f"expected {count} frames of {4 * step}x{4 * step} or more in {path}, found {len(frames)} of "
            f"{width}x{height}: take it out, or ask for fewer --frames"
        )
    top, left = (height - h) // 2, (width - w) // 2
    hr = np.stack(frames).astype(np.uint8, copy=False)[:, top : top + h, left : left + w]
    reduced = bi(torch.from_numpy(np.ascontiguousarray(hr)).permute(0, 3, 1, 2).float() / 255)
    lr: Frames = (reduced * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Truth(f"{path.name}, frames {first}-{first + count - 1}", lr, hr)
