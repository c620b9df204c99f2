"""tOF, TecoGAN's measure of flicker: how far the motion between answers is from the motion of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from skimage.registration import optical_flow_ilk

from export.metrics.psnr_ssim import luma_bt601

FLOW_WARPS = 3  # of the optical flow estimate; ten agree within 2 % and take three times as long

Flow = NDArray[np.float32]
"""(2, H, W): rows, columns; pixels."""


def flows(frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[Flow]:
    """Optical flow between consecutive (H, W, 3) uint8 RGB frames, by an estimator independent of ours."""
    grays = [(luma_bt601(frame) / 255).astype(np.float32) for frame in frames]
    return [optical_flow_ilk(a, b, num_warp=FLOW_WARPS, dtype=np.float32) for a, b in pairwise(grays)]


def tof(frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], true_flows: Sequence[Flow]) -> float:
    """Mean length of the error of the flow between consecutive frames, hr pixels (Chu et al. 2020).

    Published figures use Farneback's flow, and so cannot be compared with these.

    Args:
        frames: (H, W, 3) uint8 RGB, consecutive.
        true_flows: `flows` of the truth: computed once, used for every method.
    """
    errors = [
        np.linalg.norm(found - true, axis=0).mean()
        for found, true in zip(flows(frames), true_flows, strict=True)
    ]
    return float(np.mean(errors))
