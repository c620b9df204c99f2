"""How close an image is to the truth: PSNR and SSIM of luma."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..frames.windows import Image

# BT.601, 16..235: the luma on which papers on super-resolution compare
LUMA: NDArray[np.float64] = np.array([65.481, 128.553, 24.966]) / 255
SSIM_WINDOW_PX = 7
PEAK = 255.0


def luma(image: Image) -> NDArray[np.float64]:
    """Luma of an (H, W, 3) uint8 RGB image, 16..235."""
    return image.astype(np.float64) @ LUMA + 16


def psnr_db(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio of two (H, W) images; infinite for equal ones."""
    error = float(np.square(one - other).mean())
    return 10 * float(np.log10(PEAK**2 / error)) if error else float("inf")


def ssim(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Mean structural similarity of two (H, W) images over square windows (Wang et al. 2004)."""
    mean_one, mean_other = _means(one), _means(other)
    unbiased = SSIM_WINDOW_PX**2 / (SSIM_WINDOW_PX**2 - 1)
    variance_one = unbiased * (_means(one * one) - mean_one**2)
    variance_other = unbiased * (_means(other * other) - mean_other**2)
    covariance = unbiased * (_means(one * other) - mean_one * mean_other)
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_one * mean_other + c1) * (2 * covariance + c2)
    similarity /= (mean_one**2 + mean_other**2 + c1) * (variance_one + variance_other + c2)
    return float(similarity.mean())


def _means(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of all whole windows of an (H, W) image."""
    size = SSIM_WINDOW_PX
    sums = np.pad(plane.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    rows = sums[size:] - sums[:-size]
    means: NDArray[np.float64] = (rows[:, size:] - rows[:, :-size]) / size**2
    return means
